"""Optimizer state in fewer bits: what rounding does to it, and that nothing else does."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
from direct import DirectSet
from optserve import Holds, StateFormat, optim, schedules
from optserve._messages import decode_spec, encode_spec
from optserve._specification import ParameterSetSpec, Run, TensorSpec
from optserve_server.engine.push import Declared
from optserve_server.engine.slot_formats import code_book

Array = np.ndarray[Any, Any]

ENCODED = (StateFormat.BFLOAT16, StateFormat.INT8)
SHAPES = {"small": (7,), "matrix": (111, 301), "long": (70_001,), "scalar": ()}
ADAM = optim.Adam(lr=0.01)
ITSELF = optim.AveragedMomentum(lr=0.0, beta=0.0)  # whose average is the gradient
WEYL, BLOCK, RECORD = 0x9E3779B1, 256, 260

encoded = pytest.mark.parametrize("state", ENCODED, ids=lambda state: state.value)


def tensors(seed: int) -> dict[str, Array]:
    """With scales from 1e-4 to 1e1."""
    rng = np.random.default_rng(seed)
    scaled = {name: 10.0 ** rng.uniform(-4, 1, shape) * rng.normal(size=shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(value, np.float32) for name, value in scaled.items()}


def gradients(count: int = 4) -> list[dict[str, Array]]:
    return [tensors(100 + k) for k in range(count)]


def run(state: StateFormat, pushes: Sequence[dict[str, Array]], **options: Any) -> DirectSet:
    direct = DirectSet(tensors(0), options.pop("optimizer", ADAM), state=state, **options)
    for each in pushes:
        receipt = direct.push(each)
        assert receipt.applied, receipt
    return direct


def slots(direct: DirectSet) -> dict[str, Array]:
    return {name: array for name, arena in direct.set._slots.items() for array in arena.values()}


def assert_same(left: DirectSet, right: DirectSet) -> None:
    for ours, theirs in ((left.pull(), right.pull()), (slots(left), slots(right))):
        for name, expected in theirs.items():
            np.testing.assert_array_equal(ours[name], expected)


def widened(halves: Array) -> Array:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def random_bits(begin: int, size: int, t: int, slot: int) -> Array:
    """uint64 [size]: a Weyl sequence, shifted by MurmurHash3's finalizer of update and slot."""
    x = (t * WEYL + slot) % 2**32
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return (np.arange(begin, begin + size, dtype=np.uint64) * WEYL + (x ^ x >> 16)) % 2**32


def book_of_bitsandbytes(*, signed: bool) -> Array:
    """The positive half of `create_dynamic_map` of bitsandbytes 0.50, written anew."""
    values = [0.0, 1.0]
    for k in range(7):
        edges = np.linspace(0.1, 1, 2 ** (k if signed else k + 1) + 1, dtype=np.float32)
        values += [10.0 ** (k - 6) * float(low + high) / 2 for low, high in itertools.pairwise(edges)]
    return np.sort(np.array(values))


def decoded(record: Array, *, signed: bool) -> tuple[Array, Array]:
    """Values of int8 blocks [n, BLOCK] and their scales [n, 1]."""
    records = record.reshape(-1, RECORD)
    scales = np.ascontiguousarray(records[:, :4]).view(np.float32)
    return code_book(signed=signed)[records[:, 4:]] * scales, scales


