"""A server that comes back from an older state, at the same address."""

import shutil
from pathlib import Path
from typing import Self

from optserve_server import Config, Server


class Restarts:
    """A server with a data directory, of which it may forget what came after a moment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copies = 0
        self._data = folder / "data"
        self.server = Server(Config(listen="127.0.0.1:0", data_dir=self._data)).start()
        self.address = self.server.address

    def remember(self) -> None:
        """This is the moment: what is on the disk now is what it will come back from."""
        self._copies += 1
        self._data = self._folder / f"copy-{self._copies}"
        assert self.server.config.data_dir is not None
        shutil.copytree(self.server.config.data_dir, self._data)

    def come_back(self, *, address: str | None = None) -> None:
        """Stop, and start from what was remembered."""
        self.server.stop()
        self.server = Server(Config(listen=address or self.address, data_dir=self._data)).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stop()
