"""`python -m tests.torture.power_loss`: what a loss of power may leave of a disk, and what a server makes of that.

Sets are pushed to, changed, checkpointed, rewound and deleted, and their server is stopped or killed and started again, while
all that it does to files is recorded. For a moment of it, an image is made of what a loss of power might have left then.
A server that starts on it must have every set up to the last event that anybody was told is durable, or a later one, with the
very bits and receipts that the set had after that event. Some go on from there, and lose power again.
"""

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from structlog.testing import capture_logs
from tests.torture.disk import Chance, Files, Mark, Recorder, left, put
from tests.torture.machine import SETS, Clock, Machine, Print, fingerprint, small_journals

from optserve import Durability, VersionNotKept
from optserve._specification import Journal
from optserve_server.engine.parameter_set import ParameterSet

STEPS, IMAGES = 25, 50  # of a run, and images made of its record
AGAIN = 0.05  # of the images are where another run begins
STEPS_AGAIN, IMAGES_AGAIN = 8, 5


class Life(NamedTuple):
    """A set from its creation to its deletion; others of its id may have been before, and may come after."""

    set_id: str
    created: str


class Created(NamedTuple):
    """The creation of a set was acknowledged."""

    life: Life


class Durable(NamedTuple):
    """Somebody was told that all up to an event is on stable storage."""

    life: Life
    event: int


class Deleted(NamedTuple):
    """A set is to be deleted, or that was `done`."""

    life: Life
    done: bool


class Seen(NamedTuple):
    """What a set was after an event."""

    life: Life
    print: Print


class Started(NamedTuple):
    """A server came up, and had these sets after so many events."""

    events: dict[Life, int]


@dataclass
class Known:
    """What is known of sets at some moment: what they were after each event, what was said to be durable, what is gone."""

    prints: dict[Life, dict[int, Print]] = field(default_factory=dict)
    created: set[Life] = field(default_factory=set)
    durable: dict[Life, int] = field(default_factory=dict)
    going: set[Life] = field(default_factory=set)
    gone: set[Life] = field(default_factory=set)

    def copy(self) -> "Known":
        """The same, to go on from."""
        prints = {life: each.copy() for life, each in self.prints.items()}
        return Known(prints, self.created.copy(), self.durable.copy(), self.going.copy(), self.gone.copy())

    def learn(self, says: Any) -> None:
        """Add what somebody was told."""
        match says:
            case Created(life):
                self.created.add(life)
            case Durable(life, event):
                self.durable[life] = max(event, self.durable.get(life, 0))
            case Deleted(life, done):
                (self.gone if done else self.going).add(life)
            case Seen(life, print):
                known = self.prints.setdefault(life, {}).setdefault(print.event, print)
                assert known == print, f"{life.set_id}: event {print.event} led to two states"
            case Started(events):  # what came later is no part of history any more
                for life, prints in self.prints.items():
                    self.prints[life] = {event: each for event, each in prints.items() if event <= events.get(life, -1)}

    def check(self, machine: Machine, logs: Sequence[Any]) -> dict[Life, Print]:
        """Raises AssertionError if a server has not what it should have after a loss of power; else what it has."""
        assert not machine.directory._kept, f"refused: {machine.directory._kept}"
        assert not (errors := [log for log in logs if log["log_level"] == "error"]), errors
        present = {life_of(each): fingerprint(each.capture()) for each in machine.sets().values()}
        for life, print in present.items():
            assert life not in self.gone, f"{life.set_id} was deleted, and is there again"
            assert print.event >= self.durable.get(life, 0), (
                f"{life.set_id}: {self.durable[life]} events were said to be durable, {print.event} are left"
            )
            expected = self.prints.get(life, {}).get(print.event)
            assert print == expected, f"{life.set_id}: after {print.event} events it is not what it was then"
        for life in self.created - self.going - present.keys():
            has_journal = SETS[life.set_id]["journal"] is not Journal.OFF
            promised = has_journal or life in self.durable
            assert not promised, f"{life.set_id} is lost"
        return present


