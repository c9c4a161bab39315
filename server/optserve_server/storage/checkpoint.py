"""Checkpoints: all of a set at one event, in a directory of its own that appears whole or not at all.

    checkpoint-<event>/manifest.json               everything but tensors, and what the other files must be
    checkpoint-<event>/parameters.safetensors      the parameters by name; then a file for each slot: exp_avg.safetensors, ...
    CURRENT                                        the name of the newest

A directory that has the final name is complete: its files and its names are on stable storage before it gets that.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from optserve._state import PARAMETERS
from optserve_server.engine.arena import aligned, padded
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.state import State
from optserve_server.storage import files, manifest, tensors
from optserve_server.storage.files import PAGE, File
from optserve_server.storage.manifest import Manifest
from optserve_server.storage.tensors import Damaged, Entry, Tensors, Writer

log = structlog.get_logger()

PREFIX = "checkpoint-"
CURRENT = "CURRENT"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
KEYS = "keys"  # the file with the keys of tables
WITHOUT_STATE = frozenset({PARAMETERS, KEYS})  # the files that a rule has no part in

LEAST_COPIED = 1 << 20  # bytes


class Stretch(NamedTuple):
    """Some of the elements of a file: from one byte to another."""

    writer: Writer
    begin: int
    end: int


class Shadow:
    """Memory that states are copied to, so that steps go on while they are written. Kept, since fresh memory takes 40 times as
    long to write to."""

    def __init__(self) -> None:
        self._memory = aligned(0)

    def reserve(self, nbytes: int) -> None:
        """Have that much, touched."""
        if self._memory.size < nbytes:
            self._memory = aligned(0)  # let go of the old before there is new
            self._memory = aligned(nbytes + 2 * PAGE)
            self._memory = self._memory[-self._memory.ctypes.data % PAGE :]
            self._memory.fill(0)

    def copies(self, stretches: list[Stretch]) -> list[tuple[Stretch, NDArray[np.uint8]]]:
        """The elements of stretches in this memory, each from a page on."""
        copied, begin = [], 0
        for stretch in stretches:
            target = self._memory[begin : begin + stretch.end - stretch.begin]
            stretch.writer.copy(stretch.begin, target)
            copied.append((stretch, target))
            begin += padded(target.size, PAGE)
        return copied


class Shared(NamedTuple):
    """A checkpoint from which a state was read that has not changed since: files of some arenas need not be written again."""

    path: Path
    described: Manifest
    names: Container[str]

    def entries(self, state: State) -> dict[str, Sequence[Entry]]:
        """Entries of the files that can be shared, by the arena's name."""
        present = _arrays(state)
        return {name: each for name, each in self.described.files.items() if name in self.names and name in present}


class Draft:
    """A checkpoint that is being written; raises OSError, and then it is as if it had never begun.

    What is `shared` gets another name, and is not written.
    """

    def __init__(self, home: Path, state: State, shared: "Shared | None" = None) -> None:
        self.state = state
        self._shared = shared.entries(state) if shared is not None else {}
        self.path = path_of(home, state.events)
        self._temporary = self.path.with_name(self.path.name + files.TEMPORARY)
        if self._temporary.exists():
            files.remove_directory(self._temporary)
        files.make_directory(self._temporary)
        self._writers: dict[str, Writer] = {}
        try:
            self._begin(shared)
        except BaseException:
            self.close()
            raise

    def _begin(self, shared: "Shared | None") -> None:
        for name in list(self._shared):
            assert shared is not None
            try:
                files.link(shared.path / f"{name}{SUFFIX}", self._temporary / f"{name}{SUFFIX}")
            except OSError:  # the other was removed since, or this file system has no links
                del self._shared[name]
        about = {"parameter_set": self.state.spec.id, "version": str(self.state.position.version)}
        for name, each in _arrays(self.state).items():
            if name not in self._shared:
                self._writers[name] = Writer(self._temporary / f"{name}{SUFFIX}", each, about)

    def batches(self, most: int) -> list[list[Stretch]]:
        """All elements, in the order in which they are written, at most so many bytes at a time; as many as can be at last."""
        batches: list[list[Stretch]] = [[]]
        most -= most % PAGE
        total = sum(padded(writer.nbytes, PAGE) for writer in self._writers.values())
        room = total % most or most
        for writer in self._writers.values():
            begin = 0
            while begin < writer.nbytes:
                if room == 0:
                    batches.append([])
                    room = most
                end = min(writer.nbytes, begin + room)
                batches[-1].append(Stretch(writer, begin, end))
                room -= padded(end - begin, PAGE)
                begin = end
        return batches

    def write(self, copies: list[tuple[Stretch, NDArray[np.uint8]]]) -> None:
        """Write some of them."""
        for stretch, data in copies:
            stretch.writer.write(stretch.begin, data)

    def close(self) -> None:
        """Close its files, and remove what was not published."""
        for writer in self._writers.values():
            writer.close()
        if self._temporary.exists():
            with contextlib.suppress(OSError):
                files.remove_directory(self._temporary)

    def publish(self, fence: Callable[[], None]) -> None:
        """Let it be the newest, durably, unless the fence raises."""
        entries = self._shared | {name: writer.finish() for name, writer in self._writers.items()}
        described = Manifest(replace(self.state, arenas={}), entries)
        with File(self._temporary / MANIFEST) as file:
            file.write([manifest.to_bytes(described)])
            file.sync()
        fence()
        publish(self._temporary, self.path)


