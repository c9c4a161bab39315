"""Copies of checkpoints in an object store, for when the machine and its disk are gone.

    <url>/OWNER                                                  what the last server wrote there that began to use it
    <url>/sets/<hash of id>/checkpoint-<event>-<incarnation>/    what the local directory of the checkpoint has

The manifest is written last and removed first: a directory without one does not count. A name is written once; what stands for
the same event in another history has another incarnation in its name.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from optserve._errors import InvalidArgument
from optserve_server.storage import checkpoint, files, journal, manifest
from optserve_server.storage.checkpoint import MANIFEST, PREFIX, SUFFIX
from optserve_server.storage.files import File
from optserve_server.storage.manifest import Manifest
from optserve_server.storage.tensors import Damaged

log = structlog.get_logger()

PART = 16 << 20  # bytes that are read and written at a time

_CHECKPOINT = re.compile(rf"{PREFIX}\d{{20}}-\d{{1,20}}")
_HOME = re.compile(r"[0-9a-f]{32}")
_SECRET = re.compile(r"//[^/@]*@")


class StoreFailedError(OSError):
    """The store can't be reached, or refuses, or another server uses it now."""


NOWHERE, FURTHEST = -1, sys.maxsize  # before and after every event


class Copy(NamedTuple):
    """A checkpoint in the store, ordered by the number of events before it, which grows even where history goes back."""

    events: int
    path: str
    manifest: bytes