class Run:
    """A machine that is used at random, and the record of that."""

    def __init__(self, root: Path, chance: random.Random, clock: Clock, known: Known, kinds: Sequence[str]) -> None:
        self.recorder = Recorder(root)
        self.kinds = kinds
        self.began = known.copy()
        self._known = known.copy()
        self._path = root / "data"
        self._chance = chance
        self._clock = clock
        self._seed = chance.randrange(1 << 20) * 1000
        self._last: dict[str, tuple[int, list[int]]] = {}  # seed of a set's last push, and its sequences

    def play(self, steps: int) -> None:
        """Start on what there is, and do things."""
        actions = self._actions()
        with self.recorder.recording(), _noting(self._tell):
            machine = self._start()
            for kind in self.kinds:
                if kind not in machine.sets():
                    self._create(machine, kind)
            for _ in range(steps):
                action = self._chance.choices([*actions], [*actions.values()])[0]
                kind = self._chance.choice(self.kinds)
                machine = action(machine, kind) or machine
                self._see(machine)
            machine.die()
            self.recorder.die()
        self.recorder.check()

    def image(self, point: int) -> tuple[Files, Known]:
        """What a loss of power after so many entries may leave, and what was known by then."""
        record = self.recorder.record
        known = self.began.copy()
        for place, entry in enumerate(record):
            if not isinstance(entry, Mark):
                continue
            if place < point or isinstance(entry.says, Seen):  # an event may be on disk before anybody has seen it
                known.learn(entry.says)
            elif isinstance(entry.says, Started):
                break
        return left(self.recorder.top, record, point, Chance(self._chance)), known

    def _actions(self) -> dict[Callable[[Machine, str], Machine | None], int]:
        return {
            self._push: 40,
            self._push_in_a_new_session: 3,
            self._push_again: 5,
            self._push_wrong: 4,
            self._update: 5,
            self._wait: 8,
            self._checkpoint: 10,
            self._rewind: 3,
            self._delete: 2,
            self._stop: 3,
            self._kill: 5,
        }

    def _tell(self, says: Any) -> None:
        self._known.learn(says)
        self.recorder.mark(says)

    def _see(self, machine: Machine) -> None:
        for each in machine.sets().values():
            self._tell(Seen(life_of(each), fingerprint(each.capture())))

    def _start(self) -> Machine:
        with capture_logs() as logs:
            machine = Machine(self._path)
        present = self._known.check(machine, logs)
        self._tell(Started({life: print.event for life, print in present.items()}))
        return machine

    def _create(self, machine: Machine, kind: str) -> None:
        machine.create(kind)
        self._see(machine)
        self._tell(Created(life_of(machine.sets()[kind])))

    def _push(self, machine: Machine, kind: str, epoch: int = -1) -> None:
        self._seed += 1
        self._pushed(machine, kind, machine.push(kind, self._seed, epoch=epoch))
        self._last[kind] = self._seed, _sequences(machine, kind)

    def _push_in_a_new_session(self, machine: Machine, kind: str) -> None:
        self._push(machine, kind, epoch=0)

    def _push_again(self, machine: Machine, kind: str) -> None:
        seed, sequences = self._last.get(kind, (0, []))
        if sequences and _sequences(machine, kind) == sequences:
            receipts = machine.push(kind, seed, again=True)
            assert all(each.duplicate for each in receipts)
            self._pushed(machine, kind, receipts)

    def _pushed(self, machine: Machine, kind: str, receipts: Sequence[Any]) -> None:
        parameter_set = machine.sets()[kind]
        durable = [each.durability for each in receipts]
        if SETS[kind]["journal"] is Journal.ALWAYS:
            assert Durability.MEMORY not in durable, f"{kind}: acknowledged, and in memory only"
        if Durability.MEMORY not in durable:
            events = [session.last_event for session in machine.state(kind).sessions]
            self._tell(Durable(life_of(parameter_set), max(events)))

    def _push_wrong(self, machine: Machine, kind: str) -> None:
        if kind != "rounds":
            self._pushed(machine, kind, machine.push(kind, self._seed, bad=True))
            self._last.pop(kind, None)

    def _update(self, machine: Machine, kind: str) -> None:
        machine.update(kind, self._chance.uniform(0.001, 0.1))

    def _wait(self, machine: Machine, kind: str) -> None:
        self._clock.now += 0.6
        machine.sync()

    def _checkpoint(self, machine: Machine, kind: str) -> None:
        machine.checkpoint(kind)

    def _rewind(self, machine: Machine, kind: str) -> None:
        with contextlib.suppress(VersionNotKept):
            machine.rewind(kind, self._chance.randint(0, machine.sets()[kind].position.version))

    def _delete(self, machine: Machine, kind: str) -> None:
        life = life_of(machine.sets()[kind])
        self._tell(Deleted(life, done=False))
        machine.delete(kind)
        self._tell(Deleted(life, done=True))
        self._last.pop(kind, None)
        self._create(machine, kind)

    def _stop(self, machine: Machine, kind: str) -> Machine:
        machine.stop()
        return self._restarted()

    def _kill(self, machine: Machine, kind: str) -> Machine:
        machine.die()
        self.recorder.die()
        return self._restarted()

    def _restarted(self) -> Machine:
        machine = self._start()
        for kind in self.kinds:
            if kind not in machine.sets():  # it never had a checkpoint
                self._create(machine, kind)
        return machine


