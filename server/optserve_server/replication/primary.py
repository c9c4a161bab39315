"""The primary's side: a server that a standby follows, and that stops when that one may serve instead."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import structlog

from optserve._errors import FailedPrecondition, MessageOrder, OptserveError, ServerUnavailable
from optserve._specification import Journal
from optserve.v1.standby_pb2 import (
    Deposed,
    FollowRequest,
    FollowResponse,
    Heartbeat,
    Hello,
    Welcome,
)
from optserve_server.engine.engine import Engine
from optserve_server.engine.history import Log
from optserve_server.replication import standing
from optserve_server.replication.acknowledgements import Acknowledged, Confirmations
from optserve_server.replication.feed import Feed, Reached
from optserve_server.replication.lease import Lease
from optserve_server.replication.standing import Role, Standing
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.keeper import Keeper

log = structlog.get_logger()

WINDOW = 32 << 20  # bytes that a standby has not taken in; see Progress.taken
BEAT = 1.0  # seconds between heartbeats at most

Requests = Iterator[FollowRequest]
Responses = Iterator[FollowResponse]


class Primary:
    """What this server is to its standby, of which there is one at a time.

    With `waits`, events are acknowledged once the standby has confirmed them. `changed` is called when this server has to stop
    serving, or may again. Any thread may call any method.
    """

    def __init__(
        self,
        directory: DataDirectory,
        engine: Engine,
        stood: Standing,
        *,
        waits: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.incarnation = secrets.randbits(63) | 1
        self._directory = directory
        self._engine = engine
        self._standing = stood
        self._waits = waits
        self._changed = changed
        self._lock = threading.Lock()
        self._lease = Lease()
        self._confirmations = Confirmations()
        self._following: Following | None = None
        self._deposed_by = stood.address if stood.role is Role.DEPOSED else None
        if stood.role is Role.LEASED:
            self._lease.grant(stood.seconds, lapsed=True)

    @property
    def deposed(self) -> bool:
        """Whether the standby was promoted instead of this server."""
        return self._deposed_by is not None

    @property
    def lapsed(self) -> bool:
        """Whether the standby may have been."""
        return self._lease.lapsed

    @property
    def standby(self) -> str:
        """The address of the standby that is connected, or nothing."""
        following = self._following
        return following.hello.address if following is not None else ""

    @property
    def lag(self) -> int:
        """Events on stable storage that the standby has not confirmed; 0 without one."""
        if self._following is None:
            return 0
        return sum(max(0, keeper.synced - self._confirmations.of(keeper)) for keeper in self._directory.keepers)

    def log(self, keeper: Keeper, own: Log) -> Log:
        """The log of a set whose events are acknowledged as this server may."""
        return Acknowledged(keeper, own, self.check, self._confirmations if self._waits else None)

    def check(self) -> None:
        """Raises ServerUnavailable if this server must not acknowledge anything now."""
        if self._deposed_by is not None:
            raise ServerUnavailable(
                f"this server was deposed by its standby at {self._deposed_by}, which serves instead; ask that, or promote "
                "this one once that is gone"
            )
        if self._lease.lapsed:
            raise ServerUnavailable(
                f"this server waits for its standby at {self._standing.address}, which may have promoted itself; ask that, or "
                "promote this one if that is gone"
            )

    def follow(self, requests: Requests) -> Responses:
        """Serve one stream of a standby."""
        first = next(requests, None)
        if first is None or not first.HasField("hello"):
            raise MessageOrder("expected `hello` in the first message of Follow")
        if first.hello.promoted:
            if not self.deposed:
                self.depose(first.hello.address)
            yield FollowResponse(deposed=Deposed())
            return
        following = Following(self, first.hello, self._directory, self._confirmations, self._lease)
        self._admit(following)
        try:
            threading.Thread(target=following.listen, args=(requests,), name="optserve-standby", daemon=True).start()
            yield from following.messages()
        finally:
            self._leave(following)

    def grant(self, hello: Hello) -> None:
        """Let a standby that has everything promote itself, durably, before it hears of it."""
        if hello.promote_after and not self._lease.granted:
            self.become(Role.LEASED, hello.standby, hello.address, hello.promote_after)
            self._lease.grant(hello.promote_after)

    def release(self) -> None:
        """The standby will not promote itself any more."""
        if self._lease.granted:
            self.become(Role.ALONE)

    def depose(self, address: str) -> None:
        """Acknowledge nothing any more, durably, and put on stable storage what there is."""
        log.warning("deposed", by=address)
        self._deposed_by = address
        self.become(Role.DEPOSED, address=address)
        self._changed()
        for parameter_set in self._engine.list():
            try:
                self._finish(parameter_set.spec.id)
            except OptserveError as error:
                log.error("not finished", parameter_set=parameter_set.spec.id, reason=str(error))
        self._directory.changes.note()

    def _finish(self, set_id: str) -> None:
        keeper = self._directory.keeper(set_id)
        if keeper is not None and keeper.parameter_set.spec.journal is Journal.OFF:
            self._directory.checkpoint(set_id)
        self._engine.get(set_id).retire(ServerUnavailable(f"this server was deposed by {self._deposed_by}; ask that"))
        if keeper is not None:
            keeper.sync()

    def claim(self) -> bool:
        """Serve though the standby may, or does: who asks for it knows that it does not. Whether this server did not before."""
        if not self.deposed and not self.lapsed:
            return False
        for parameter_set in self._engine.list():
            parameter_set.reinstate()
        self.become(Role.ALONE)
        self._changed()
        return True

    def become(self, role: Role, peer: str = "", address: str = "", seconds: float = 0.0) -> None:
        """Take a role, durably; raises OSError."""
        with self._lock:
            self._standing = replace(self._standing, role=role, peer=peer, address=address, seconds=seconds)
            standing.write(self._directory.path, self._standing)
        self._deposed_by = address if role is Role.DEPOSED else None
        if role is not Role.LEASED:
            self._lease.end()

    def _admit(self, following: "Following") -> None:
        hello = following.hello
        if self.deposed:
            raise FailedPrecondition(f"this server was deposed by {self._deposed_by}; follow that")
        with self._lock:
            present = self._following
            if present is not None and present.hello.standby != hello.standby:
                raise FailedPrecondition(
                    f"the standby at {present.hello.address} follows this server; stop it first, there is one at a time"
                )
            if self._lease.granted and self._standing.peer != hello.standby:
                raise FailedPrecondition(
                    f"the standby at {self._standing.address} may have promoted itself; if it is gone, and was not, promote "
                    "this server, and follow it then"
                )
            if present is not None:
                present.end()
            self._following = following
        if self._lease.granted and hello.promote_after:
            self._lease.grant(hello.promote_after)
        elif not hello.promote_after:
            self.release()
        self._confirmations.connect()
        log.info("standby connected", standby=hello.address)

    def _leave(self, following: "Following") -> None:
        following.end()
        following.feed.close()
        with self._lock:
            if self._following is not following:
                return
            self._following = None
        self._confirmations.disconnect()
        log.info("standby disconnected", standby=following.hello.address)


class Following:
    """One stream of a standby."""

    def __init__(
        self, primary: Primary, hello: Hello, directory: DataDirectory, confirmations: Confirmations, lease: Lease
    ) -> None:
        self.hello = hello
        self._primary = primary
        self._directory = directory
        self._confirmations = confirmations
        self._lease = lease
        same = hello.primary_incarnation == primary.incarnation
        self.feed = Feed(
            directory, {each.id: Reached(each.incarnation, each.event) for each in hello.parameter_sets if same}
        )
        self._interval = min(BEAT, hello.promote_after / 4 if hello.promote_after else BEAT)
        self._sent = self._taken = 0  # bytes
        self._finished = self._ended = False

    def end(self) -> None:
        """Let the stream end."""
        self._ended = True
        self._directory.changes.note()

    def messages(self) -> Responses:
        """What the standby is sent, until the stream ends."""
        ids = [keeper.parameter_set.spec.id for keeper in self._directory.keepers]
        yield FollowResponse(welcome=Welcome(incarnation=self._primary.incarnation, parameter_set_ids=ids))
        next_beat = time.monotonic()
        while not self._ended:
            seen, finished, now = self._directory.changes.count, self._finished, time.monotonic()
            room = self._sent - self._taken < WINDOW
            if now >= next_beat:
                yield self._heartbeat()
                next_beat = now + self._interval
            elif room and (message := self.feed.next()) is not None:
                self._sent += len(message.data)
                yield message
            elif room and finished:
                yield FollowResponse(deposed=Deposed())
                return
            else:
                self._directory.changes.wait(seen, next_beat - now)

    def listen(self, requests: Requests) -> None:
        """Take in what the standby says, until it ends."""
        try:
            for request in requests:
                self._take(request)
        except Exception as error:  # gRPC's, when the call is over; or ours, and then the standby comes again
            log.info("a standby is not heard any more", standby=self.hello.address, reason=repr(error))
        self.end()

    def _take(self, request: FollowRequest) -> None:
        kind = request.WhichOneof("kind")
        if kind == "echo":
            self._lease.echoed(request.echo)
        elif kind == "progress":
            self._taken = request.progress.taken
            for each in request.progress.confirmed:
                keeper = self._directory.keeper(each.id)
                if keeper is not None and keeper.parameter_set.position.incarnation == each.incarnation:
                    self._confirmations.confirm(keeper, each.event)
            if request.progress.complete:
                self._primary.grant(self.hello)
            self._directory.changes.note()
        elif kind == "resignation":
            self._primary.release()
        elif kind == "deposition":
            self._primary.depose(self.hello.address)
            self._finished = True
            self._directory.changes.note()

    def _heartbeat(self) -> FollowResponse:
        number, leased = self._lease.sending()
        return FollowResponse(heartbeat=Heartbeat(number=number, events=self.feed.events, leased=leased))
