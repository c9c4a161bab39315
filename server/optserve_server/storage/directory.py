"""The data directory: a directory for each set, with its checkpoints and its journal, of one server at a time.

LOCK                     locked by the server that uses the directory
STANDING                 what it must not forget of the other one, if it has a standby or is one, see `replication.standing`
OWNER                    what the last server wrote here that began to use it; who finds another's stops writing
sets/<hash of id>/       one set, see `checkpoint` and `journal`
former/<hash of id>-*/   one that was here before the server became a standby, of a primary that does not have it
deleted/                 sets whose deletion the store has not seen yet, see `store`
"""

import contextlib
import errno
import fcntl
import hashlib
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from optserve._errors import HistoryChanged, InvalidArgument, OptserveError, ParameterSetExists, ParameterSetNotFound
from optserve._results import Durability
from optserve._specification import Journal
from optserve_server.engine.engine import Engine
from optserve_server.engine.history import Stored
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.storage import checkpoint, files, journal, travel
from optserve_server.storage.changes import Changes
from optserve_server.storage.checkpoint import Shadow, Shared
from optserve_server.storage.files import Pages
from optserve_server.storage.keeper import Keeper, Logs, Retention
from optserve_server.storage.store import Store, StoreFailedError
from optserve_server.storage.tensors import Damaged
from optserve_server.storage.uploads import Uploads

log = structlog.get_logger()

DAMAGED = ".damaged"  # suffix of checkpoints that were passed over
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # errors that say that a file is damaged
Progress = Callable[[int, int], None]  # bytes read, and bytes that there are


