"""A server and the other one: its standby, or the primary that it is a standby of."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog

from optserve.v1.standby_pb2 import Hello
from optserve_server.config import Config
from optserve_server.engine.engine import Engine
from optserve_server.peer import Peer
from optserve_server.replication import standing
from optserve_server.replication.follower import Deposer, Follower
from optserve_server.replication.primary import Primary
from optserve_server.replication.replica import Replica
from optserve_server.replication.standing import Role, Standing
from optserve_server.storage.directory import DataDirectory

log = structlog.get_logger()


class Pair:
    """`primary` is what this server is to a standby, if it has a data directory; `follower` what it is to its primary, if it
    is a standby, or was when it started. Raises ValueError for a standing that can't be read.

    `changed` is called when this server has to stop serving, or may again.
    """

    def __init__(
        self, config: Config, engine: Engine, storage: DataDirectory | None, changed: Callable[[], None]
    ) -> None:
        self._config = config
        self._engine = engine
        self._storage = storage
        self._standing = standing.read(storage.path) if storage is not None else Standing()
        self._lasting = ExitStack()
        self._address = ""
        self.primary: Primary | None = None
        self.follower: Follower | None = None
        if storage is not None:
            self.primary = Primary(storage, engine, self._standing, waits=config.wait_for_standby, changed=changed)

    def stand(self, address: str, serve: Callable[[], None]) -> None:
        """Be what this server, which listens at an address, is to the other one; `serve` is called once it is promoted."""
        self._address = address
        primary, stood = self._config.follow, self._standing
        if stood.role is Role.PROMOTED and primary in (None, stood.address):
            if primary is not None:
                log.warning("this server serves, since it was promoted instead of its primary", primary=primary)
            self._depose(stood.address)
        elif primary is not None:
            if self.primary is not None:
                self.primary.become(Role.STANDBY, address=primary)
            peer = Peer(primary)
            self._lasting.callback(peer.close)
            spool = Path(tempfile.mkdtemp(prefix="incoming-", dir=self._config.data_dir))
            self._lasting.callback(shutil.rmtree, spool, ignore_errors=True)
            replica = Replica(self._engine, self._storage, spool)
            self.follower = Follower(replica, peer, self._hello(), lambda: self._promoted(primary, serve))

    def close(self) -> None:
        """Follow no more, and tell nobody anything any more."""
        if self.follower is not None:
            self.follower.close()
        self._lasting.close()

    def _promoted(self, primary: str, serve: Callable[[], None]) -> None:
        """Serve, durably so, and let the former primary know."""
        if self.primary is not None:
            self.primary.become(Role.PROMOTED, address=primary)
        serve()
        self._depose(primary)

    def _depose(self, primary: str) -> None:
        peer = Peer(primary)
        self._lasting.callback(peer.close)
        self._lasting.callback(Deposer(peer, self._hello(promoted=True)).close)

    def _hello(self, *, promoted: bool = False) -> Hello:
        return Hello(
            standby=self._standing.id,
            address=self._address,
            promote_after=self._config.promote_after or 0.0,
            promoted=promoted,
        )
