"""Checkpoints: all of a set at one event, in a directory of its own that appears whole or not at all.

    checkpoint-<event>/manifest.json               everything but tensors, and what the other files must be
    checkpoint-<event>/parameters.safetensors      the parameters by name; then a file for each slot: exp_avg.safetensors, ...
    CURRENT                                        the name of the newest

A directory that has the final name is complete: its files and its names are on stable storage before it gets that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._copy import copy_array
from optserve_server.engine.arena import aligned
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.state import State
from optserve_server.storage import files, manifest, tensors
from optserve_server.storage.files import File
from optserve_server.storage.manifest import Manifest
from optserve_server.storage.tensors import Damaged, Tensors, Writer

PREFIX = "checkpoint-"
CURRENT = "CURRENT"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
KEYS = "keys"  # the file with the keys of tables

Part = tuple[Writer, int, NDArray[np.uint8]]


class Shadow:
    """Memory that states are copied to, so that steps go on while they are written. Kept, since fresh memory takes 40 times as
    long to write to."""

    def __init__(self) -> None:
        self._memory = aligned(0)

    def reserve(self, nbytes: int) -> None:
        """Have that much, touched."""
        if self._memory.size < nbytes:
            self._memory = aligned(0)  # let go of the old before there is new
            self._memory = aligned(nbytes)
            self._memory.fill(0)

    def copies(self, parts: list[Part]) -> list[Part]:
        """The parts in this memory."""
        copied, begin = [], 0
        for writer, index, part in parts:
            target = self._memory[begin : begin + part.size]
            copied.append((writer, index, target))
            begin += part.size
        for (_, _, target), (_, _, part) in zip(copied, parts, strict=True):
            copy_array(target, part)
        return copied


class Draft:
    """A checkpoint that is being written; raises OSError, and then it is as if it had never begun."""

    def __init__(self, home: Path, state: State) -> None:
        self.state = state
        self.path = home / f"{PREFIX}{state.events:020d}"
        self._home = home
        self._temporary = self.path.with_name(self.path.name + files.TEMPORARY)
        if self._temporary.exists():
            files.remove_directory(self._temporary)
        files.make_directory(self._temporary)
        about = {"parameter_set": state.spec.id, "version": str(state.position.version)}
        self._writers = {
            name: Writer(self._temporary / f"{name}{SUFFIX}", each, about) for name, each in _arrays(state).items()
        }

    def parts(self) -> list[Part]:
        """All elements, in pieces, to be written in order."""
        return [(writer, *part) for writer in self._writers.values() for part in writer.parts()]

    def write(self, parts: list[Part]) -> None:
        """Write some of them."""
        for writer, index, part in parts:
            writer.write(index, part)

    def close(self) -> None:
        """Close its files."""
        for writer in self._writers.values():
            writer.close()

    def publish(self) -> None:
        """Let it be the newest, durably."""
        entries = {name: writer.finish() for name, writer in self._writers.items()}
        described = Manifest(replace(self.state, arenas={}), entries)
        with File(self._temporary / MANIFEST) as file:
            file.write([manifest.to_bytes(described)])
            file.sync()
        files.sync_directory(self._temporary)
        if self.path.exists():  # of the same event, damaged
            files.remove_directory(self.path)
        files.rename(self._temporary, self.path)
        files.sync_directory(self._home)
        files.write_file(self._home / CURRENT, self.path.name.encode())


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
