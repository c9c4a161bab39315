"""`python -m tests.torture.failpoints`: a server fails at one place, in every way, and what it promised holds.

A failpoint is a call of one of the server's functions, which is wrapped from outside. A script is played with it, and what
each step leads to is known from a run without faults. A process that ends there leaves a directory from which another goes on
as if nothing had been: with the step in the middle of which it ended done, or not done, and never half. One that goes on after
an error says so, and has changed nothing, or knows what it has changed. Steps are tried again, by the rules for workers, and
all leads to the same bits in the end.
"""

import argparse
import errno
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from structlog.testing import capture_logs
from tests.torture.machine import Machine, Print, fingerprint, small_journals

from optserve import ServerError, StorageFailed
from optserve_server.engine import update
from optserve_server.engine.buffers import Buffers
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.sessions import Session
from optserve_server.storage import checkpoint, events, files
from optserve_server.storage.checkpoint import Draft, Shadow
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.files import File
from optserve_server.storage.journal import Journal
from optserve_server.storage.keeper import Keeper

ENDED = 77  # status of a process that ended at its failpoint
DELAY = 0.005  # seconds
MOST_ATTEMPTS = 4

Prints = dict[str, Print]


@dataclass(frozen=True)
class Point:
    """A call of a function: which one, whether before or after it; `nth` counts calls about a path, or by a caller."""

    owner: Any
    function: str
    when: str = "before"
    about: str = ""
    by: str = ""
    nth: int = 1

    @property
    def actions(self) -> Sequence[str]:
        """What can happen there."""
        if self.owner not in (files, File):
            return "exit", "delay", "error"
        writes = ("short", "torn") if (self.owner, self.function, self.when) == (File, "write", "before") else ()
        return "exit", "delay", "EIO", "ENOSPC", *writes

    def is_meant(self, arguments: Sequence[Any], caller: str) -> bool:
        """Whether a call counts."""
        if self.by not in ("", caller):
            return False
        paths = [getattr(each, "path", each) for each in arguments]
        return not self.about or any(self.about in str(each) for each in paths if isinstance(each, Path))


