"""`python -m tests.torture.wrong_storage`: storage that is wrong on purpose, and the checks that must see it.

Each entry changes one function, and its check, which passes without that, must then fail.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from structlog.testing import capture_logs
from tests.torture import damage, failpoints, power_loss
from tests.torture.machine import Machine, small_journals
from tests.torture.script import report

from optserve import StorageFailed
from optserve_server.storage import checkpoint, directory, files, journal, tensors
from optserve_server.storage.checkpoint import CURRENT, MANIFEST, Draft
from optserve_server.storage.files import File
from optserve_server.storage.journal import Journal, Segment
from optserve_server.storage.keeper import Keeper
from optserve_server.storage.manifest import Manifest, to_bytes


@dataclass(frozen=True)
class Wrong:
    """A mistake, by what it says: `change` makes it, and `check` must fail with it."""

    says: str
    change: Callable[[], AbstractContextManager[Any]]
    check: Callable[[Path], None]


def check_power_loss(root: Path) -> None:
    power_loss.images(300, 0, root)


def check_damage(root: Path) -> None:
    damage.damages(400, 0, root)


def check_failpoints(root: Path) -> None:
    names = [name for name in failpoints.POINTS if name.startswith(("a checkpoint, after", "a rewind", "a creation"))]
    for name, action, failure in failpoints.run(names, root):
        assert failure is None, f"{name}: {action}: {failure}"


def check_errors(root: Path) -> None:
    """What a disk that fails, and an owner that comes later, must lead to."""
    with small_journals(), capture_logs():
        root = root / "data"
        machine = Machine(root)
        machine.create("adam-always")
        (root / "OWNER").write_bytes(b"another")
        with suppress(StorageFailed):
            machine.push("adam-always", 0)
            raise AssertionError("acknowledged, though another server has the directory")
        machine.die()
        machine = Machine(root)
        broken = OSError(errno.EIO, "Input/output error")
        with mock.patch.object(os, "fdatasync", side_effect=broken), suppress(StorageFailed):
            machine.push("adam-always", 1)
            raise AssertionError("acknowledged, though the disk failed")
        with suppress(StorageFailed):
            machine.push("adam-always", 2)
            raise AssertionError("acknowledged, after the disk had failed")
        machine.die()


def replaced(owner: Any, name: str, new: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, new)


def sync_without(part: str) -> Callable[[], AbstractContextManager[Any]]:
    sync = File.sync
    return replaced(File, "sync", lambda self: None if part in str(self.path) else sync(self))


def sync_whatever_happens(self: File) -> None:
    with suppress(OSError):
        os.fdatasync(self._descriptor)


def forget_failures(self: Journal) -> None:
    self._failure = None


def publish_before_it_is_whole(self: Draft, fence: Callable[[], None]) -> None:
    entries = {name: writer.finish() for name, writer in self._writers.items()}
    files.rename(self._temporary, self.path)
    files.sync_directory(self.path.parent)
    with File(self.path / MANIFEST) as file:
        file.write([to_bytes(Manifest(self.state, entries))])
        file.sync()
    files.sync_directory(self.path)
    files.write_file(self.path.parent / CURRENT, self.path.name.encode())


def remove_what_the_older_checkpoint_needs(self: Keeper) -> None:
    present = checkpoint.present(self.home)
    for old in present[2:]:
        files.remove_directory(old)
    journal.remove_before(self.home, checkpoint.event_of(present[0]))


def keep_one(self: Keeper) -> None:
    for old in checkpoint.present(self.home)[1:]:
        files.remove_directory(old)


def skip_at_once(self: Journal, last_event: int, version: int) -> None:
    self._last = self._synced = last_event
    self._begin()


NO_CHECKSUM = SimpleNamespace(crc32=lambda data, value=0: 0)

WRONG = {
    "acknowledged-early": Wrong(
        "pushes are acknowledged before the journal is synced",
        replaced(Journal, "wait", lambda self, number: None),
        check_power_loss,
    ),
    "journal-not-synced": Wrong("the journal is not synced", sync_without("journal-"), check_power_loss),
    "checkpoint-not-synced": Wrong("a checkpoint's files are not synced", sync_without("checkpoint-"), check_power_loss),
    "names-not-synced": Wrong(
        "directories are not synced", replaced(files, "sync_directory", lambda path: None), check_power_loss
    ),
    "read-and-not-synced": Wrong(
        "a journal that was read is taken for stored", replaced(files, "sync", lambda path: None), check_power_loss
    ),
    "manifest-late": Wrong(
        "a checkpoint has its name before it is whole",
        replaced(Draft, "publish", publish_before_it_is_whole),
        check_power_loss,
    ),
    "unfinished-creation-kept": Wrong(
        "what a creation left takes the id for ever",
        replaced(directory, "_is_unfinished", lambda home: False),
        check_power_loss,
    ),
    "tensors-unchecked": Wrong("tensors are not checked", replaced(tensors, "zlib", NO_CHECKSUM), check_damage),
    "journal-unchecked": Wrong("events are not checked", replaced(journal, "zlib", NO_CHECKSUM), check_damage),
    "damage-is-the-end": Wrong(
        "damage in the middle of a journal is taken for its end",
        replaced(Segment, "_known_stored", lambda self, file, place, salt: 0),
        check_damage,
    ),
    "segments-removed-early": Wrong(
        "segments that the older checkpoint needs are removed",
        replaced(Keeper, "_remove_old", remove_what_the_older_checkpoint_needs),
        check_damage,
    ),
    "one-checkpoint": Wrong("one checkpoint is kept", replaced(Keeper, "_remove_old", keep_one), check_damage),
    "rewind-known-early": Wrong(
        "a rewind counts before its checkpoint is there", replaced(Journal, "skip", skip_at_once), check_failpoints
    ),
    "errors-ignored": Wrong("errors of syncs are ignored", replaced(File, "sync", sync_whatever_happens), check_errors),
    "errors-forgotten": Wrong(
        "a sync is tried again after an error", replaced(Journal, "_check", forget_failures), check_errors
    ),
    "no-fence": Wrong(
        "who owns the directory is not asked", replaced(directory.DataDirectory, "check_owner", lambda self: None), check_errors
    ),
}  # fmt: skip


def seen(name: str) -> str:
    """How the check of an entry fails with its change; raises AssertionError if it does not."""
    entry = WRONG[name]
    with tempfile.TemporaryDirectory(prefix="optserve-wrong-") as root:
        try:
            with entry.change():
                entry.check(Path(root))
        except Exception as failure:
            return f"{failure}" if isinstance(failure, AssertionError) else repr(failure)
    raise AssertionError(f"nothing sees that {entry.says}")


if __name__ == "__main__":
    sys.exit(report("python -m tests.torture.wrong_storage", __doc__, WRONG, seen))
