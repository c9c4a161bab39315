"""Journals: what is on stable storage when, what a crash leaves of it, and what damage is."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from structlog.testing import capture_logs
from tests.torture.machine import GRAIN, Clock, Machine, fingerprint, small_journals

from optserve import Durability, ParameterSetExists, StorageFailed
from optserve_server.storage import checkpoint, files, journal, keeper
from optserve_server.storage.files import File


@pytest.fixture
def clock() -> Iterator[Clock]:
    with small_journals() as clock:
        yield clock


@pytest.fixture
def machine(tmp_path: Path, clock: Clock) -> Iterator[Machine]:
    machine = Machine(tmp_path / "data")
    yield machine
    machine.abandon()


def restarted(machine: Machine, tmp_path: Path) -> Machine:
    """Another on the same files, after the first was killed."""
    machine.die()
    return Machine(tmp_path / "data")


def home(machine: Machine, kind: str) -> Path:
    (found,) = (each.home for each in machine.directory.keepers if each.parameter_set.spec.id == kind)
    return found


def syncs() -> Any:
    return mock.patch.object(File, "sync", autospec=True, side_effect=File.sync)


def test_pushes_that_wait_at_the_same_time_share_a_sync(machine: Machine) -> None:
    machine.create("adam-always")
    machine.push("adam-always", 0)
    began, go_on = threading.Event(), threading.Event()

    def sync(file: File) -> None:
        began.set()
        assert go_on.wait(60)

    parameter_set = machine.sets()["adam-always"]
    clients = [f"worker-{k}" for k in range(6)]
    answers: list[Any] = []

    def push(client: str) -> None:
        answers.append(machine._push("adam-always", client, 1, bad=False, again=False, epoch=0))

    with mock.patch.object(File, "sync", autospec=True, side_effect=sync) as synced:
        threads = [threading.Thread(target=push, args=[client]) for client in clients]
        threads[0].start()
        assert began.wait(60)
        for thread in threads[1:]:
            thread.start()
        while parameter_set.events < 1 + len(clients):  # until all are applied
            threading.Event().wait(0.001)
        assert not answers
        go_on.set()
        for thread in threads:
            thread.join()
    assert synced.call_count == 2
    assert {each.durability for each in answers} == {Durability.JOURNAL}


def test_every_push_waits_for_its_sync_with_always_and_for_none_with_everysec(machine: Machine) -> None:
    for kind, expected in (("adam-always", Durability.JOURNAL), ("sgd-everysec", Durability.MEMORY)):
        machine.create(kind)
        with syncs() as synced:
            (receipt,) = machine.push(kind, 0)
        assert receipt.durability is expected
        assert synced.called is (expected is Durability.JOURNAL)


def test_with_everysec_half_a_second_passes_at_most_before_events_are_synced(machine: Machine, clock: Clock) -> None:
    machine.create("sgd-everysec")
    machine.push("sgd-everysec", 0)
    parameter_set = machine.sets()["sgd-everysec"]
    machine.sync()
    assert parameter_set.watermark.reached(1) is Durability.MEMORY
    clock.now += journal.WINDOW / 2
    machine.sync()
    assert parameter_set.watermark.reached(1) is Durability.JOURNAL
    (again,) = machine.push("sgd-everysec", 0, again=True)
    assert (again.duplicate, again.durability) == (True, Durability.JOURNAL)


def test_with_everysec_a_push_waits_when_the_disk_stalls_for_longer_than_the_window(
    machine: Machine, clock: Clock
) -> None:
    machine.create("sgd-everysec")
    machine.push("sgd-everysec", 0)
    clock.now += 2 * journal.WINDOW
    answered = threading.Event()
    waits = threading.Event()
    wait = threading.Condition.wait

    def noted(condition: threading.Condition, timeout: float | None = None) -> bool:
        if condition is machine.directory.keepers[0]._journal._changed:  # type: ignore[union-attr]
            waits.set()
        return wait(condition, timeout)

    def push() -> None:
        machine.push("sgd-everysec", 1)
        answered.set()

    with mock.patch.object(threading.Condition, "wait", noted):
        thread = threading.Thread(target=push)
        thread.start()
        assert waits.wait(60)
        assert not answered.is_set()
        machine.sync()
        assert answered.wait(60)
        thread.join()


def test_a_journal_grows_by_whole_grains_and_a_checkpoint_begins_another_segment(machine: Machine) -> None:
    machine.create("adam-always")
    for seed in range(10):
        machine.push("adam-always", seed)
    (segment,) = home(machine, "adam-always").glob("journal-*")
    assert segment.stat().st_size > GRAIN
    assert segment.stat().st_size % GRAIN == 0
    machine.checkpoint("adam-always")
    names = sorted(each.name for each in home(machine, "adam-always").glob("journal-*"))
    assert names == [f"journal-{1:020d}", f"journal-{11:020d}"]


def test_segments_are_removed_when_no_kept_checkpoint_needs_them_and_not_before(machine: Machine) -> None:
    machine.create("adam-always")
    for events in range(1, 6):
        machine.push("adam-always", events)
        machine.checkpoint("adam-always")
        kept = [checkpoint.event_of(each) for each in checkpoint.present(home(machine, "adam-always"))]
        assert kept == [events, events - 1]
        first = [first for first, _ in journal.segments(home(machine, "adam-always"))]
        assert first == [events, events + 1]


def test_a_disk_that_is_full_refuses_a_push_before_anything_changes_and_takes_the_next(
    machine: Machine, tmp_path: Path
) -> None:
    machine.create("adam-always")
    machine.push("adam-always", 0)
    before = fingerprint(machine.state("adam-always"))
    with (
        mock.patch.object(files, "_write", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(StorageFailed, match="nothing was applied.*No space"),
    ):
        machine.push("adam-always", 1)
    assert fingerprint(machine.state("adam-always")) == before
    machine.push("adam-always", 1)
    after = fingerprint(machine.state("adam-always"))
    again = restarted(machine, tmp_path)
    assert fingerprint(again.state("adam-always")) == after
    again.abandon()


def test_what_a_failed_write_left_is_not_taken_for_the_event_that_came_instead(
    machine: Machine, tmp_path: Path
) -> None:
    """A small record is there whole though its write failed; a large one, which begins at a page of its own, comes next."""
    machine.create("large")
    write = files._write

    def late(descriptor: int, buffers: Any, offset: int) -> int:
        write(descriptor, buffers, offset)
        raise OSError(errno.EIO, "Input/output error")

    with mock.patch.object(files, "_write", late), pytest.raises(StorageFailed):
        machine.update("large", 0.5)
    for seed in range(2):
        machine.push("large", seed)
    after = fingerprint(machine.state("large"))
    again = restarted(machine, tmp_path)
    assert fingerprint(again.state("large")) == after
    again.abandon()


def test_what_fails_while_an_event_is_encoded_leaves_the_journal_as_it_was(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    with mock.patch.object(files, "_write", side_effect=MemoryError), pytest.raises(MemoryError):
        machine.push("adam-always", 0)
    machine.push("adam-always", 0)
    after = fingerprint(machine.state("adam-always"))
    again = restarted(machine, tmp_path)
    assert fingerprint(again.state("adam-always")) == after
    again.abandon()


def test_after_an_error_of_a_sync_nothing_is_acknowledged_until_a_restart(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    with (
        mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "Input/output error")),
        capture_logs() as logs,
        pytest.raises(StorageFailed, match="Input/output error"),
    ):
        machine.push("adam-always", 0)
    assert [each["log_level"] for each in logs if each["event"] == "journal failed"] == ["error"]
    with pytest.raises(StorageFailed, match="until a restart"):
        machine.push("adam-always", 1)
    again = restarted(machine, tmp_path)
    assert again.push("adam-always", 1)[0].durability is Durability.JOURNAL
    again.abandon()


def test_a_server_that_comes_back_says_what_of_each_session_is_durable(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    for seed in range(3):
        machine.push("adam-always", seed)
    again = restarted(machine, tmp_path)
    (session,) = again.sets()["adam-always"]._sessions.copy()
    assert (session.last_sequence, session.durable_sequence) == (3, 3)
    assert again.sets()["adam-always"].position.durable_version == 3
    again.abandon()


def test_who_takes_over_the_directory_ends_the_acknowledgements_of_the_server_before(
    machine: Machine, tmp_path: Path
) -> None:
    """Also if it does so after events were written and before they are acknowledged: it may have read the journal by then."""
    for kind in ("adam-always", "adam-off"):
        machine.create(kind)
    machine.push("adam-always", 0)
    machine.push("adam-off", 0)
    sync = File.sync

    def taken_over(file: File) -> None:
        sync(file)
        (tmp_path / "data" / "OWNER").write_bytes(b"another")

    with mock.patch.object(File, "sync", taken_over), pytest.raises(StorageFailed, match="taken over"):
        machine.push("adam-always", 1)
    with pytest.raises(StorageFailed, match="taken over"):
        machine.checkpoint("adam-off")
    assert not checkpoint.present(home(machine, "adam-off"))


def test_a_checkpoint_is_not_published_if_another_server_took_over_while_it_was_written(
    machine: Machine, tmp_path: Path
) -> None:
    machine.create("adam-off")
    sync = File.sync

    def taken_over(file: File) -> None:
        sync(file)
        (tmp_path / "data" / "OWNER").write_bytes(b"another")

    with mock.patch.object(File, "sync", taken_over), pytest.raises(StorageFailed, match="taken over"):
        machine.checkpoint("adam-off")
    assert not checkpoint.present(home(machine, "adam-off"))


def torn(segment: Path, place: int) -> None:
    data = bytearray(segment.read_bytes())
    data[place] ^= 1
    segment.write_bytes(data)


def test_the_end_of_a_journal_that_nobody_knew_to_be_stored_is_passed_over_loudly(
    machine: Machine, tmp_path: Path
) -> None:
    machine.create("adam-always")
    machine.push("adam-always", 0)
    before = fingerprint(machine.state("adam-always"))
    place = len((segment := next(home(machine, "adam-always").glob("journal-*"))).read_bytes().rstrip(b"\0"))
    machine.push("adam-always", 1)
    torn(segment, place + 100)
    with capture_logs() as logs:
        again = restarted(machine, tmp_path)
    assert fingerprint(again.state("adam-always")) == before
    assert "warning" in {each["log_level"] for each in logs}
    again.push("adam-always", 1)
    after = fingerprint(again.state("adam-always"))
    third = restarted(again, tmp_path)
    assert fingerprint(third.state("adam-always")) == after
    third.abandon()


def test_damage_before_the_end_of_a_journal_keeps_the_set_off_the_server(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    for seed in range(3):
        machine.push("adam-always", seed)
    torn(next(home(machine, "adam-always").glob("journal-*")), 200)
    with capture_logs() as logs:
        again = restarted(machine, tmp_path)
    assert "error" in {each["log_level"] for each in logs}
    assert not again.sets()
    with pytest.raises(ParameterSetExists, match="is damaged, or missing"):
        again.create("adam-always")
    again.abandon()


def test_a_segment_that_a_crash_left_half_grown_is_no_damage(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    machine.push("adam-always", 0)
    before = fingerprint(machine.state("adam-always"))
    segment = next(home(machine, "adam-always").glob("journal-*"))
    machine.die()
    os.truncate(segment, 2 * GRAIN + 512)
    again = Machine(tmp_path / "data")
    assert fingerprint(again.state("adam-always")) == before
    again.abandon()


def test_a_server_killed_while_a_set_is_rewound_comes_back_with_it(machine: Machine, tmp_path: Path) -> None:
    """The journal has begun the segment that follows the rewound state, which is not there."""
    machine.create("adam-always")
    for seed in range(3):
        machine.push("adam-always", seed)
    before = fingerprint(machine.state("adam-always"))

    def killed(*arguments: Any) -> None:
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        raise OSError(errno.EIO, "Input/output error")

    with mock.patch.object(keeper, "Draft", killed), pytest.raises(StorageFailed):
        machine.rewind("adam-always", 1)
    again = Machine(tmp_path / "copy")
    assert fingerprint(again.state("adam-always")) == before
    again.abandon()


def test_a_rewind_that_fails_changes_nothing_and_what_follows_is_kept(machine: Machine, tmp_path: Path) -> None:
    machine.create("adam-always")
    for seed in range(3):
        machine.push("adam-always", seed)
    before = fingerprint(machine.state("adam-always"))
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(checkpoint.Draft, "publish", side_effect=full),
        pytest.raises(StorageFailed, match="No space"),
    ):
        machine.rewind("adam-always", 1)
    assert fingerprint(machine.state("adam-always")) == before
    for seed in range(3, 6):
        machine.push("adam-always", seed)
        machine.checkpoint("adam-always")
        machine.push("adam-always", seed, bad=True)
        after = fingerprint(machine.state("adam-always"))
        machine = restarted(machine, tmp_path)
        assert fingerprint(machine.state("adam-always")) == after
    machine.abandon()
