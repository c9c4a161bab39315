"""The replay window: what it keeps within its limit, and that nobody can change it."""

import json
from dataclasses import asdict

import numpy as np
import pytest

import optserve
from optserve import formats
from optserve._compression import Compressor
from optserve._exchange import OutgoingPush
from optserve._window import Window

SIZE = 256  # bytes of a push


def push(value: float = 0.0) -> OutgoingPush:
    return OutgoingPush({"x": np.full(SIZE // 4, value, np.float32)}, {}, {})


def filled(limit: int, count: int) -> Window:
    window = Window(limit)
    for sequence in range(1, count + 1):
        window.keep(sequence, push(sequence), None)
    return window


def sequences(window: Window, after: int, through: int) -> list[int] | None:
    found = window.covering(after, through)
    return None if found is None else [kept.sequence for kept in found]


def test_it_covers_what_fits_and_drops_the_oldest() -> None:
    window = filled(3 * SIZE + 100, 5)
    assert window.nbytes == 3 * SIZE
    assert sequences(window, 2, 5) == [3, 4, 5]
    assert sequences(window, 3, 4) == [4]
    assert sequences(window, 5, 5) == []
    assert sequences(window, 1, 5) is None
    assert sequences(window, 2, 6) is None


def test_without_room_it_covers_nothing_not_even_no_push() -> None:
    assert sequences(filled(0, 2), 2, 2) is None


def test_what_is_on_stable_storage_is_not_kept() -> None:
    window = filled(10 * SIZE, 5)
    window.trim(3)
    assert window.nbytes == 2 * SIZE
    assert sequences(window, 3, 5) == [4, 5]
    assert sequences(window, 2, 5) is None
    window.trim(7)
    window.keep(6, push(), None)
    assert window.nbytes == 0
    window.keep(8, push(), None)
    assert sequences(window, 7, 8) == [8]


def test_a_push_that_never_fits_leaves_a_gap_before_which_nothing_is_of_use() -> None:
    window = filled(3 * SIZE, 2)
    window.keep(3, OutgoingPush({"x": np.zeros(SIZE, np.float32)}, {}, {}), None)
    assert window.nbytes == 0
    window.keep(4, push(), None)
    assert sequences(window, 3, 4) == [4]
    assert sequences(window, 2, 4) is None


def test_a_sequence_that_is_given_anew_takes_the_place_of_the_push_that_was_not_consumed() -> None:
    window = filled(10 * SIZE, 3)
    window.keep(3, push(33), None)
    kept = window.covering(2, 3)
    assert kept is not None
    assert [float(each.push.gradients["x"][0]) for each in kept] == [33]
    window.drop_after(1)
    assert sequences(window, 0, 1) == [1]
    assert sequences(window, 0, 2) is None


def test_copies_are_of_all_that_a_push_has_and_nobody_elses() -> None:
    base = optserve.Position(1, 2)
    original = OutgoingPush(
        {"x": np.ones((3, 5), np.float32), "empty": np.zeros((0, 2), np.float64), "scalar": np.float32(7).reshape(())},
        {"x": np.full((3, 5), 2, np.float32)},
        {"default": {"lr": 0.5}},
        loss_scale=8.0,
        rows={"x": np.array([4, 5, 6])},
    )
    window = Window(1 << 20)
    window.keep(1, original, base)
    declared = original.declared
    original.gradients["x"][:] = original.parameters["x"][:] = np.nan
    original.rows["x"][:] = 0  # type: ignore[index]
    original.changes["default"]["lr"] = 9  # type: ignore[index]
    (kept,) = window.covering(0, 1) or []
    assert kept.base == base
    assert kept.push.declared == declared
    assert kept.push.changes == {"default": {"lr": 0.5}}
    assert kept.push.loss_scale == 8.0
    assert (kept.push.gradients["x"] == 1).all()
    assert (kept.push.parameters["x"] == 2).all()
    assert kept.push.gradients["scalar"] == 7
    assert window.nbytes == kept.nbytes >= 2 * 60 + 4 + 24


def test_of_a_compressed_push_it_keeps_the_payloads_and_not_the_gradients() -> None:
    gradients = {"x": np.random.default_rng(0).normal(size=100_000).astype(np.float32)}
    compressed = Compressor(formats.Int8()).begin(gradients)
    window = Window(1 << 20)
    window.keep(1, OutgoingPush(gradients, {}, {}, compressed), None)
    assert window.nbytes == formats.Int8().encoded_size(100_000)
    sent = [bytes(payload.buffer) for payload in compressed.payloads()]
    assert sum(map(len, sent)) == window.nbytes
    compressed.decided(taken=True)
    gradients["x"][:] = 0
    (kept,) = window.covering(0, 1) or []
    assert kept.push.compressed is not None
    assert [bytes(payload.buffer) for payload in kept.push.compressed.payloads()] == sent
    assert kept.push.compressed.gradients == {}
    assert kept.push.gradients["x"].base is not gradients["x"]
    assert [spec.shape for spec, _, _, _ in kept.push.declared] == [(100_000,)]


def test_memory_is_used_again_within_the_limit() -> None:
    window = filled(4 * SIZE, 4)
    memories = {each.memory.ctypes.data for each in window.covering(0, 4) or []}
    for sequence in range(5, 20):
        window.keep(sequence, push(sequence), None)
        kept = window.covering(sequence - 4, sequence)
        assert kept is not None
        assert {each.memory.ctypes.data for each in kept} == memories
        assert [each.push.gradients["x"][0] for each in kept] == [*range(sequence - 3, sequence + 1)]
    window.trim(19)
    window.keep(20, OutgoingPush({"x": np.zeros(3 * SIZE // 4, np.float32)}, {}, {}), None)
    assert window.nbytes + sum(spare.size for spare in window._spares) <= 4 * SIZE


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1"])
def test_a_limit_is_a_number_of_bytes(memory_client: optserve.Client, limit: object) -> None:
    with pytest.raises(optserve.InvalidArgument, match="replay_window_bytes"):
        memory_client.parameter_set("a", replay_window_bytes=limit)  # type: ignore[arg-type]


def test_an_identity_survives_json() -> None:
    identity = optserve.Identity("worker-1", 2**63 + 1, 12)
    assert optserve.Identity(**json.loads(json.dumps(asdict(identity)))) == identity
    assert str(optserve.Identity.__module__) == "optserve"
