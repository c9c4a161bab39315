"""The heart of a client: a thread that says for idle workers that they are alive."""

import threading
from typing import Protocol
from weakref import WeakSet

from optserve._process import Owner

BEATS = 3  # in each lease: one may be lost


class Beating(Protocol):
    """What is kept alive."""

    lease: float

    def beat(self) -> None:
        """Say that it is alive, unless it is speaking anyway."""

    def close(self) -> None:
        """Say that it leaves."""


class Heart:
    """Beats for sessions whose leases end, from the first of them until the client is closed or the last is gone."""

    def __init__(self) -> None:
        self._sessions: WeakSet[Beating] = WeakSet()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._owner = Owner()
        self._thread: threading.Thread | None = None

    def add(self, session: Beating) -> None:
        """Beat for a session from now on."""
        with self._lock:
            self._sessions.add(session)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="optserve-heart", daemon=True)
                self._thread.start()

    def remove(self, session: Beating) -> None:
        """Beat no more for a session."""
        with self._lock:
            self._sessions.discard(session)

    def close(self) -> None:
        """Let all leave, and end the thread."""
        if not self._owner.here:
            return
        self._closed.set()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def _run(self) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            with self._lock:
                sessions = list(self._sessions)
                if not sessions:
                    self._thread = None
                    return
            pause = min(session.lease for session in sessions) / BEATS
            while sessions:
                sessions.pop().beat()
