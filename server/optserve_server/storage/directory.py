"""The data directory: checkpoints of every set, one safetensors file for each generation.

A checkpoint is written to a temporary file, synced, and renamed; the rename is what makes it count. Two generations are
kept, and a damaged file is passed over, loudly, for the one before. What is sound but not of this server, such as a set whose
rule it was not given, is kept as it is, and its id with it. One server at a time may use a directory.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from safetensors import safe_open
from safetensors.numpy import save_file

from optserve._errors import InvalidArgument, ParameterSetExists
from optserve_server.engine.arena import Arena
from optserve_server.engine.state import State
from optserve_server.storage import record

log = structlog.get_logger()

GENERATIONS_KEPT = 2
SUFFIX = ".safetensors"
DELETED = ".deleted"
RECORD = "record"  # name of the tensor that holds everything but tensors, as JSON
SEPARATOR = "."  # between an arena's name and its compute type


class DataDirectory:
    """Checkpoints below a path; raises OSError if the path can't be used or another server uses it.

    Its methods are not for several threads at a time.
    """

    def __init__(self, path: Path) -> None:
        self._sets = path / "sets"
        self._sets.mkdir(parents=True, exist_ok=True)
        self._kept: dict[Path, str] = {}  # directories of sets that are not on this server, and why
        self._lock = (path / "LOCK").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise OSError(f"another server uses the data directory {str(path)!r}; give each its own") from None

    def write(self, state: State) -> None:
        """Put a state on stable storage; raises OSError, and then what was there before still counts."""
        if self._lock.closed:
            raise OSError("this data directory was closed: another server may use it by now")
        home = self._home(state.spec.id)
        home.mkdir(exist_ok=True)
        generations = _generations(home)
        number = 1 + (_number(generations[0]) if generations else 0)
        path = home / f"{number:012d}-version-{state.position.version}{SUFFIX}"
        temporary = path.with_suffix(".tmp")
        tensors = _tensors(state)
        checksums = {name: zlib.crc32(array.data) for name, array in tensors.items()}
        save_file(tensors, temporary, {"crc32": json.dumps(checksums)})
        _sync(temporary)
        temporary.rename(path)
        _sync(home)
        _sync(self._sets)
        for old in _generations(home)[GENERATIONS_KEPT:]:
            old.unlink()

    def read_all(self) -> Iterator[State]:
        """The newest sound state of every set."""
        for home in sorted(self._sets.iterdir()):
            if home.name.endswith(DELETED):
                shutil.rmtree(home)
                continue
            for leftover in home.glob("*.tmp"):
                leftover.unlink()
            for path in _generations(home):
                try:
                    yield _read(path)
                    break
                except InvalidArgument as error:
                    log.error("not restored; its checkpoints are kept", directory=str(home), reason=str(error))
                    self._kept[home] = str(error)
                    break
                except Exception as error:  # whatever a damaged file leads to
                    log.error("checkpoint is damaged; trying the one before", path=str(path), error=str(error))
            else:
                log.error("no sound checkpoint; the set is not restored, its files are kept", directory=str(home))
                self._kept[home] = "all of its checkpoints are damaged"

    def keep(self, set_id: str, why: str) -> None:
        """Keep a set's checkpoints as they are, as the set could not be restored from them."""
        self._kept[self._home(set_id)] = why

    def check_free(self, set_id: str) -> None:
        """Raises ParameterSetExists for the id of a set that is kept here only."""
        if why := self._kept.get(self._home(set_id)):
            raise ParameterSetExists(
                f"parameter set {set_id!r} is in the data directory, but this server could not restore it ({why}). Start the "
                "server so that it can, or choose another id"
            )

    def delete(self, set_id: str) -> None:
        """Remove a set's checkpoints, if it has any; raises OSError if they can't be removed."""
        home = self._home(set_id)
        if home.exists():
            condemned = home.with_suffix(DELETED)
            home.rename(condemned)  # from here on they don't count
            _sync(self._sets)
            shutil.rmtree(condemned)

    def close(self) -> None:
        """Let another server use the directory."""
        self._lock.close()

    def _home(self, set_id: str) -> Path:
        """No id reaches the file system: its hash does."""
        return self._sets / hashlib.sha256(set_id.encode()).hexdigest()[:32]


def _generations(home: Path) -> list[Path]:
    """Newest first."""
    return sorted(home.glob(f"*{SUFFIX}"), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _tensors(state: State) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {
        f"{name}{SEPARATOR}{compute.name}": array
        for name, arena in state.arenas.items()
        for compute, array in arena.items()
    }
    return tensors | {RECORD: np.frombuffer(record.to_json(state).encode(), np.uint8)}


def _read(path: Path) -> State:
    arenas: dict[str, Arena] = {}
    with safe_open(path, "numpy") as file:
        checksums = json.loads(file.metadata()["crc32"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for name, array in tensors.items():
        if zlib.crc32(array.data) != checksums[name]:
            raise ValueError(f"checksum of {name} does not match")
    text = tensors.pop(RECORD).tobytes().decode()
    for name, array in tensors.items():
        arena, _, compute = name.rpartition(SEPARATOR)
        arenas.setdefault(arena, {})[np.dtype(compute)] = array
    return record.from_json(text, arenas)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