def publish(temporary: Path, path: Path) -> None:
    """Let a directory whose files are synced be a set's newest checkpoint, durably."""
    files.sync_directory(temporary)
    if path.exists():  # of the same event, damaged
        files.remove_directory(path)
    files.rename(temporary, path)
    files.sync_directory(path.parent)
    try:
        files.write_file(path.parent / CURRENT, path.name.encode())
    except OSError as error:  # for people; each checkpoint is checked by itself
        log.error("CURRENT does not name the newest checkpoint", path=str(path), error=str(error))


def path_of(home: Path, event: int) -> Path:
    """Where the checkpoint after an event is."""
    return home / f"{PREFIX}{event:020d}"


def present(home: Path) -> list[Path]:
    """The checkpoints in a set's directory, the one that counts first, then the newest."""
    found = [path for path in home.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=event_of, reverse=True)


def event_of(path: Path) -> int:
    """The event after which a checkpoint was made."""
    return int(path.name.removeprefix(PREFIX))


def read(path: Path) -> Manifest:
    """A checkpoint's manifest, with the keys of its tables; raises Damaged, OSError, or InvalidArgument kinds."""
    described = manifest.from_bytes((path / MANIFEST).read_bytes())
    if described.state.events != event_of(path):
        raise Damaged(
            f"{path}: expected the state after event {event_of(path)}; got that after {described.state.events}"
        )
    if KEYS not in described.files:
        return described
    entries = described.files[KEYS]
    keys = {entry.name: np.empty(entry.shape, np.int64) for entry in entries}
    for _ in tensors.read_into(path / f"{KEYS}{SUFFIX}", list(keys.values()), entries):
        pass
    return replace(described, state=described.state.with_keys(keys))


def fill(path: Path, described: Manifest, parameter_set: ParameterSet) -> Iterator[int]:
    """Read the elements to where a set has them, yielding how many bytes were read; raises Damaged or OSError."""
    with parameter_set.frozen() as state:
        entries = state.entries()
    if entries.keys() != described.files.keys() - {KEYS}:
        raise Damaged(f"{path}: expected {', '.join(entries)}; got {', '.join(described.files)}")
    for name, arrays in entries.items():
        yield from tensors.read_into(path / f"{name}{SUFFIX}", list(arrays.values()), described.files[name])


def check(path: Path) -> Iterator[int]:
    """Read all of a checkpoint, and check it, yielding how many bytes were read; raises Damaged or OSError."""
    described = manifest.from_bytes((path / MANIFEST).read_bytes())
    for name, entries in described.files.items():
        yield from tensors.check(path / f"{name}{SUFFIX}", entries)


def _arrays(state: State) -> Mapping[str, Tensors]:
    keys: dict[str, Any] = {KEYS: state.key_arrays} if state.keys else {}
    return state.entries() | keys
