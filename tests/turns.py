"""Threads that take turns under a clock that stands still, so that what they do depends on nothing but who goes on when.

A `Stage` takes the place of the time, and of the conditions and events that a parameter set waits for. Its tasks are threads
of which one runs at a time, from when it is told to until it waits, pauses or ends.
"""

import enum
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import pytest

from optserve_server.engine import barrier, members, parameter_set, rounds, sessions

TIMED = (barrier, members, parameter_set, rounds, sessions)
PATIENCE = 60.0  # real seconds in which a task comes to an end or a wait
MOST_LOOKS = 10_000  # at the clock without waiting


class Progress(enum.Enum):
    """What a task is about to do."""

    READY = "ready"
    WAITS = "waits"
    DONE = "done"


class Task:
    """One thread. `until` is when it goes on although nobody woke it."""

    def __init__(self, stage: "Stage", call: Callable[[], Any]) -> None:
        self.progress = Progress.READY
        self.until = math.inf
        self.result: Any = None
        self.error: BaseException | None = None
        self._stage = stage
        self._call = call
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.progress is Progress.DONE

    def advance(self) -> None:
        """Let it run until it waits or ends."""
        assert self.progress is Progress.READY
        stage = self._stage
        stage.current, stage.looks = self, 0
        self._turn.release()
        assert stage.turn.acquire(timeout=PATIENCE), "a task neither waits nor ends"
        stage.current = None

    def give_way(self, progress: Progress, until: float = math.inf) -> None:
        """Called by the task itself: let others run until it is told to go on."""
        self.progress, self.until = progress, until
        self._stage.turn.release()
        self._turn.acquire()
        if self._stage.over:
            raise SystemExit

    def end(self) -> None:
        """Let its thread end, wherever it is."""
        self._turn.release()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stage.over:
                self.result = self._call()
        except BaseException as error:
            self.error = error
        self.progress = Progress.DONE
        self._stage.turn.release()


class Condition:
    """A `threading.Condition` of which only tasks wait."""

    def __init__(self, stage: "Stage", lock: threading.Lock) -> None:
        self._stage = stage
        self._lock = lock
        self._waiting: list[Task] = []

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading`; the lock is free meanwhile."""
        task = self._stage.current
        assert task is not None
        self._waiting.append(task)
        self._lock.release()
        try:
            task.give_way(Progress.WAITS, math.inf if timeout is None else self._stage.now + timeout)
        finally:
            self._lock.acquire()
        self._waiting = [each for each in self._waiting if each is not task]
        return True

    def notify_all(self) -> None:
        """Let all go on that wait."""
        for task in self._waiting:
            if task.progress is Progress.WAITS:
                task.progress = Progress.READY


class Event:
    """A `threading.Event` that one task waits for."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self._set = False
        self._waiting: Task | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading`."""
        self._waiting = task = self._stage.current
        assert task is not None
        if not self._set:
            task.give_way(Progress.WAITS, math.inf if timeout is None else self._stage.now + timeout)
        return self._set

    def set(self) -> None:
        """Let it go on, or not wait at all."""
        self._set = True
        if self._waiting is not None and self._waiting.progress is Progress.WAITS:
            self._waiting.progress = Progress.READY

    def is_set(self) -> bool:
        """As that of `threading`."""
        return self._set


class Stage:
    """Tasks and their time, which is what modules of the engine see while a block lasts."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.current: Task | None = None
        self.looks = 0
        self.over = False
        self.turn = threading.Semaphore(0)
        self._tasks: list[Task] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for module in TIMED:
            self._patch.setattr(module, "time", self)
        waits = SimpleNamespace(
            Lock=threading.Lock, Condition=lambda lock: Condition(self, lock), Event=lambda: Event(self)
        )
        self._patch.setattr(parameter_set, "threading", waits)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over = True
        for task in self.unfinished:
            task.end()
        self._patch.undo()

    def monotonic(self) -> float:
        """The time, for modules that import `time`."""
        self.looks += 1
        assert self.looks < MOST_LOOKS, "a task looks at the clock again and again, and does not wait"
        return self.now

    def time_ns(self) -> int:
        """Likewise."""
        return round(self.now * 1e9)

    def begin(self, call: Callable[[], Any]) -> Task:
        """A task that is ready to run."""
        task = Task(self, call)
        self._tasks.append(task)
        return task

    def do(self, call: Callable[[], Any]) -> Any:
        """Run something that does not wait."""
        task = self.begin(call)
        task.advance()
        assert task.done, "waits"
        if task.error is not None:
            raise task.error
        return task.result

    def pause(self) -> None:
        """Called by a task: others may run first."""
        if self.current is not None:
            self.current.give_way(Progress.READY)

    @property
    def ready(self) -> list[Task]:
        """Tasks that could go on, in the order in which they began."""
        self._tasks = [each for each in self._tasks if not each.done]
        for task in self._tasks:
            if task.progress is Progress.WAITS and task.until <= self.now:
                task.progress = Progress.READY
        return [each for each in self._tasks if each.progress is Progress.READY]

    @property
    def unfinished(self) -> list[Task]:
        """Tasks that have not ended."""
        return [each for each in self._tasks if not each.done]

    def settle(self) -> None:
        """Let all tasks go on that can, until none can before time passes."""
        for _ in range(1_000):
            if not (ready := self.ready):
                return
            for task in ready:
                if task.progress is Progress.READY:
                    task.advance()
        raise AssertionError("tasks go on for ever, though no time passes")

    def pass_time(self, seconds: float) -> None:
        """Let time pass, from one timeout to the next."""
        end = self.now + seconds
        self.settle()
        while (due := min((task.until for task in self._tasks if not task.done), default=math.inf)) <= end:
            self.now = max(self.now, due)
            self.settle()
        self.now = end