POINTS = {
    "a push, before it is admitted": Point(Session, "admit", nth=2),
    "a push, after it was admitted": Point(Session, "admit", "after", nth=2),
    "an event, before it is encoded": Point(events, "encode", nth=2),
    "an event, before it is appended": Point(Journal, "append", nth=2),
    "an event, after it was appended": Point(Journal, "append", "after", nth=2),
    "a journal, before it grows": Point(File, "reserve", about="journal-", by="append"),
    "a journal, after it has grown": Point(File, "reserve", "after", about="journal-", by="append"),
    "an event, before it is written": Point(File, "write", about="journal-", by="append", nth=2),
    "an event, after it was written": Point(File, "write", "after", about="journal-", by="append", nth=2),
    "a journal, before it is synced": Point(File, "sync", about="journal-", by="_sync", nth=2),
    "a journal, after it was synced": Point(File, "sync", "after", about="journal-", by="_sync", nth=2),
    "a journal, before its name is synced": Point(files, "sync_directory", by="_sync"),
    "a journal, after its name was synced": Point(files, "sync_directory", "after", by="_sync"),
    "a segment, before there is room for it": Point(File, "reserve", about="journal-", by="_begin", nth=2),
    "a segment, before its header is written": Point(File, "write", about="journal-", by="_begin", nth=2),
    "a segment, before it is synced": Point(File, "sync", about="journal-", by="_begin", nth=2),
    "a segment, before it gets its name": Point(files, "rename", about="journal-", nth=2),
    "a segment, after it got its name": Point(files, "rename", "after", about="journal-", nth=2),
    "an update, before it runs": Point(ParameterSet, "_run", nth=2),
    "an update, in the middle": Point(Buffers, "publish", nth=2),
    "an update, before its loops": Point(update, "run", nth=2),
    "an update, after it ran": Point(ParameterSet, "_run", "after", nth=2),
    "a round, before its gradients are gathered": Point(ParameterSet, "_gather", nth=9),
    "a session, before it records a push": Point(Session, "record", nth=2),
    "a session, after it recorded a push": Point(Session, "record", "after", nth=2),
    "an acknowledgement, before it may be given": Point(Journal, "wait", nth=4),
    "an acknowledgement, before it is given": Point(ParameterSet, "_told", nth=2),
    "a checkpoint, before its draft": Point(Draft, "__init__", nth=2),
    "a checkpoint, before its directory is made": Point(files, "make_directory", about="checkpoint-", nth=2),
    "a checkpoint, after its directory was made": Point(files, "make_directory", "after", about="checkpoint-", nth=2),
    "a checkpoint, before a file is made": Point(File, "__init__", about=".safetensors", nth=5),
    "a checkpoint, before the state is copied": Point(Shadow, "copies", nth=2),
    "a checkpoint, after the state was copied": Point(Shadow, "copies", "after", nth=2),
    "a checkpoint, before elements are written": Point(File, "write", about=".safetensors", nth=8),
    "a checkpoint, before a file is synced": Point(File, "sync", about=".safetensors", nth=5),
    "a checkpoint, after a file was synced": Point(File, "sync", "after", about=".safetensors", nth=5),
    "a checkpoint, before its manifest is written": Point(File, "write", about="manifest", nth=2),
    "a checkpoint, before its manifest is synced": Point(File, "sync", about="manifest", nth=2),
    "a checkpoint, before its names are synced": Point(files, "sync_directory", by="publish", nth=3),
    "a checkpoint, before it gets its name": Point(files, "rename", about="checkpoint-", by="publish", nth=2),
    "a checkpoint, after it got its name": Point(files, "rename", "after", about="checkpoint-", by="publish", nth=2),
    "a checkpoint, before its name is synced": Point(files, "sync_directory", by="publish", nth=4),
    "a checkpoint, after its name was synced": Point(files, "sync_directory", "after", by="publish", nth=4),
    "CURRENT, before it is written": Point(File, "write", about="CURRENT", nth=2),
    "CURRENT, before it is synced": Point(File, "sync", about="CURRENT", nth=2),
    "CURRENT, before it gets its name": Point(files, "rename", about="CURRENT", nth=2),
    "CURRENT, after it got its name": Point(files, "rename", "after", about="CURRENT", nth=2),
    "old checkpoints, before they are removed": Point(files, "remove_directory", by="_remove_old"),
    "old checkpoints, after they were removed": Point(files, "remove_directory", "after", by="_remove_old"),
    "old checkpoints, in the middle": Point(files, "sync_directory", "after", by="remove_directory"),
    "old segments, before they are removed": Point(files, "remove", by="remove_before"),
    "old segments, after they were removed": Point(files, "remove", "after", by="remove_before"),
    "a rewind, before the set is retired": Point(ParameterSet, "retire"),
    "a rewind, before the journal goes on": Point(Journal, "skip"),
    "a rewind, after the journal went on": Point(Journal, "skip", "after"),
    "a rewind, before its checkpoint": Point(Draft, "__init__", nth=5),
    "a rewind, before its checkpoint gets its name": Point(files, "rename", about="checkpoint-", by="publish", nth=5),
    "a rewind, after its checkpoint got its name": Point(
        files, "rename", "after", about="checkpoint-", by="publish", nth=5
    ),
    "a rewind, before the name is synced": Point(files, "sync_directory", by="publish", nth=10),
    "a creation, before a directory is made": Point(files, "make_directory", by="add", nth=2),
    "a creation, after a directory was made": Point(files, "make_directory", "after", by="add", nth=2),
    "a creation, before the name is synced": Point(files, "sync_directory", by="add", nth=2),
    "a creation, before its first checkpoint": Point(Draft, "__init__", nth=6),
    "a deletion, before it begins": Point(Keeper, "delete"),
    "a deletion, before the name is synced": Point(files, "sync_directory", by="remove_directory", nth=4),
    "a deletion, after it was done": Point(Keeper, "delete", "after"),
    "a start, before the owner is written": Point(File, "write", about="OWNER"),
    "a start, after the owner was synced": Point(File, "sync", "after", about="OWNER"),
    "a start, before sets are restored": Point(DataDirectory, "restore"),
    "a start, before a checkpoint is read": Point(checkpoint, "read", nth=2),
    "a start, before elements are read": Point(checkpoint, "fill", nth=2),
    "a start, before an event is repeated": Point(ParameterSet, "repeat", nth=2),
    "a start, after an event was repeated": Point(ParameterSet, "repeat", "after", nth=2),
    "a start, before a journal that was read is synced": Point(files, "sync", by="__init__"),
    "a stop, before its checkpoints": Point(DataDirectory, "close"),
}


