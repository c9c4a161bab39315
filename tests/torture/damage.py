"""`python -m tests.torture.damage`: bits of a data directory flip, files end early, and a server starts on that.

It must have a set as it was, or as it was after an earlier event and then say so, or not have it at all and say so, too; then
the files are kept and the id is refused. It is never another set. Silence is right where nothing was lost that anybody needs: a
checkpoint or a segment that was not read since there are newer ones, the zeros that a segment was reserved with, and what the
header of a safetensors file says for people.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from structlog.testing import capture_logs
from tests.torture.disk import Files, below, put
from tests.torture.machine import SETS, Machine, Print, fingerprint, small_journals

from optserve import ParameterSetExists
from optserve._specification import Journal
from optserve_server.storage import checkpoint
from optserve_server.storage.checkpoint import CURRENT, MANIFEST, PREFIX

EXCEPT = ("LOCK", "OWNER")  # which say nothing of sets


@dataclass(frozen=True)
class Victim:
    """What a killed server left of a set, and what the set was after each event, of which the `last` can be had again.

    With `reserve`, the newest checkpoint is damaged already. If it `was_lost`, something is wrong with the server.
    """

    kind: str
    files: Files
    prints: Mapping[int, Print]
    last: int
    reserve: bool
    was_lost: bool


@dataclass(frozen=True)
class Damage:
    """A bit of a file that is flipped, or the place where it ends."""

    path: str
    place: int
    bit: int | None

    def apply(self, files: Files) -> Files:
        """The files with it."""
        data = bytearray(files[self.path] or b"")
        if self.bit is None:
            del data[self.place :]
        else:
            data[self.place] ^= 1 << self.bit
        return files | {self.path: bytes(data)}

    def __str__(self) -> str:
        return f"{self.path} {'ends at' if self.bit is None else f'has bit {self.bit} flipped in'} byte {self.place}"


def victim(kind: str, root: Path, *, reserve: bool) -> Victim:
    """A set that was pushed to, changed and checkpointed, and whose server was killed."""
    machine = Machine(root)
    machine.create(kind)
    prints = {0: fingerprint(machine.state(kind))}

    def note() -> None:
        print = fingerprint(machine.state(kind))
        prints[print.event] = print

    for seed in range(12):
        machine.push(kind, seed)
        note()
        if seed % 4 == 1:
            machine.update(kind, 0.01 + seed / 1000)
            note()
        if seed in (3, 8):
            machine.checkpoint(kind)
    if SETS[kind]["journal"] is Journal.OFF:
        machine.checkpoint(kind)
    newest, *older = checkpoint.present(machine.directory.keepers[0].home)
    assert older, "expected two checkpoints at least"
    if reserve:
        (newest / MANIFEST).write_bytes(b"")
    machine.die()
    files = below(root)
    last = max(prints)
    if reserve and SETS[kind]["journal"] is Journal.OFF:
        last = checkpoint.event_of(older[0])
    again = Machine(root)
    was_lost = kind not in again.sets() or again.state(kind).events != last
    again.abandon()
    return Victim(kind, files, prints, last, reserve, was_lost)


def chosen(chance: random.Random, files: Files) -> Damage:
    """Any damage of any file, of which the bytes that are used are hit often enough."""
    path = chance.choice([path for path, data in sorted(files.items()) if data and not path.endswith(EXCEPT)])
    data = files[path]
    assert data is not None
    used = len(data.rstrip(b"\0")) if chance.random() < 0.7 else len(data)
    place = chance.randrange(max(1, min(used + 64, len(data))))
    return Damage(path, place, chance.randrange(8) if chance.random() < 0.75 else None)


def outcome(victim: Victim, damage: Damage, root: Path) -> str:
    """What becomes of a set with some damage, in a word; raises AssertionError if that is not as it should be."""
    put(damage.apply(victim.files), root)
    with capture_logs() as logs:
        machine = Machine(root)
    levels = {each["log_level"] for each in logs}
    try:
        if victim.kind not in machine.sets():
            _check_refused(machine, victim.kind)
            assert "error" in levels, "refused without a word"
            return "refused"
        found = fingerprint(machine.state(victim.kind))
        assert found == victim.prints.get(found.event), f"after {found.event} events it is not what it was then"
        loud = bool(levels & {"warning", "error"})
        if found.event < victim.last:
            assert loud, f"{victim.last - found.event} events are lost without a word"
            _check_loss(victim, damage, found.event)
            return "earlier"
        assert loud or _is_needless(victim, damage), "not seen"
        return "complete" if loud else "complete, in silence"
    finally:
        machine.abandon()


def _check_refused(machine: Machine, kind: str) -> None:
    try:
        machine.create(kind)
    except ParameterSetExists:
        return
    raise AssertionError("it is gone, and its id is free")


def _check_loss(victim: Victim, damage: Damage, event: int) -> None:
    """Only the end of a journal may be lost, of which nothing knows that it was stored; or what a checkpoint alone had.

    A last segment that was cut looks as one does that was to grow when power was lost.
    """
    journal = SETS[victim.kind]["journal"]
    if journal is Journal.OFF:
        assert PREFIX in damage.path, "lost, though no checkpoint is damaged"
    else:
        assert "journal-" in damage.path, "lost, though the journal is sound"
    if journal is Journal.ALWAYS and damage.bit is not None:
        assert victim.last - event == 1, f"{victim.last - event} events are lost; later ones knew that they were stored"


def _is_needless(victim: Victim, damage: Damage) -> bool:
    """Whether nothing is needed of the bytes that are damaged."""
    data = victim.files[damage.path]
    assert data is not None
    changed = data[damage.place :] if damage.bit is None else data[damage.place : damage.place + 1]
    newest = max(path for path in victim.files if path.endswith(MANIFEST)).removesuffix(MANIFEST)
    if "journal-" in damage.path:
        was_not_read = max(path for path in victim.files if "journal-" in path) != damage.path
        return was_not_read or not changed.strip(b"\0")
    if not damage.path.startswith(newest):  # which was not read either
        return not damage.path.endswith(CURRENT)
    if damage.path.endswith(MANIFEST):
        return not changed.strip(b"\n")
    return data.find(b'"__metadata__"') <= damage.place <= data.find(b"}")


def damages(count: int, seed: int, directory: Path) -> Counter[str]:
    """Do that much damage, each by itself; what became of it. Raises AssertionError with what it takes to do it again."""
    found: Counter[str] = Counter()
    chance = random.Random(seed)
    with small_journals():
        with capture_logs():
            victims = [
                victim(kind, directory / f"{kind}-{reserve}", reserve=reserve)
                for kind in SETS
                for reserve in (False, True)
            ]
        for each in victims:
            assert not each.was_lost, f"{each.kind} can't be had again, though one checkpoint at most is damaged"
        for number in range(count):
            each = victims[number % len(victims)]
            damage = chosen(chance, each.files)
            root = directory / "damaged"
            try:
                found[outcome(each, damage, root)] += 1
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, damage {number}, of {each.kind}: {damage}: {error}") from error
            shutil.rmtree(root)
    return found


def main() -> None:
    """Exits with 1 if damage is not dealt with as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.damage", description=__doc__)
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="optserve-damage-") as directory:
        found = damages(arguments.damages, arguments.seed, Path(directory))
    print(f"{arguments.damages} times damaged, {time.monotonic() - began:.0f} s: {dict(found)}")


if __name__ == "__main__":
    sys.exit(main())