class TestBits:
    """They depend on what was pushed, and on nothing else."""

    @encoded
    def test_threads_chunks_a_restart_and_a_shared_pass_change_none(self, state: StateFormat) -> None:
        pushes = gradients()
        expected = run(state, pushes, threads=1)
        assert_same(run(state, pushes, threads=3), expected)
        assert_same(run(state, pushes, chunk_bytes=1 << 14), expected)
        continued = run(state, pushes[:2]).restored()
        for each in pushes[2:]:
            continued.push(each)
        assert_same(continued, expected)
        together = run(state, ())
        together.push_together(pushes)
        assert_same(together, expected)

    @encoded
    def test_segments_that_end_inside_of_a_block_change_none(self, state: StateFormat) -> None:
        expected, pieces = run(state, gradients(2)), run(state, gradients(1))
        gradient = gradients(2)[1]
        specs = [TensorSpec.of(name, array) for name, array in gradient.items()]
        push = pieces.set.begin(2, [Declared(spec) for spec in specs])
        for k, array in enumerate(gradient.values()):
            cuts = sorted({0, *(cut for cut in (1, 100, 5000, 5003, 12_289) if cut < array.size), array.size})
            for begin, end in itertools.pairwise(cuts):
                data = array.reshape(-1)[begin:end]
                push.add([Run(k, begin, end - begin)], data.tobytes(), replace=False)
        push.finish()
        pieces.set.push(pieces.session, pieces, push, pull=False)
        assert_same(pieces, expected)

    @encoded
    def test_the_wire_changes_none(
        self,
        state: StateFormat,
        memory_client: optserve.Client,
        tcp_client: optserve.Client,
        new_id: Callable[[], str],
    ) -> None:
        expected = run(state, gradients()).pull()
        for client in (memory_client, tcp_client):
            with client.create_parameter_set(new_id(), tensors(0), ADAM, state=state.value) as weights:
                for each in gradients():
                    weights.push(each)
                pulled = weights.pull()
                assert weights.describe().spec.state is state
                weights.delete()
            for name, value in expected.items():
                np.testing.assert_array_equal(pulled[name], value)

    @encoded
    def test_a_checkpoint_on_disk_keeps_all(self, state: StateFormat, tmp_path: Path) -> None:
        restored = run(state, gradients(2)).stored(tmp_path)
        restored.push(gradients(3)[2])
        assert_same(restored, run(state, gradients(3)))

    @encoded
    def test_sets_of_moments_have_the_same_state(self, state: StateFormat) -> None:
        ours, theirs = (run(state, gradients(2), holds=holds) for holds in (Holds.MOMENTS, Holds.PARAMETERS))
        for name, expected in slots(theirs).items():
            np.testing.assert_array_equal(slots(ours)[name], expected)


def is_denormal(x: Array) -> Array:
    """What updates take for zero."""
    return (x != 0) & (np.abs(x) < np.finfo(np.float32).tiny)


class TestBfloat16:
    def test_adam_equals_its_transcription_to_the_bit(self) -> None:
        pushes = gradients()
        direct = run(StateFormat.BFLOAT16, pushes)
        begin = 16  # of "matrix" in the arena, behind "small"
        parameter = tensors(0)["matrix"].reshape(-1)
        m, v = np.zeros((2, parameter.size), np.float32)
        for t, each in enumerate(pushes, start=1):
            g = each["matrix"].reshape(-1)
            m = m + np.float32(1 - 0.9) * (g - m)
            v = v + np.float32(1 - 0.999) * (g * g - v)
            root = np.sqrt(v) * np.float32(1 / np.sqrt(1 - 0.999**t)) + np.float32(1e-8)
            parameter = parameter - np.float32(0.01 / (1 - 0.9**t)) * m / root
            m, v = (self.rounded(x, begin, t, slot) for slot, x in enumerate((m, v)))
        np.testing.assert_array_equal(direct.pull()["matrix"].reshape(-1), parameter)
        for name, expected in (("exp_avg", m), ("exp_avg_sq", v)):
            np.testing.assert_array_equal(widened(slots(direct)[name])[begin : begin + m.size], expected)

    @staticmethod
    def rounded(x: Array, begin: int, t: int, slot: int) -> Array:
        bits = x.view(np.uint32).astype(np.uint64) + (random_bits(begin, x.size, t, slot) >> 16)
        return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)

    def test_what_is_bfloat16_already_stays_as_it_is(self) -> None:
        every = np.arange(1 << 16, dtype=np.uint16)
        finite = every[np.isfinite(widened(every)) & ~is_denormal(widened(every))]
        direct = DirectSet({"x": np.zeros(finite.size, np.float32)}, ITSELF, state=StateFormat.BFLOAT16)
        direct.push({"x": widened(finite)})
        np.testing.assert_array_equal(widened(slots(direct)["exp_avg"][: finite.size]), widened(finite))

    def test_values_become_one_of_their_neighbours_and_are_right_on_average(self) -> None:
        values = np.random.default_rng(1).normal(size=20_000).astype(np.float32)
        below = widened((values.view(np.uint32) >> 16).astype(np.uint16))
        step = np.spacing(below) * 2.0**16
        direct = DirectSet({"x": values}, ITSELF, state=StateFormat.BFLOAT16)
        kept = []
        for _ in range(64):
            direct.push({"x": values})
            kept.append(widened(slots(direct)["exp_avg"][: values.size]))
            assert np.all((kept[-1] == below) | (kept[-1] == below + step))
        errors = (np.mean(kept, axis=0, dtype=np.float64) - values) / step
        assert abs(np.mean(errors)) < 1e-3
        assert np.abs(errors).max() < 6 * 0.5 / np.sqrt(64)