class DataDirectory:
    """Keeps sets below a path; raises OSError if the path can't be used or another server uses it.

    `logged` is as in `Keeper`. `changes` says when there is something new on stable storage, or a set less.
    """

    def __init__(
        self,
        path: Path,
        retention: Retention | None = None,
        store: str | None = None,
        logged: Logs | None = None,
    ) -> None:
        self.path = path
        self.changes = Changes()
        self._logged = logged
        self._sets = path / "sets"
        files.make_directories(path)
        files.make_directories(self._sets)
        self._retention = retention or Retention()
        self._kept: dict[Path, str] = {}  # directories of sets that are not on this server, and why
        self._keepers: dict[str, Keeper] = {}
        self._changing = threading.Lock()
        self._shadow, self._pages = Shadow(), Pages()
        self._checkpointing = threading.Lock()  # one at a time: they share memory, and the disk
        self._lock = (path / "LOCK").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise OSError(f"another server uses the data directory {str(path)!r}; give each its own") from None
        self._owner = secrets.token_hex(16).encode()
        files.write_file(path / "OWNER", self._owner)
        files.sync_directory(path)
        self._store: Store | None = None
        self._uploads: Uploads | None = None
        if store is not None:
            try:
                self._store = Store(store, path / "deleted", self._retention.checkpoints)
            except StoreFailedError:
                self._lock.close()
                raise
            self._uploads = Uploads(self._store)

    def keeper(self, set_id: str) -> Keeper | None:
        """That of a set, if it is here."""
        with self._changing:
            return self._keepers.get(set_id)

    @property
    def keepers(self) -> list[Keeper]:
        """Those of all sets."""
        with self._changing:
            return list(self._keepers.values())

    def check_owner(self) -> None:
        """Raises OSError if another server has begun to use the directory, or this one has let go of it."""
        if self._lock.closed or (self.path / "OWNER").read_bytes() != self._owner:
            raise OSError("another server has taken over this data directory; this one writes nothing there any more")

    def add(self, parameter_set: ParameterSet) -> Keeper:
        """Keep a new set from now on; raises OSError or StorageFailed."""
        home = self._home(parameter_set.spec.id)
        if home.exists():  # of one that could not be created, or not be deleted whole
            files.remove_directory(home)
        files.make_directory(home)
        try:
            files.sync_directory(self._sets)
            return self._keep(home, parameter_set)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove_directory(home)
            raise

    def adopt(self, parameter_set: ParameterSet) -> Keeper:
        """Keep a set of another server, as it is now, instead of all that has its id; raises OSError or StorageFailed.

        A crash at any time leaves the one or the other.
        """
        set_id = parameter_set.spec.id
        home = self._home(set_id)
        new, old = (home.with_name(home.name + suffix) for suffix in (files.TEMPORARY, files.CONDEMNED))
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        files.make_directory(new)
        with self._checkpointing:
            keeper = self._keeping(new, parameter_set)
            try:
                keeper.checkpoint()
            except BaseException:
                keeper.delete()
                raise
            with self._changing:
                present = self._keepers.pop(set_id, None)
            if present is not None:
                present.close()
            if home.exists():
                files.rename(home, old)
            files.rename(new, home)
            files.sync_directory(self._sets)
            keeper.move(home)
            with self._changing:
                self._keepers[set_id] = keeper
        if old.exists():
            shutil.rmtree(old)
        return keeper

    def set_aside(self) -> None:
        """Let what nobody keeps here be elsewhere, where no server finds it but people do; raises OSError."""
        kept = {keeper.home for keeper in self.keepers}
        for home in list(self._sets.iterdir()):
            if home.name.endswith((files.TEMPORARY, files.CONDEMNED)):
                shutil.rmtree(home)
            elif home not in kept:
                target = self.path / "former" / f"{home.name}-{secrets.token_hex(4)}"
                files.make_directories(target.parent)
                files.rename(home, target)
                log.warning("the primary does not have this set; its files are kept apart", directory=str(target))
        files.sync_directory(self._sets)

    def _keep(self, home: Path, parameter_set: ParameterSet) -> Keeper:
        keeper = self._keeping(home, parameter_set)
        with self._changing:
            self._keepers[parameter_set.spec.id] = keeper
        return keeper

    def _keeping(self, home: Path, parameter_set: ParameterSet) -> Keeper:
        return Keeper(
            home,
            parameter_set,
            self._retention,
            self.check_owner,
            self._shadow,
            self._pages,
            published=self._uploads.offer if self._uploads is not None else lambda path: None,
            note=self.changes.note,
            logged=self._logged,
        )

    def checkpoint(self, set_id: str, shared: Shared | None = None) -> None:
        """Write a checkpoint of a set now, which may have files of another; raises StorageFailed."""
        with self._checkpointing:
            self._keeper(set_id).checkpoint(shared)

    def restore(self, engine: Engine, progress: Progress = lambda read, total: None) -> None:
        """Bring back every set from its newest sound checkpoint and its journal; what can't be is kept, loudly.

        Raises StoreFailedError if there is a store that can't be reached.
        """
        if self._store is not None:
            self._fetch(self._store)
        self._finish_adoptions()
        for condemned in self._sets.glob(f"*{files.CONDEMNED}"):
            shutil.rmtree(condemned)
        homes = []
        for home in sorted(self._sets.iterdir()):
            if _is_unfinished(home):
                log.warning("removed a set whose creation was not finished", directory=str(home))
                files.remove_directory(home)
            else:
                homes.append(home)
        files.sync_directory(self._sets)  # a crash of the server alone may have left names that were never synced
        total = sum(_nbytes(home) for home in homes)
        read = 0

        def note(nbytes: int) -> None:
            nonlocal read
            read += nbytes
            progress(read, total)

        for home in homes:
            try:
                parameter_set = self._restored(home, engine, note)
                self._keep(home, parameter_set)
            except Exception as error:  # one set must not keep a server from the others
                unexpected = None if isinstance(error, OptserveError | OSError | Damaged) else error
                log.error(
                    "not restored; its files are kept", directory=str(home), reason=str(error), exc_info=unexpected
                )
                self._kept[home] = str(error) or repr(error)
            else:
                engine.add(parameter_set)
                if self._uploads is not None:  # if it is not there yet
                    self._uploads.offer(checkpoint.present(home)[0])
                log.info("restored", parameter_set=parameter_set.spec.id, version=parameter_set.position.version)

    def _finish_adoptions(self) -> None:
        """Let what a crash kept from taking another's place take it: `adopt` had let go of that, so that this was whole."""
        for new in self._sets.glob(f"*{files.TEMPORARY}"):
            home = new.with_name(new.name.removesuffix(files.TEMPORARY))
            if not home.exists() and checkpoint.present(new):
                files.rename(new, home)
            else:
                shutil.rmtree(new)

    def earlier(self, engine: Engine, set_id: str, version: int | None) -> tuple[ParameterSet, Shared | None]:
        """A set as it was at a version, or as it was last written, not published; and the checkpoint that it is, if it is one.

        Raises VersionNotKept, StorageFailed or ServerBusy.
        """
        keeper = self._keeper(set_id)
        if version is None:
            self.checkpoint(set_id)
        else:
            keeper.sync()
        with self._checkpointing:  # which remove others
            return travel.earlier(keeper.home, engine, version)

    def rewind(self, engine: Engine, set_id: str, version: int) -> ParameterSet:
        """Let a set be what it was at a version, durably; raises VersionNotKept, StorageFailed or ServerBusy."""
        earlier, _ = self.earlier(engine, set_id, version)
        error = HistoryChanged(f"parameter set {set_id!r} was rewound to version {version}; open another stream")
        with self._checkpointing:
            self._keeper(set_id).replace(earlier, error)
        engine.add(earlier)
        return earlier

    def check_free(self, set_id: str) -> None:
        """Raises ParameterSetExists for the id of a set that is kept here only."""
        if why := self._kept.get(self._home(set_id)):
            raise ParameterSetExists(
                f"parameter set {set_id!r} is in the data directory, but this server could not restore it ({why}). Start the "
                "server so that it can, or choose another id"
            )

    def delete(self, set_id: str) -> None:
        """Remove a set; raises StorageFailed if that can't be."""
        with self._changing:
            keeper = self._keepers.get(set_id)
        if keeper is not None:
            if self._uploads is not None:
                self._uploads.delete(keeper.home.name)
            keeper.delete()
            with self._changing:
                del self._keepers[set_id]
            self.changes.note()

    def close(self) -> None:
        """Let another server use the directory."""
        for keeper in self.keepers:
            keeper.close()
        if self._uploads is not None:
            self._uploads.close()
        self._lock.close()

    def _fetch(self, store: Store) -> None:
        """Bring the sets of which the store has more than this directory."""
        store.claim(self._owner)
        store.catch_up()
        self._kept |= store.fetch_all(self._sets)

    def _restored(self, home: Path, engine: Engine, note: Callable[[int], None]) -> ParameterSet:
        """The set that a directory has, or, if that is damaged, the store; raises what `_restored` raises."""
        try:
            return _restored(home, engine, note)
        except Damaged as error:
            if self._store is None or self._store.fetch(home) is None:
                raise
            log.warning("fetched from the checkpoint store", directory=str(home), reason=str(error))
            return _restored(home, engine, note)

    def _keeper(self, set_id: str) -> Keeper:
        with self._changing:
            if set_id not in self._keepers:
                raise ParameterSetNotFound(f"parameter set {set_id!r} was deleted")
            return self._keepers[set_id]

    def _home(self, set_id: str) -> Path:
        """No id reaches the file system: its hash does."""
        return self._sets / hashlib.sha256(set_id.encode()).hexdigest()[:32]


