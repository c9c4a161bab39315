"""Uploads: a thread that copies checkpoints to the store, the newest of each set, while everything else goes on."""

import threading
from pathlib import Path

import structlog

from optserve_server.storage.store import Store

log = structlog.get_logger()

PATIENCE = 60.0  # seconds that uploads get at the end


class Uploads:
    """Copies what is offered, and removes what is deleted. What fails is logged, and tried again with the next checkpoint."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._offered: dict[str, Path] = {}  # by the name of the set's directory
        self._deleted = False
        self._working = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="optserve-uploads", daemon=True)
        self._thread.start()

    def offer(self, path: Path) -> None:
        """There is a new checkpoint; one of the same set that was not begun yet is left out."""
        with self._changed:
            self._offered[path.parent.name] = path
            self._changed.notify_all()

    def delete(self, home: str) -> None:
        """Remove a set's copies, after a restart if need be; raises OSError, of the local disk."""
        self._store.forget(home)
        with self._changed:
            self._offered.pop(home, None)
            self._deleted = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether, after so many seconds at most, everything that was offered has been tried."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._offered or self._deleted or self._working), timeout)

    def close(self) -> None:
        """End the thread, after what was offered, if the store takes it in time."""
        if not self.wait(PATIENCE):
            log.error("not all checkpoints were copied", store=self._store.url)
            return  # the thread ends with the process
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._offered or self._deleted or self._ended)
                if self._ended:
                    return
                home = next(iter(self._offered), None)
                path = self._offered.pop(home) if home is not None else None
                self._deleted = False
                self._working = True
            try:
                self._work(path)
            except Exception as error:
                if path is None or path.exists():  # else there is a newer one, or the set was deleted
                    log.error(
                        "not copied; trying again with the next checkpoint", store=self._store.url, reason=str(error)
                    )

    def _work(self, path: Path | None) -> None:
        self._store.catch_up()
        if path is not None:
            self._store.upload(path.parent.name, path)