class TestInt8:
    @pytest.mark.parametrize("signed", [False, True])
    def test_the_code_book_is_that_of_bitsandbytes(self, signed: bool) -> None:
        expected = book_of_bitsandbytes(signed=signed)
        ours = code_book(signed=signed).astype(np.float64)
        assert len(set(ours)) == 256
        np.testing.assert_allclose(np.sort(ours[ours >= 0]), expected, rtol=1e-6)
        np.testing.assert_allclose(np.sort(-ours[ours < 0]), expected[1:-1] if signed else [], rtol=1e-6)

    def test_adam_equals_its_transcription(self) -> None:
        """One update at a time: between two codes, float32 and float64 may differ on which, for one element in 10 000."""
        direct = run(StateFormat.INT8, gradients(2))
        begin, size = BLOCK, int(np.prod(SHAPES["matrix"]))  # of "matrix", behind "small"
        place = slice(begin, begin + size)
        g = gradients(3)[2]["matrix"].reshape(-1)
        before = {name: decoded(array, signed=name == "exp_avg")[0] for name, array in slots(direct).items()}
        m, v = (before[name].reshape(-1)[place] for name in ("exp_avg", "exp_avg_sq"))
        direct.push(gradients(3)[2])
        m = m + np.float32(1 - 0.9) * (g - m)
        v = v + np.float32(1 - 0.999) * (g * g - v)
        for slot, (name, x) in enumerate((("exp_avg", m), ("exp_avg_sq", v))):
            kept, scales = decoded(slots(direct)[name], signed=slot == 0)
            blocks = np.pad(x, (0, -size % BLOCK)).reshape(-1, BLOCK)
            ours = scales[1 : 1 + len(blocks)]
            np.testing.assert_array_equal(ours[:, 0], np.abs(blocks).max(axis=1))
            expected = self.rounded(blocks / ours.astype(np.float64), begin, 3, slot) * ours
            differ = kept.reshape(-1)[place] != expected.astype(np.float32).reshape(-1)[:size]
            assert differ.mean() < 1e-4

    @staticmethod
    def rounded(x: Array, begin: int, t: int, slot: int) -> Array:
        signed = slot == 0
        book = code_book(signed=signed)
        cells = 1 if signed else 2
        lines = [cells * 2.0**k * (8 + 10.0 ** (7 - k) * np.abs(x)) / 9 - cells + 0.5 for k in range(7)]
        place = np.minimum(np.min(lines, axis=0), np.abs(x) / book[1])
        random = (random_bits(begin, x.size, t, slot) >> 8).reshape(x.shape) * 2.0**-24
        last = 127 if signed else 254
        code = np.minimum((place + random).astype(np.int64), last)
        code = np.where(x == 1, last + 1, code if signed else np.maximum(code, x > 0))
        return np.sign(x) * book[code]

    def test_values_become_one_of_the_codes_beside_them_and_are_right_on_average(self) -> None:
        rng = np.random.default_rng(2)
        values = (10.0 ** rng.uniform(-9, 1, 20_000) * rng.choice([-1, 1], 20_000)).astype(np.float32)
        direct = DirectSet({"x": values}, ITSELF, state=StateFormat.INT8)
        book, kept = book_of_bitsandbytes(signed=True), []
        for _ in range(64):
            direct.push({"x": values})
            each, scales = decoded(slots(direct)["exp_avg"], signed=True)
            scale = np.repeat(scales, BLOCK)[: values.size].astype(np.float64)
            kept.append(each.reshape(-1)[: values.size] / scale * np.sign(values))
        x = np.abs(values) / scale
        below = np.minimum(np.searchsorted(book, x, side="right"), 128) - 1
        step = book[below + 1] - book[below]
        assert np.all((np.array(kept) >= book[below] - 1e-6) & (np.array(kept) <= book[below + 1] + 1e-6))
        errors = (np.mean(kept, axis=0) - x) / step
        evenly = (below == 0) | (
            np.frexp(below)[1] == np.frexp(below + 1)[1]
        )  # not from one decade to the next, or to 1
        assert evenly.mean() > 0.5
        assert abs(np.mean(errors[evenly])) < 1e-3
        assert np.abs(errors[evenly]).max() < 6 * 0.5 / np.sqrt(64)

    def test_a_square_that_is_not_zero_stays_above_it(self) -> None:
        values = (10.0 ** np.random.default_rng(3).uniform(-12, 3, 5000)).astype(np.float32)
        values[::7] = 0.0
        direct = DirectSet({"x": values}, optim.RMSprop(lr=0.0, alpha=0.0), state=StateFormat.INT8)
        direct.push({"x": values})
        kept = decoded(slots(direct)["square_avg"], signed=False)[0].reshape(-1)[: values.size]
        np.testing.assert_array_equal(kept > 0, values > 0)

    def test_what_is_not_finite_spoils_its_block_and_no_more(
        self, memory_client: optserve.Client, new_id: Callable[[], str]
    ) -> None:
        start, gradient = {"x": np.ones(1000, np.float32)}, np.ones(1000, np.float32)
        gradient[300] = np.inf
        with memory_client.create_parameter_set(new_id(), start, ADAM, state="int8", guard=False) as weights:
            weights.push({"x": gradient})
            weights.push({"x": np.ones(1000, np.float32)})
            finite = np.isfinite(weights.pull()["x"])
        assert not finite[300]
        assert finite[:256].all()
        assert finite[512:].all()