def life_of(parameter_set: ParameterSet) -> Life:
    """The life that a set is in."""
    return Life(parameter_set.spec.id, parameter_set.create_time.isoformat())


@contextmanager
def _noting(tell: Callable[[Any], None]) -> Iterator[None]:
    """Note what a set is told of stable storage."""
    stored = ParameterSet.stored

    def noted(self: ParameterSet, what: Any) -> None:
        tell(Durable(life_of(self), what.number))
        stored(self, what)

    with mock.patch.object(ParameterSet, "stored", noted):
        yield


def _sequences(machine: Machine, kind: str) -> list[int]:
    return sorted(each.last_sequence for each in machine.state(kind).sessions)


def images(count: int, seed: int, directory: Path) -> int:
    """Make images, and check each; how many there were. Raises AssertionError with what it takes to make that one again."""
    made = 0
    for number in itertools.count():
        chance = random.Random(f"{seed}/{number}")
        kinds = chance.sample([*SETS], 2)
        try:
            made += _images(min(count - made, IMAGES), directory / str(number), chance, kinds, Known(), {}, STEPS)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, run {number}, {kinds}: {error}") from error
        if made >= count:
            return made
    return made


def _images(
    count: int, root: Path, chance: random.Random, kinds: Sequence[str], known: Known, files: Files, steps: int
) -> int:
    """Run from an image of a disk, make so many others of that, and check them."""
    put(files, root)
    with small_journals() as clock, capture_logs():
        run = Run(root, chance, clock, known, kinds)
        run.play(steps)
    made = 0
    while made < count:
        files, known = run.image(chance.randint(0, len(run.recorder.record)))
        again = root / f"image-{made}"
        made += 1
        put(files, again)
        with small_journals(), capture_logs() as logs:
            machine = Machine(again / "data")
            present = known.check(machine, logs)
            machine.abandon()
        if files and steps == STEPS and chance.random() < AGAIN:
            known.learn(Started({life: print.event for life, print in present.items()}))
            made += _images(IMAGES_AGAIN, root / f"again-{made}", chance, kinds, known, files, STEPS_AGAIN)
    return made


def main() -> None:
    """Exits with 1 if an image is not recovered from as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.power_loss", description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="optserve-power-") as directory:
        made = images(arguments.images, arguments.seed, Path(directory))
    print(f"{made} images of disks after a loss of power, {time.monotonic() - began:.0f} s: all recovered from")


if __name__ == "__main__":
    sys.exit(main())