class Store:
    """A place for copies, `kept` of each set. Every method raises StoreFailedError.

    `pending` is a local directory with a file for each set whose deletion the store has not seen yet.
    """

    def __init__(self, url: str, pending: Path, kept: int = 2) -> None:
        self.url = _SECRET.sub("//", url)
        self._pending = pending
        self._kept = kept
        self._owner = b""
        self._files: AbstractFileSystem
        with self._reached():
            self._files, root = url_to_fs(url)
            self._root = root.rstrip("/")

    def claim(self, owner: bytes) -> None:
        """Let other servers know that they are not to write here any more."""
        with self._reached():
            self._make(self._root)
            self._files.pipe_file(f"{self._root}/OWNER", owner)
            self._owner = owner
            self._check_owner()

    def upload(self, home: str, path: Path) -> None:
        """Copy a checkpoint of a set, and remove those that are too many then; raises also OSError, of the local disk."""
        encoded = (path / MANIFEST).read_bytes()
        described = manifest.from_bytes(encoded)
        position = described.state.position
        target = f"{self._home(home)}/{PREFIX}{described.state.events:020d}-{position.incarnation}"
        # All are open from here on, so that they may be removed meanwhile. The manifest is the last.
        with _opened(path, [*_data_files(described), MANIFEST]) as opened, self._reached():
            self._check_owner()
            if self._bytes(f"{target}/{MANIFEST}") == encoded:
                return
            self._make(target)
            for name, file in opened.items():
                self._put(f"{target}/{name}", file)
            log.info("checkpoint copied", store=self.url, path=str(path))
            self._remove_old(home)

    def remove(self, home: str) -> None:
        """Remove all copies of a set."""
        with self._reached():
            self._check_owner()
            for name in self._names(self._home(home), _CHECKPOINT):
                self._remove(f"{self._home(home)}/{name}")
            if self._files.exists(self._home(home)):
                self._files.rm(self._home(home), recursive=True)

    def fetch_all(self, sets: Path) -> dict[Path, str]:
        """Fetch the sets that a local directory does not have, or has only older events of; what is older there is removed.

        Returns the directories of those that can't be had, and why. Raises also OSError, of the local disk.
        """
        missing = {}
        with self._reached():
            homes = [sets / name for name in sorted(self._names(f"{self._root}/sets", _HOME))]
        for home in homes:
            older = [*checkpoint.present(home), *(path for _, path in journal.segments(home))]
            path = self.fetch(home, functools.partial(_last_event, home))
            if path is not None:
                log.warning("fetched from the checkpoint store", store=self.url, path=str(path), instead_of=len(older))
                for each in older:
                    files.remove_directory(each) if each.is_dir() else files.remove(each)
            elif not home.exists():
                missing[home] = f"no copy of it in {self.url} is whole"
        return missing

    def fetch(self, home: Path, last_event: Callable[[], int] = lambda: NOWHERE) -> Path | None:
        """Bring the newest sound copy of a set, if it is of after its last event here, into its local directory, durably.

        Returns its path, or None if there is none. Copies that are unfinished or damaged are passed over, loudly. Raises also
        OSError, of the local disk.
        """
        with self._reached():
            copies, _ = self._copies(home.name, loud=True)
        last = last_event() if copies else NOWHERE
        for copy in copies:
            if copy.events <= last:
                break
            try:
                return self._download(copy, home)
            except Damaged as error:
                self._pass_over(copy.path, error)
        return None

    def forget(self, home: str) -> None:
        """Remember that a set is to be removed, at the next `catch_up`; raises only OSError, of the local disk."""
        if not self._pending.exists():
            files.make_directory(self._pending)
            files.sync_directory(self._pending.parent)
        files.write_file(self._pending / home, b"")

    def catch_up(self) -> None:
        """Remove the sets that are to be removed; raises also OSError, of the local disk."""
        for marker in sorted(self._pending.glob("*")):
            if _HOME.fullmatch(marker.name):
                self.remove(marker.name)
                files.remove(marker)

    def _download(self, copy: Copy, home: Path) -> Path:
        if not home.exists():
            files.make_directory(home)
            files.sync_directory(home.parent)
        path = checkpoint.path_of(home, copy.events)
        temporary = path.with_name(path.name + files.TEMPORARY)
        if temporary.exists():
            files.remove_directory(temporary)
        files.make_directory(temporary)
        for name in _data_files(manifest.from_bytes(copy.manifest)):
            with File(temporary / name) as file:
                for part in self._parts(f"{copy.path}/{name}"):
                    file.write([part])
                file.sync()
        with File(temporary / MANIFEST) as file:
            file.write([copy.manifest])
            file.sync()
        for _ in checkpoint.check(temporary):
            pass
        checkpoint.publish(temporary, path)
        return path

    def _parts(self, path: str) -> Iterator[bytes]:
        with self._reached():
            if not self._files.exists(path):
                raise Damaged("it is not there")
            with self._files.open(path, "rb") as file:
                while part := file.read(PART):
                    yield part

    def _put(self, path: str, source: Any) -> None:
        size = 0
        with self._files.open(path, "wb") as target:
            while part := source.read(PART):
                target.write(part)
                size += len(part)
        self._files.invalidate_cache()
        if (stored := self._files.info(path)["size"]) != size:
            raise StoreFailedError(f"expected {size} bytes at {path} in {self.url}; got {stored}")

    def _copies(self, home: str, *, loud: bool = False) -> tuple[list[Copy], list[str]]:
        """The copies of a set that have a sound manifest, the newest first, and the paths of what was never finished or is
        damaged. Those that another version wrote, or that have a rule that is not known here, are left alone."""
        copies, broken = [], []
        for name in self._names(self._home(home), _CHECKPOINT):
            path = f"{self._home(home)}/{name}"
            try:
                copies.append(self._copy(path, name))
            except (InvalidArgument, Damaged, ValueError, KeyError, TypeError) as error:
                if loud:
                    self._pass_over(path, error)
                if not isinstance(error, InvalidArgument):
                    broken.append(path)
        return sorted(copies, reverse=True), broken

    def _copy(self, path: str, name: str) -> Copy:
        encoded = self._bytes(f"{path}/{MANIFEST}")
        if encoded is None:
            raise Damaged("it has no manifest: it was never finished")
        described = manifest.from_bytes(encoded)
        _data_files(described)
        state = described.state
        if name != f"{PREFIX}{state.events:020d}-{state.position.incarnation}":
            raise Damaged("its manifest is another's")
        return Copy(state.events, path, encoded)

    def _remove_old(self, home: str) -> None:
        copies, broken = self._copies(home)
        for path in [copy.path for copy in copies[self._kept :]] + broken:
            self._remove(path)

    def _remove(self, path: str) -> None:
        if self._files.exists(f"{path}/{MANIFEST}"):
            self._files.rm_file(f"{path}/{MANIFEST}")
        self._files.rm(path, recursive=True)

    def _names(self, path: str, kind: re.Pattern[str]) -> list[str]:
        """What is below a path, of that kind; nothing if there is no such path."""
        self._files.invalidate_cache()
        try:
            listed = self._files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = [str(each).rstrip("/").rpartition("/")[2] for each in listed]
        return [name for name in names if kind.fullmatch(name)]

    def _bytes(self, path: str) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def _make(self, path: str) -> None:
        try:
            self._files.makedirs(path, exist_ok=True)
        except PermissionError:  # to make a bucket: there, directories are only names, and what comes next will tell
            return

    def _check_owner(self) -> None:
        if self._bytes(f"{self._root}/OWNER") != self._owner:
            raise StoreFailedError(
                f"another server has begun to use the checkpoint store {self.url}; this one writes nothing there any more. "
                "Give each server a URL of its own"
            )

    def _home(self, home: str) -> str:
        return f"{self._root}/sets/{home}"

    def _pass_over(self, path: str, error: Exception) -> None:
        log.error("copy of a checkpoint is passed over", store=self.url, path=path, reason=str(error))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Every file system has errors of its own; here they are one."""
        try:
            yield
        except (StoreFailedError, Damaged):
            raise
        except Exception as error:
            raise StoreFailedError(f"checkpoint store {self.url}: {type(error).__name__}: {error}") from error


@contextmanager
def _opened(path: Path, names: list[str]) -> Iterator[Mapping[str, Any]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context((path / name).open("rb")) for name in names}


def _last_event(home: Path) -> int:
    """The last event that a local directory has, in its newest checkpoint or its journal. What can't be told is left alone."""
    for path in checkpoint.present(home):
        try:
            state = manifest.from_bytes((path / MANIFEST).read_bytes()).state
        except InvalidArgument:  # sound, but not for this server
            return FURTHEST
        except (Damaged, OSError, ValueError, KeyError, TypeError):
            continue
        number = state.events
        try:
            for event in journal.read(home, number, lambda path, number: None):
                number = event.number
        except (Damaged, OSError):
            return FURTHEST
        return number
    return NOWHERE


def _data_files(described: Manifest) -> list[str]:
    """The names of a checkpoint's files; raises Damaged for those that would lead elsewhere."""
    for name in described.files:
        if Path(name).name != name:
            raise Damaged(f"expected names of files; got {name!r}")
    return [f"{name}{SUFFIX}" for name in described.files]