class TestTraining:
    @encoded
    def test_an_average_that_moves_by_less_than_half_a_step_still_moves(self, state: StateFormat) -> None:
        largest = np.arange(4096) % BLOCK == 0
        direct = DirectSet({"x": np.zeros(4096, np.float32)}, optim.AveragedMomentum(lr=1.0, beta=0.998), state=state)
        for k in range(1500):  # the largest of each block are there first, and the others have to come up to them
            before = direct.pull()["x"]
            direct.push({"x": np.where(largest, 2.0, float(k >= 500)).astype(np.float32)})
        average = (before - direct.pull()["x"])[~largest]
        np.testing.assert_allclose(average.mean(), 1 - 0.998**1000, rtol=0.01)

    @encoded
    def test_adamw_ends_where_it_does_with_state_in_full(self, state: StateFormat) -> None:
        """Classification with features of scales from 1e-3 to 1, by the cross entropy on all samples."""
        rng = np.random.default_rng(4)
        features = rng.normal(size=(512, 64)) * np.logspace(-3, 0, 64)
        labels = np.argmax(features @ rng.normal(size=(64, 10)) + 0.3 * rng.normal(size=(512, 10)), axis=1)

        def loss_and_gradient(weights: Array, batch: Array) -> tuple[float, Array]:
            logits = features[batch] @ weights
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            odds /= odds.sum(axis=1, keepdims=True)
            chosen = np.arange(len(batch)), labels[batch]
            loss = -np.log(odds[chosen]).mean()
            odds[chosen] -= 1
            return float(loss), (features[batch].T @ odds / len(batch)).astype(np.float32)

        losses = []
        for each in (StateFormat.FULL, state):
            batches = np.random.default_rng(5)
            direct = DirectSet({"x": np.zeros((64, 10), np.float32)}, optim.AdamW(lr=0.02), state=each)
            for _ in range(300):
                _, gradient = loss_and_gradient(direct.pull()["x"], batches.integers(0, 512, 64))
                direct.push({"x": gradient})
            losses.append(loss_and_gradient(direct.pull()["x"], np.arange(512))[0])
        assert losses[0] < 0.5 * np.log(10)
        assert losses[1] == pytest.approx(losses[0], rel=0.02)