@dataclass(frozen=True)
class Step:
    """A step of the script; one that can be tried again `by_sequence` may have been done."""

    says: str
    do: Callable[[Machine], Machine | None]
    by_sequence: bool = False


def script() -> list[Step]:
    """What is done."""
    sequences: dict[str, Iterator[int]] = {}

    def push(kind: str, *, bad: bool = False) -> Step:
        sequence = next(sequences.setdefault(kind, itertools.count(1)))
        return Step(
            f"push {sequence} to {kind}",
            lambda machine: machine.push(kind, sequence, bad=bad, sequence=sequence) and None,
            by_sequence=True,
        )

    def step(method: str, *arguments: Any) -> Step:
        return Step(f"{method} {arguments}", lambda machine: getattr(machine, method)(*arguments))

    adam = "adam-always"
    return [
        step("create", adam), *(push(adam) for _ in range(3)), step("update", adam, 0.02), push(adam, bad=True),
        step("checkpoint", adam), push(adam), push(adam), step("checkpoint", adam), push(adam), step("checkpoint", adam),
        step("rewind", adam, 5), push(adam), step("create", "rounds"), push("rounds"), push("rounds"),
        step("create", "accumulated"), push("accumulated"), push("accumulated"), step("delete", "accumulated"),
        Step("stop, and start again", restarted_after_stop), push(adam), push("rounds"),
        Step("be killed, and start again", restarted), push(adam), step("checkpoint", adam), push(adam),
    ]  # fmt: skip


def restarted_after_stop(machine: Machine) -> Machine:
    machine.stop()
    return Machine(machine.path)


def restarted(machine: Machine) -> Machine:
    machine.die()
    return Machine(machine.path)


def prints(machine: Machine) -> Prints:
    """What all sets are; raises ServerError if one is unusable."""
    assert not machine.directory._kept, f"refused: {machine.directory._kept}"
    return {kind: fingerprint(machine.state(kind), everywhere=True) for kind in machine.sets()}