def _restored(home: Path, engine: Engine, note: Callable[[int], None]) -> ParameterSet:
    """The set that a directory has; raises Damaged, OSError or OptserveErrors if there is none that can be here."""
    for leftover in (*home.glob(f"*{files.TEMPORARY}"), *home.glob(f"*{files.CONDEMNED}")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    files.sync_directory(home)
    present = checkpoint.present(home)
    _check_current(home, present)
    damaged: list[Path] = []
    for path in present:
        try:
            described = checkpoint.read(path)
            parameter_set = engine.new(described.state.spec)
            engine.compile_beside(parameter_set)
            parameter_set.restore(described.state)
            for nbytes in checkpoint.fill(path, described, parameter_set):
                note(nbytes)
        except InvalidArgument:  # sound, but not for this server
            raise
        except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, OSError) and error.errno not in LOST:
                raise
            log.error("checkpoint is damaged; trying the one before", path=str(path), error=str(error))
            damaged.append(path)
            continue
        parameter_set.stored(
            Stored(described.state.events, described.state.position.version, (), Durability.CHECKPOINT)
        )
        _repeat(home, parameter_set, note)
        if damaged and parameter_set.spec.journal is not Journal.OFF:
            _check_reached(damaged[0], parameter_set)
        for each in damaged:  # which must not count among those that are kept
            _set_aside(each)
        return parameter_set
    raise Damaged("all of its checkpoints are damaged" if present else "it has no checkpoint")


def _repeat(home: Path, parameter_set: ParameterSet, note: Callable[[int], None]) -> None:
    """Let happen again what the journal has."""
    before = parameter_set.events
    for event in journal.read(home, before):
        parameter_set.repeat(event)
        if event.content is not None:
            note(sum(memoryview(part).nbytes for each in event.content.received for part in each.data))
    if parameter_set.events > before:
        log.info("journal repeated", parameter_set=parameter_set.spec.id, events=parameter_set.events - before)


def _check_reached(damaged: Path, parameter_set: ParameterSet) -> None:
    """Raises Damaged if a checkpoint that can't be read had more of a set than its journal leads to."""
    if parameter_set.events < checkpoint.event_of(damaged):
        raise Damaged(
            f"{damaged}: it is damaged, and the journal leads from the one before to event {parameter_set.events} only"
        )


def _set_aside(damaged: Path) -> None:
    aside = damaged.with_name(damaged.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    files.rename(damaged, aside)


def _is_unfinished(home: Path) -> bool:
    """Whether a set never had a checkpoint: then nobody was told that anything of it is there."""
    return home.is_dir() and not any(
        each.name == checkpoint.CURRENT
        or (each.name.startswith(checkpoint.PREFIX) and not each.name.endswith(files.TEMPORARY))
        for each in home.iterdir()
    )


def _check_current(home: Path, present: list[Path]) -> None:
    """Say so if the pointer is not to the newest checkpoint: each is checked by itself."""
    try:
        current = (home / checkpoint.CURRENT).read_text()
    except (OSError, ValueError) as error:
        current = f"({error})"
    if present and current != present[0].name:
        log.warning("the newest checkpoint is not the current one", directory=str(home), current=current)


def _nbytes(home: Path) -> int:
    """Bytes that a set's restoration reads, about."""
    newest = checkpoint.present(home)[:1]
    read = [each for path in newest for each in path.glob("*")] + [path for _, path in journal.segments(home)]
    return sum(path.stat().st_size for path in read)