class TestSpecification:
    def test_the_state_is_smaller(self) -> None:
        size = 1 << 16
        start = {"x": np.zeros(size, np.float32)}
        per_element = {
            state: DirectSet(start, optim.Adam(amsgrad=True), state=state).set.summarize().state_bytes / size
            for state in StateFormat
        }
        assert [round(each, 1) for each in per_element.values()] == [16.0, 12.0, 10.0]

    def test_it_travels(self) -> None:
        tensor = TensorSpec.of("x", np.zeros(3, np.float32))
        for state in StateFormat:
            spec = ParameterSetSpec("set", (tensor,), ADAM, state=state)
            assert decode_spec(encode_spec(spec)) == spec
        message = encode_spec(spec)
        message.state = 99  # type: ignore[assignment]
        with pytest.raises(optserve.InvalidArgument, match="expected state to be 0, 1, 2 or 3; got 99"):
            decode_spec(message)

    @pytest.mark.parametrize(
        "optimizer",
        [
            optim.SGD(),
            optim.ASGD(),
            optim.Adagrad(),
            optim.FTRL(),
            optim.Rprop(),
            optim.Yogi(),
            optim.RMSprop(centered=True),
        ],
        ids=str,
    )
    def test_optimizers_whose_state_is_exact_are_refused(
        self, optimizer: optim.Optimizer, memory_client: optserve.Client, new_id: Callable[[], str]
    ) -> None:
        with pytest.raises(optserve.InvalidHyperparameter, match="expected an optimizer with averages"):
            memory_client.create_parameter_set(new_id(), {"x": np.zeros(3, np.float32)}, optimizer, state="bfloat16")

    def test_float64_and_unknown_names_are_refused(
        self, tcp_client: optserve.Client, new_id: Callable[[], str]
    ) -> None:
        mixed = {"x": np.zeros(3, np.float32), "y": np.zeros(3)}
        with pytest.raises(
            optserve.InvalidTensor, match="expected tensors of float32, bfloat16 or float16.*'y': float64"
        ):
            tcp_client.create_parameter_set(new_id(), mixed, ADAM, state="int8")
        with pytest.raises(
            optserve.InvalidArgument, match="expected state to be 'full', 'bfloat16', 'int8'; got 'int4'"
        ):
            tcp_client.create_parameter_set(new_id(), {"x": np.zeros(3, np.float32)}, ADAM, state="int4")

    def test_where_a_slot_begins_may_follow_from_a_schedule(self) -> None:
        optimizer = optim.FedAdam(tau=schedules.Linear(1e-2, 1e-3, 10))
        direct = run(StateFormat.BFLOAT16, gradients(1), optimizer=optimizer)
        assert {name: array.dtype for name, array in slots(direct).items()} == {
            "exp_avg": np.uint16,
            "exp_avg_sq": np.float32,
        }

    def test_a_set_with_other_state_is_another(self, memory_client: optserve.Client, new_id: Callable[[], str]) -> None:
        name, start = new_id(), {"x": np.zeros(3, np.float32)}
        memory_client.create_parameter_set(name, start, ADAM, state="bfloat16")
        with pytest.raises(optserve.SpecificationMismatch, match="exists with other state"):
            memory_client.create_parameter_set(name, start, ADAM, exist_ok=True)
