"""Keepers: what keeps one set on stable storage, its checkpoints and its journal."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from optserve._errors import OptserveError, StorageFailed
from optserve._results import Durability
from optserve._specification import Journal as Setting
from optserve_server.engine.history import Log, Stored, Unlogged
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.state import State
from optserve_server.storage import checkpoint, files, journal
from optserve_server.storage.checkpoint import LEAST_COPIED, Draft, Shadow, Shared
from optserve_server.storage.files import Pages
from optserve_server.storage.journal import Journal

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Retention:
    """How checkpoints are made: so many are kept; at most `copied` of a set's state is copied at a time, so that steps go on
    while it is written. The rest is written while steps wait."""

    checkpoints: int = 2
    copied: float = 1.0


Logs = Callable[["Keeper", Log], Log]


class Keeper:
    """Keeps one set. Every method may be called from any thread.

    `published` is called with each new checkpoint, `note` when something has come to be on stable storage. `logged` makes the
    log that the set gets, of this keeper and the log that it would have had.
    """

    def __init__(
        self,
        home: Path,
        parameter_set: ParameterSet,
        retention: Retention,
        fence: Callable[[], None],
        shadow: Shadow,
        pages: Pages,
        *,
        published: Callable[[Path], None],
        note: Callable[[], None],
        logged: Logs | None,
    ) -> None:
        self.parameter_set = parameter_set
        self.home = home
        self._retention = retention
        self._shadow = shadow
        self._fence = fence
        self._published = published
        self._note = note
        self._writing = threading.Lock()
        present = checkpoint.present(home)
        self._last_event = checkpoint.event_of(present[0]) if present else -1
        # When the last checkpoint was written. What was read from a journal is to be written at once: after a sync that failed,
        # it may be in the page cache alone, and no later sync would say so.
        self.written_at = time.monotonic() if present and not self.is_behind else 0.0
        self._journal: Journal | None = None
        if parameter_set.spec.journal is not Setting.OFF:
            position = parameter_set.position
            self._journal = Journal(
                home,
                parameter_set.events,
                position.version,
                parameter_set.spec.journal,
                self._stored,
                fence,
                pages,
            )
        own: Log = self._journal or Unlogged()
        self._log = logged(self, own) if logged is not None else own
        parameter_set.keep(self._log)
        if self._journal is not None:
            with parameter_set.frozen() as state:
                self._tell(state, Durability.JOURNAL)  # of what was read again and synced

    @property
    def is_behind(self) -> bool:
        """Whether anything has happened since the last checkpoint, and it could be written."""
        return self.parameter_set.events != self._last_event and not self.parameter_set.gone

    @property
    def synced(self) -> int:
        """The last event that is on stable storage; -1 before there is anything."""
        watermark = self.parameter_set.watermark
        return self._last_event if self._journal is None else max(watermark.journal, watermark.checkpoint)

    @property
    def failure(self) -> str | None:
        """Why the set acknowledges nothing until a restart, if so."""
        if self.parameter_set.lost:
            return "an update failed half way"
        return self._journal.failure if self._journal is not None else None

    def checkpoint(self, shared: Shared | None = None) -> None:
        """Write a checkpoint, unless nothing has happened since the last; raises StorageFailed, and the last still counts.

        What is `shared` with another that the set was read from is not written again.
        """
        with self._writing:
            if self.is_behind:
                self._checkpoint(shared)

    def replace(self, earlier: ParameterSet, error: OptserveError) -> None:
        """Let the set be what it was earlier; whoever is connected to what it is gets an error. Raises StorageFailed, and then
        nothing has changed."""
        with self._writing:
            present = self.parameter_set
            if self._journal is not None:
                self._journal.sync()
            earlier.rewound(present.retire(error))
            try:
                self.parameter_set = earlier
                if self._journal is not None:
                    self._journal.skip(earlier.events, earlier.position.version)
                earlier.keep(self._log)
                self._checkpoint()
            except BaseException:
                self.parameter_set = present
                try:
                    if self._journal is not None:
                        self._go_on(self._journal, earlier)
                finally:
                    present.reinstate()
                raise
            present.clear()

    def _go_on(self, journal: Journal, earlier: ParameterSet) -> None:
        """Let the journal go on where it was, unless a restart may find the set to be what it was earlier."""
        if checkpoint.path_of(self.home, earlier.events).exists():
            journal.fail("the set was half rewound, and acknowledges nothing more until a restart")
        else:
            journal.skip(self.parameter_set.events, self.parameter_set.position.version)

    def _checkpoint(self, shared: Shared | None = None) -> None:
        try:
            self._fence()
            state = self._write(shared)
        except OSError as error:
            raise StorageFailed(f"no checkpoint of {self.parameter_set.spec.id!r} was written: {error}") from error
        try:
            self._remove_old(state)
        except OSError as error:
            log.error("old checkpoints not removed", parameter_set=state.spec.id, reason=str(error))
        self._last_event = state.events
        self.written_at = time.monotonic()
        self._published(checkpoint.path_of(self.home, state.events))
        self._tell(state, Durability.CHECKPOINT)

    def _tell(self, state: State, durability: Durability) -> None:
        pushed = [(each.client_id, each.epoch, each.last_sequence) for each in state.sessions]
        self._stored(Stored(state.events, state.position.version, pushed, durability))

    def _stored(self, stored: Stored) -> None:
        self.parameter_set.stored(stored)
        self._note()

    def sync_if_due(self) -> None:
        """Sync the journal if that is due; raises StorageFailed."""
        if self._journal is not None:
            self._journal.sync_if_due()

    def sync(self, number: int | None = None) -> None:
        """Put all of the journal, or events up to a number, on stable storage; raises StorageFailed."""
        if self._journal is not None:
            self._journal.sync(number)

    def move(self, home: Path) -> None:
        """Go on in another directory, which this one has become."""
        with self._writing:
            self.home = home
            if self._journal is not None:
                self._journal.move(home)

    def close(self) -> None:
        """Write nothing any more; what the journal has not synced is synced first, if it can be."""
        with self._writing:
            if self._journal is not None:
                try:
                    self._journal.sync()
                except StorageFailed as error:
                    log.error("journal not synced", parameter_set=self.parameter_set.spec.id, reason=str(error))
                self._journal.close()

    def delete(self) -> None:
        """Remove all of it; raises StorageFailed, and then nothing is removed."""
        with self._writing:
            try:
                files.remove_directory(self.home)
            except OSError as error:
                if self.home.exists():
                    raise StorageFailed(f"{self.parameter_set.spec.id!r} was not deleted: {error}") from error
                log.error("files of a deleted set are left", directory=str(self.home), reason=str(error))
            if self._journal is not None:
                self._journal.close()

    def _write(self, shared: Shared | None) -> State:
        most_copied = LEAST_COPIED + int(self._retention.copied * self.parameter_set.state_bytes)
        self._shadow.reserve(most_copied)
        began = time.monotonic()
        with self.parameter_set.frozen() as state:
            draft = Draft(self.home, state, shared)
            try:
                if self._journal is not None:
                    self._journal.rotate()
                *now, last = draft.batches(most_copied)
                for batch in now:
                    draft.write(self._shadow.copies(batch))
                copies = self._shadow.copies(last)
            except BaseException:
                draft.close()
                raise
        stalled = time.monotonic() - began
        try:
            draft.write(copies)
            draft.publish(self._fence)
        finally:
            draft.close()
        log.info(
            "checkpoint written",
            parameter_set=state.spec.id,
            version=state.position.version,
            seconds=round(time.monotonic() - began, 3),
            steps_waited=round(stalled, 3),
        )
        return state

    def _remove_old(self, state: State) -> None:
        """Remove what is not kept any more; what was undone does not count, and nothing leads back to it."""
        present = checkpoint.present(self.home)
        counting = [path for path in present if not state.is_undone(checkpoint.event_of(path))]
        kept = counting[: self._retention.checkpoints]
        for old in present:
            if old not in kept:
                files.remove_directory(old)
        journal.remove_before(self.home, checkpoint.event_of(kept[-1]))
