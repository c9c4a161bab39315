"""The follower: a standby's connection to its primary, and what ends it, promotion.

One thread hears the primary and echoes its heartbeats at once, another makes what came. What is on its way between them is
bounded by what the primary sends ahead, so that heartbeats never wait for updates.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import structlog

from optserve._errors import FailedPrecondition, OptserveError, ServerUnavailable, StorageFailed
from optserve.v1.standby_pb2 import Deposition, FollowRequest, FollowResponse, Hello, Progress, Resignation
from optserve_server.replication.replica import Replica

log = structlog.get_logger()

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between attempts to connect
SILENCE = 3.0  # seconds after which a primary that is to be deposed is taken for dead
TAKEN = 4 << 20  # bytes after which the primary is told how far this is
AGAIN = 30.0  # seconds after which what went wrong is tried again


class Stream(Protocol):
    """An open Follow stream: iterates over responses; raises OptserveErrors."""

    def __iter__(self) -> Iterator[FollowResponse]: ...

    def cancel(self) -> object:
        """End it."""


Connect = Callable[[Iterator[FollowRequest]], Stream]
Outgoing = queue.SimpleQueue[FollowRequest | None]


class Follower:
    """Follows until it is promoted or closed.

    `hello` says who this is. `promoted` is called, once, when this server is to serve, with the primary's consent or without;
    it raises what keeps it from that.
    """

    def __init__(self, replica: Replica, connect: Connect, hello: Hello, promoted: Callable[[], None]) -> None:
        self._replica = replica
        self._connect = connect
        self._hello = hello
        self._promoted = promoted
        self._seconds = hello.promote_after
        self._changed = threading.Condition()
        self._promoting = threading.Lock()
        self._ended = self._resigned = self._silent = self._done = False
        self._deposed = False  # the primary said so
        self._leased = False  # as the last heartbeat said
        self._heard = time.monotonic()
        self._events = 0  # that the primary has
        self._stream: Stream | None = None
        self._outgoing: Outgoing | None = None  # of the stream, if there is one
        self._following = threading.Thread(target=self._run, name="optserve-follow", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="optserve-promotion", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._following.start()
        if self._seconds:
            self._watching.start()

    @property
    def promotable(self) -> bool:
        """Whether everything is here that the primary had when it was last connected."""
        return self._replica.complete

    @property
    def lag(self) -> int:
        """Events that the primary has, and this server has not."""
        return max(0, self._events - self._replica.events)

    def promote(self) -> bool:
        """Take over: from a primary that answers, everything. Whether it confirmed that it stopped.

        One that does not answer may still serve, unless there is a lease, which is then waited for. Raises FailedPrecondition
        if not everything is here, or what `promoted` raises.
        """
        with self._promoting:
            if self._done:
                return self._deposed
            self._check_promotable()
            self._depose()
            if not self._deposed:
                self._await_lease()
            self._take_over()
            return self._deposed

    def close(self) -> None:
        """Follow no more; the primary goes on without."""
        with self._changed:
            self._resigned = self._silent = True
            if self._outgoing is not None:
                self._outgoing.put(FollowRequest(resignation=Resignation()))
                self._outgoing.put(None)
            self._changed.wait_for(
                lambda: self._outgoing is None, SILENCE
            )  # the stream ends once the primary has had it
        self._stop()
        if self._watching.ident is not None:
            self._watching.join()

    def _check_promotable(self) -> None:
        if not self._replica.complete:
            raise FailedPrecondition(
                "this standby has not got everything yet from its primary; wait until GetServerStatus says that it is "
                "promotable. If the primary is gone for good, restart this server without --follow: it has what its data "
                "directory has"
            )

    def _depose(self) -> None:
        """Ask the primary to stop, and wait until everything that it had is here, as long as it is heard."""
        with self._changed:
            if self._outgoing is not None:
                self._outgoing.put(FollowRequest(deposition=Deposition()))
            while self._outgoing is not None and not self._deposed:
                silence = time.monotonic() - self._heard
                if silence >= SILENCE:
                    return
                self._changed.wait(SILENCE - silence)

    def _await_lease(self) -> None:
        """Echo nothing any more, and wait until the primary has stopped because of that."""
        with self._changed:
            self._silent = True
            while self._leased and (left := self._heard + self._seconds - time.monotonic()) > 0:
                self._changed.wait(left)

    def _take_over(self) -> None:
        self._stop()
        self._replica.end()
        self._replica.confirmed()
        self._promoted()
        self._done = True
        log.warning("promoted", deposed=self._deposed, events=self._replica.events)

    def _stop(self) -> None:
        with self._changed:
            self._ended = True
            stream = self._stream
            self._changed.notify_all()
        if stream is not None:
            stream.cancel()
        self._following.join()

    def _watch(self) -> None:
        """Promote once the primary has been silent for long enough."""
        while True:
            with self._changed:
                while not (self._ended or self._resigned):
                    left = self._heard + self._seconds - time.monotonic()
                    if self._leased and self._replica.complete and left <= 0:
                        self._silent = True
                        break
                    self._changed.wait(left if left > 0 else self._seconds / 4)
                if self._ended or self._resigned:
                    return
            log.warning("the primary is silent", seconds=self._seconds)
            with self._promoting:
                if self._ended or self._done:
                    return
                try:
                    self._take_over()
                except (OptserveError, OSError, ValueError) as error:
                    log.error("not promoted", reason=str(error))
                return

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not (self._ended or self._resigned):
            began = time.monotonic()
            try:
                self._follow()
            except OptserveError as error:
                log.info("not connected to the primary", reason=str(error))
            pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * pause)
            with self._changed:
                self._changed.wait_for(lambda: self._ended, pause)

    def _follow(self) -> None:
        """Follow as long as one stream lasts."""
        outgoing: Outgoing = queue.SimpleQueue()
        self._hello.ClearField("parameter_sets")
        self._hello.parameter_sets.extend(self._replica.begin())
        self._hello.primary_incarnation = self._replica.incarnation
        hello = Hello()
        hello.CopyFrom(self._hello)
        outgoing.put(FollowRequest(hello=hello))
        incoming: queue.SimpleQueue[FollowResponse | None] = queue.SimpleQueue()
        maker = threading.Thread(target=self._make, args=(incoming, outgoing), name="optserve-replica", daemon=True)
        maker.start()
        stream = self._connect(iter(outgoing.get, None))
        with self._changed:
            self._stream = stream
            ended = self._ended
        try:
            if not ended:
                self._hear(stream, incoming, outgoing)
        finally:
            stream.cancel()
            incoming.put(None)
            maker.join()
            outgoing.put(None)
            with self._changed:
                self._stream = self._outgoing = None
                self._changed.notify_all()

    def _hear(self, stream: Stream, incoming: "queue.SimpleQueue[FollowResponse | None]", outgoing: Outgoing) -> None:
        began = time.monotonic()
        for message in stream:
            if not message.HasField("heartbeat"):
                if message.HasField("welcome"):
                    with self._changed:
                        self._outgoing = outgoing
                incoming.put(message)
                continue
            with self._changed:
                if self._resigned:
                    continue
                if self._silent or self._ended:
                    return
                self._heard = time.monotonic()
                self._events, self._leased = message.heartbeat.events, message.heartbeat.leased
                outgoing.put(FollowRequest(echo=message.heartbeat.number))
            if self._replica.failed and time.monotonic() - began > AGAIN:
                return

    def _make(self, incoming: "queue.SimpleQueue[FollowResponse | None]", outgoing: Outgoing) -> None:
        """Take in what comes, and say so whenever there is nothing more, or much was."""
        told = 0
        while (message := incoming.get()) is not None:
            if message.HasField("deposed"):
                with self._changed:
                    self._deposed = True
                    self._changed.notify_all()
                continue
            try:
                self._replica.take(message)
            except Exception as error:
                log.error("following failed", exc_info=error)
                self._break()
                return
            if incoming.empty() or self._replica.taken - told >= TAKEN:
                told = self._replica.taken
                try:
                    confirmed = self._replica.confirmed()
                except (StorageFailed, OSError) as error:
                    log.error("this standby's disk refused", reason=str(error))
                    self._break()
                    return
                progress = Progress(taken=told, confirmed=confirmed, complete=self._replica.complete)
                outgoing.put(FollowRequest(progress=progress))

    def _break(self) -> None:
        """Let the stream end, and another begin."""
        with self._changed:
            if self._stream is not None:
                self._stream.cancel()


class Deposer:
    """Tells the former primary of a promoted server that it is deposed, until it has heard."""

    def __init__(self, connect: Connect, hello: Hello) -> None:
        self._connect = connect
        self._hello = hello
        self._ended = threading.Event()
        self._stream: Stream | None = None
        self._thread = threading.Thread(target=self._run, name="optserve-deposer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Try no more."""
        self._ended.set()
        if (stream := self._stream) is not None:
            stream.cancel()
        self._thread.join()

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._tell() and not self._ended.wait(pause):
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _tell(self) -> bool:
        self._stream = stream = self._connect(iter([FollowRequest(hello=self._hello)]))
        if self._ended.is_set():
            stream.cancel()
        try:
            told = any(message.HasField("deposed") for message in stream)
        except ServerUnavailable:
            return False
        except OptserveError as error:
            log.error("the former primary can't be deposed", reason=str(error))
            return False
        if told:
            log.info("the former primary was deposed")
        return told
