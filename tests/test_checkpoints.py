"""Checkpoints: what their files have, how many are kept, and that what begins from them is what was there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from structlog.testing import capture_logs
from tests.torture.machine import SETS, Machine, fingerprint, small_journals

from optserve import ParameterSetExists, StorageFailed
from optserve_server.storage import checkpoint, files, manifest, schedule
from optserve_server.storage.schedule import Schedule


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_journals():
        yield


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path / "data")
    yield machine
    machine.abandon()


@contextlib.contextmanager
def restarted(machine: Machine, tmp_path: Path) -> Iterator[Machine]:
    """Another on the same files, after the first was killed."""
    machine.die()
    again = Machine(tmp_path / "data")
    yield again
    again.abandon()


def home(machine: Machine, kind: str) -> Path:
    (found,) = (each.home for each in machine.directory.keepers if each.parameter_set.spec.id == kind)
    return found


def newest(machine: Machine, kind: str) -> Path:
    return checkpoint.present(home(machine, kind))[0]


def used(machine: Machine, kind: str) -> Machine:
    machine.create(kind)
    for seed in range(3):
        machine.push(kind, seed)
    return machine


@pytest.mark.parametrize("kind", SETS)
def test_the_safetensors_library_reads_every_tensor_by_its_name(machine: Machine, kind: str) -> None:
    used(machine, kind).checkpoint(kind)
    for name, arrays in machine.state(kind).entries().items():
        there = safetensors.numpy.load_file(newest(machine, kind) / f"{name}.safetensors")
        assert there.keys() == arrays.keys()
        for tensor, array in arrays.items():
            assert there[tensor].dtype == array.dtype
            np.testing.assert_array_equal(there[tensor], array)


def test_nobody_else_may_read_what_is_kept(machine: Machine) -> None:
    used(machine, "adam-always").checkpoint("adam-always")
    for path in home(machine, "adam-always").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_set_goes_on_with_the_bits_that_it_would_have_had(
    machine: Machine, tmp_path: Path, kind: str, killed: bool
) -> None:
    """Its next updates, too; while a set with fresh state would make others."""
    used(machine, kind).checkpoint(kind)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    if not killed:
        machine.stop()
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        machine = Machine(tmp_path / "data")
    resumed, fresh = Machine(tmp_path / "copy"), Machine(tmp_path / "fresh")
    fresh.create(kind)
    for each in (machine, resumed, fresh):
        for seed in (10, 11):
            each.push(kind, seed)
    cold = fingerprint(fresh.state(kind), everywhere=True).content
    warm = [fingerprint(each.state(kind), everywhere=True).content for each in (machine, resumed)]
    assert warm[0] == warm[1] != cold
    for each in (machine, resumed, fresh):
        each.abandon()


def test_two_checkpoints_are_kept_and_the_older_one_goes_on_if_the_newer_is_damaged(
    machine: Machine, tmp_path: Path
) -> None:
    used(machine, "adam-always").checkpoint("adam-always")
    machine.push("adam-always", 3)
    machine.checkpoint("adam-always")
    machine.push("adam-always", 4)
    before = fingerprint(machine.state("adam-always"))
    assert [checkpoint.event_of(each) for each in checkpoint.present(home(machine, "adam-always"))] == [4, 3]
    (newest(machine, "adam-always") / "exp_avg.safetensors").write_bytes(b"\0" * 5040)
    with capture_logs() as logs, restarted(machine, tmp_path) as again:
        assert fingerprint(again.state("adam-always")) == before
        assert any(each["log_level"] == "error" and "damaged" in each["event"] for each in logs)
        again.checkpoint("adam-always")
        (newest(again, "adam-always") / "manifest.json").unlink()
        with restarted(again, tmp_path) as third:
            assert fingerprint(third.state("adam-always")) == before


def test_of_checkpoints_that_are_damaged_again_and_again_one_is_set_aside(machine: Machine, tmp_path: Path) -> None:
    used(machine, "adam-off").checkpoint("adam-off")
    machine.push("adam-off", 3)
    for _ in range(3):
        machine.checkpoint("adam-off")
        (newest(machine, "adam-off") / "manifest.json").unlink()
        machine.die()
        machine = Machine(tmp_path / "data")
        assert machine.state("adam-off").events == 3
        machine.push("adam-off", 3)
    machine.abandon()


def test_a_checkpoint_that_had_more_than_the_journal_leads_to_is_not_passed_over(
    machine: Machine, tmp_path: Path
) -> None:
    used(machine, "adam-always").checkpoint("adam-always")
    (newest(machine, "adam-always") / "manifest.json").unlink()
    for segment in home(machine, "adam-always").glob("journal-*"):
        segment.unlink()
    with restarted(machine, tmp_path) as again:
        assert not again.sets()
        with pytest.raises(ParameterSetExists, match="the journal leads from the one before to event 0 only"):
            again.create("adam-always")


def test_a_checkpoint_that_can_not_be_opened_is_not_taken_for_damaged(machine: Machine, tmp_path: Path) -> None:
    for _ in range(2):
        used(machine, "adam-off") if not machine.sets() else machine.push("adam-off", 3)
        machine.checkpoint("adam-off")
    too_many = OSError(errno.EMFILE, "Too many open files")
    with mock.patch.object(checkpoint, "read", side_effect=too_many), restarted(machine, tmp_path) as again:
        with pytest.raises(ParameterSetExists, match="Too many open files"):
            again.create("adam-off")
        with restarted(again, tmp_path):
            pass
    with restarted(machine, tmp_path) as third:
        assert third.state("adam-off").events == 4


def rewritten(path: Path, **changes: Any) -> None:
    record = json.loads((path / "manifest.json").read_text().splitlines()[0])
    record.update(changes)
    text = json.dumps(record).encode()
    digest = manifest.hashlib.sha256(text).hexdigest().encode()
    (path / "manifest.json").write_bytes(text + b"\n" + digest + b"\n")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 99}, "another version wrote it"),
        ({"spec": {"id": "adam-always", "optimizer": {"rule": "Unheard"}}}, "Unheard"),
        ({"sessions": "nonsense"}, "damaged"),
        ({"spec": {"field": "unheard of"}}, "unheard|damaged|field"),
    ],
    ids=["format", "rule", "nonsense", "field"],
)
def test_what_this_server_can_not_read_is_kept_and_its_id_refused_and_the_others_come_back(
    machine: Machine, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    used(machine, "adam-off").checkpoint("adam-off")
    used(machine, "adam-always")
    for path in checkpoint.present(home(machine, "adam-always")):
        rewritten(path, **changes)
    there = sorted(each.name for each in home(machine, "adam-always").iterdir())
    kept = home(machine, "adam-always")
    with restarted(machine, tmp_path) as again:
        assert [*again.sets()] == ["adam-off"]
        with pytest.raises(ParameterSetExists, match=f"(?s)could not restore it.*({why})"):
            again.create("adam-always")
        assert sorted(each.name for each in kept.iterdir()) == there


@pytest.mark.parametrize("kind", ["adam-off", "adam-always"])
def test_a_set_whose_creation_was_not_finished_can_be_created_again(
    machine: Machine, tmp_path: Path, kind: str
) -> None:
    """A server killed in the middle of it has told nobody that the set is there."""
    with (
        mock.patch.object(checkpoint.Draft, "publish", side_effect=KeyboardInterrupt),
        contextlib.suppress(KeyboardInterrupt),
    ):
        machine.create(kind)
        machine.checkpoint(kind)
    with restarted(machine, tmp_path) as again:
        assert not again.sets()
        used(again, kind)


def test_a_creation_that_fails_leaves_nothing_and_can_be_tried_again(machine: Machine, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for what in ("fsync", "posix_fallocate", "pwritev", "mkdir", "rename", "fdatasync"):
        with mock.patch.object(os, what, side_effect=full), pytest.raises(StorageFailed, match="not created.*No space"):
            machine.create("adam-always")
        assert not machine.sets()
    used(machine, "adam-always")
    before = fingerprint(machine.state("adam-always"))
    assert [each.name for each in (tmp_path / "data" / "sets").iterdir()] == [home(machine, "adam-always").name]
    with restarted(machine, tmp_path) as again:
        assert fingerprint(again.state("adam-always")) == before


def test_a_set_that_could_not_be_deleted_whole_does_not_come_back_in_the_place_of_a_new_one(
    machine: Machine, tmp_path: Path
) -> None:
    broken = OSError(errno.EIO, "Input/output error")
    for _ in range(2):
        used(machine, "adam-off").checkpoint("adam-off")
        with mock.patch.object(files, "rename", side_effect=broken), pytest.raises(StorageFailed, match="Input/output"):
            machine.delete("adam-off")
        machine.push("adam-off", 3)  # it is still there, and not half
        machine.checkpoint("adam-off")
        with mock.patch.object(shutil, "rmtree", side_effect=broken):
            machine.delete("adam-off")
    machine.create("adam-off")
    machine.push("adam-off", 7)
    machine.checkpoint("adam-off")
    with restarted(machine, tmp_path) as again:
        assert again.state("adam-off").events == 1


def test_a_checkpoint_that_fails_leaves_no_files_behind_and_the_last_one_counts(
    machine: Machine, tmp_path: Path
) -> None:
    used(machine, "adam-always").checkpoint("adam-always")
    machine.push("adam-always", 3)
    before = fingerprint(machine.state("adam-always"))
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    full = OSError(errno.ENOSPC, "No space left on device")
    for what in ("posix_fallocate", "pwritev", "rename", "fdatasync"):
        with mock.patch.object(os, what, side_effect=full), pytest.raises(StorageFailed, match="No space"):
            machine.checkpoint("adam-always")
    assert [*home(machine, "adam-always").glob("*.new")] == []
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    with restarted(machine, tmp_path) as again:
        assert fingerprint(again.state("adam-always")) == before


def test_old_files_that_can_not_be_removed_do_not_make_a_checkpoint_fail(machine: Machine) -> None:
    used(machine, "adam-off")
    for seed in range(3):
        machine.push("adam-off", seed)
        with mock.patch.object(shutil, "rmtree", side_effect=OSError(errno.EIO, "Input/output error")):
            machine.checkpoint("adam-off")
        assert machine.sets()["adam-off"].watermark.checkpoint == 4 + seed


def test_the_threads_of_the_schedule_survive_what_they_do_not_expect(machine: Machine) -> None:
    used(machine, "adam-off")
    (keeper,) = machine.directory.keepers
    checkpoints = mock.Mock(side_effect=[MemoryError("once"), None, None, None])
    syncs = mock.Mock(side_effect=[RuntimeError("once"), *[None] * 100_000])
    with (
        mock.patch.object(type(machine.directory), "checkpoint", checkpoints),
        mock.patch.object(type(keeper), "sync_if_due", syncs),
        mock.patch.object(schedule, "WINDOW", 0.01),
    ):
        running = Schedule(machine.directory, 0.01, lambda: None)
        while checkpoints.call_count < 2 or syncs.call_count < 2:
            running.wake()
        running.close()