class Fault:
    """What happens at a failpoint, once."""

    def __init__(self, point: Point, action: str) -> None:
        self.was_hit = False
        self._point = point
        self._action = action
        self._calls = itertools.count(1)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let it happen."""
        original = getattr(self._point.owner, self._point.function)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code.co_name
            hit = self._point.is_meant(arguments, caller) and next(self._calls) == self._point.nth
            if not hit:
                return original(*arguments, **options)
            self.was_hit = True
            if self._action in ("short", "torn"):
                with mock.patch.object(files, "_write", self._written_in_part(files._write)):
                    return original(*arguments, **options)
            if self._point.when == "before":
                self._happen()
                return original(*arguments, **options)
            result = original(*arguments, **options)
            self._happen()
            return result

        with mock.patch.object(self._point.owner, self._point.function, wrapped):
            yield

    def _happen(self) -> None:
        match self._action:
            case "exit":
                os._exit(ENDED)
            case "delay":
                time.sleep(DELAY)
            case "error":
                raise MemoryError("injected")
            case name:
                raise OSError(getattr(errno, name), f"injected {name}")

    def _written_in_part(self, write: Callable[..., int]) -> Callable[..., int]:
        calls = itertools.count(1)

        def in_part(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
            if next(calls) == 1:
                return write(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)
            if self._action == "torn":
                raise OSError(errno.EIO, "injected EIO")
            return write(descriptor, buffers, offset)

        return in_part


def expected(root: Path) -> list[Prints]:
    """What the sets are after each step of a run without faults; before the first, they are none."""
    machine, found = Machine(root), [{}]
    for step in script():
        machine = step.do(machine) or machine
        found.append(prints(machine))
    machine.abandon()
    return found


def play(machine: Machine, known: Sequence[Prints], first: int, *, faulty: bool) -> None:
    """Do the steps from one on, and try again what fails."""
    path = machine.path
    for number, step in [*enumerate(script())][first:]:
        for attempt in itertools.count(1):
            if not step.by_sequence and prints(machine) == known[number + 1] != known[number]:
                break  # done, though nobody was told
            try:
                machine = step.do(machine) or machine
                break
            except (StorageFailed, ServerError, OSError, MemoryError) as error:
                if not faulty or attempt == MOST_ATTEMPTS:
                    raise AssertionError(f"{step.says}: {error}") from error
            if not _goes_on(machine, known[number : number + 2]) or attempt > 1:
                machine.die()
                machine = Machine(path)
                assert prints(machine) in known[number : number + 2], f"{step.says}: half done after a restart"
        if machine.directory._kept:  # what could not be restored may be the next time
            machine.die()
            machine = Machine(path)
        assert prints(machine) == known[number + 1], f"{step.says}: did not lead to where it leads"
    machine.die()
    machine = Machine(path)
    assert prints(machine) == known[-1], "another state after a restart"
    machine.abandon()


def _goes_on(machine: Machine, known: Sequence[Prints]) -> bool:
    """Whether a server goes on after an error: if so, with what was before or after a step."""
    if machine.directory._lock.closed or machine.directory._kept:
        return False
    try:
        assert prints(machine) in known, "half done"
    except ServerError:  # it knows that it is unusable
        return False
    return True


def check(point: Point, action: str, root: Path, known: Sequence[Prints]) -> None:
    """Raises AssertionError if a promise is broken, or the failpoint never hit."""
    if action == "exit":
        done = _played_to_the_end_of_a_process(point, root)
        machine = Machine(root)
        assert prints(machine) in known[done : done + 2], "half done"
        play(machine, known, done, faulty=False)
        return
    fault = Fault(point, action)
    machine = Machine(root)
    with fault.installed():
        play(machine, known, 0, faulty=action not in ("delay", "short"))
    assert fault.was_hit, "never hit"


def _played_to_the_end_of_a_process(point: Point, root: Path) -> int:
    """Play in a process that ends at the failpoint; how many steps were done."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            machine = Machine(root)
            with Fault(point, "exit").installed():
                for step in script():
                    machine = step.do(machine) or machine
                    os.write(there, b".")
        finally:
            os._exit(0)
    os.close(there)
    _, status = os.waitpid(child, 0)
    with os.fdopen(here, "rb") as told:
        done = len(told.read())
    assert os.waitstatus_to_exitcode(status) == ENDED, "never hit"
    return done


def run(names: Sequence[str], directory: Path) -> Iterator[tuple[str, str, str | None]]:
    """Every action at every one of some failpoints, and what is wrong with it, if anything."""
    with small_journals(), capture_logs(), mock.patch.multiple(os, fsync=lambda _: None, fdatasync=lambda _: None):
        known = expected(directory / "expected")
        for number, name in enumerate(names):
            for action in POINTS[name].actions:
                try:
                    check(POINTS[name], action, directory / f"{number}-{action}", known)
                except Exception as error:
                    yield name, action, f"{type(error).__name__}: {error}"
                else:
                    yield name, action, None


def main() -> int:
    """Exits with 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.failpoints", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of failpoints; by default all")
    arguments = parser.parse_args()
    began, count, wrong = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="optserve-failpoints-") as directory:
        for name, action, failure in run(arguments.names or [*POINTS], Path(directory)):
            count += 1
            if failure is not None:
                wrong += 1
                print(f"{name}: {action}: {failure}", flush=True)
    points = len(arguments.names or POINTS)
    print(f"{points} failpoints, {count} faults, {time.monotonic() - began:.0f} s: {wrong} broke a promise")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
