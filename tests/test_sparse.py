"""Row-sparse gradients, pulls of rows, and tables whose rows come into being."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optserve
from optserve import Constant, Normal, RowSparse, Sync, Table, Transforms, Uniform, optim
from optserve._exchange import Exchange, OutgoingPush
from optserve._messages import decode_spec, encode_spec
from optserve._specification import ParameterSetSpec, TensorSpec
from optserve_server import Config, Server
from optserve_server.engine import tables, threads

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]

ROWS, WIDTH, STEPS = 50, 3, 12


def embedding(dtype: Any = np.float64) -> Array:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(dtype)


def some_gradients(dtype: Any = np.float64) -> list[RowSparse]:
    """Each for some rows, of which some come twice."""
    rng = np.random.default_rng(1)
    return [RowSparse(rng.integers(0, ROWS, size=20), rng.normal(size=(20, WIDTH)).astype(dtype)) for _ in range(STEPS)]


def dense(gradient: RowSparse) -> Array:
    whole = np.zeros((ROWS, WIDTH), gradient.values.dtype)
    np.add.at(whole, gradient.rows, gradient.values)
    return whole


LAZY = {
    "sgd": (optim.SGD(lr=0.1), "SGD"),
    "sparse-adam": (optim.SparseAdam(lr=0.1), "SparseAdam"),
    "adagrad": (optim.Adagrad(lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1), "Adagrad"),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("lr", [None, 0.03])
def test_rows_follow_torchs_sparse_gradients(
    name: str, lr: float | None, client: optserve.Client, new_id: NewId
) -> None:
    optimizer, torch_name = LAZY[name]
    parameter = torch.nn.Parameter(torch.tensor(embedding()))
    options = {name: value for name, value in optimizer.hyperparameters.items() if name != "convention"}
    theirs = getattr(torch.optim, torch_name)([parameter], **options)
    with client.create_parameter_set(new_id(), {"e": embedding(), "w": np.zeros(4)}, optimizer) as weights:
        for k, each in enumerate(some_gradients()):
            changes: dict[str, dict[str, Any]] = {}
            if lr is not None and k == 6:
                theirs.param_groups[0]["lr"], changes = lr, {"default": {"lr": lr}}
            parameter.grad = torch.sparse_coo_tensor(each.rows[None], each.values, (ROWS, WIDTH), check_invariants=True)
            with torch.sparse.check_sparse_tensor_invariants(enable=True):
                theirs.step()
            weights.push({"e": each, "w": np.ones(4)}, hyperparameters=changes)
        pulled = weights.pull()
        assert np.abs(pulled["e"] - parameter.detach().numpy()).max() <= 1e-12
        assert not np.any(pulled["w"] == 0)
        weights.delete()


@pytest.mark.parametrize(
    "optimizer",
    [optim.FTRL(lr=0.1, l1_regularization_strength=0.01), optim.RowWiseAdagrad(lr=0.1, initial_accumulator_value=0.2)],
    ids=str,
)
def test_a_lazy_rule_is_the_dense_one_on_the_rows_that_are_touched(
    optimizer: optim.Optimizer, memory_client: optserve.Client, new_id: NewId
) -> None:
    start = embedding()
    with memory_client.create_parameter_set(new_id(), {"e": start}, optimizer) as weights:
        gradient = some_gradients()[0]
        weights.push({"e": gradient})
        with memory_client.create_parameter_set(new_id(), {"e": start}, optimizer) as other:
            expected = other.step({"e": dense(gradient)})["e"]
        touched = np.unique(gradient.rows)
        pulled = weights.pull()["e"]
        np.testing.assert_allclose(pulled[touched], expected[touched], rtol=1e-14)
        untouched = np.setdiff1d(np.arange(ROWS), touched)
        np.testing.assert_array_equal(pulled[untouched], start[untouched])


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    half=st.booleans(),
    whole=st.booleans(),
    reader=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_a_sparse_push_is_a_dense_one_with_zeros_elsewhere(
    rows: list[int], half: bool, whole: bool, reader: bool, memory_client: optserve.Client, new_id: NewId
) -> None:
    """Whatever the rows, the order, the dtype, what else is pushed, and whether somebody reads the version before."""
    dtype = np.float16 if half else np.float32
    start = {"e": np.arange(30, dtype=dtype).reshape(10, 3), "w": np.ones(5, np.float32)}
    values = np.arange(1, 3 * len(rows) + 1, dtype=dtype).reshape(-1, 3) / 8
    other = {"w": np.full(5, 0.5, np.float32)} if whole else {}
    summed = np.zeros((10, 3), np.float32)
    np.add.at(summed, rows, values.astype(np.float32))
    optimizer, set_id = optim.SGD(lr=0.5), new_id()
    with (
        memory_client.create_parameter_set(set_id, start, optimizer) as sparse,
        memory_client.parameter_set(set_id) as reading,
        memory_client.create_parameter_set(new_id(), start, optimizer) as all_of_it,
    ):
        held = reading.step({"w": np.zeros(5, np.float32)}, copy=False) if reader else start
        sparse.push({"e": RowSparse(rows, values)} | other)
        np.testing.assert_array_equal(held["e"], start["e"])
        all_of_it.push({"e": summed.astype(dtype)} | other)
        left, right = sparse.pull(), all_of_it.pull()
        tolerance = 1e-2 if half else 0.0
        np.testing.assert_allclose(left["e"].astype(np.float64), right["e"].astype(np.float64), atol=tolerance)
        np.testing.assert_array_equal(left["w"], right["w"])
        sparse.delete()
        all_of_it.delete()


def test_engine_and_transports_agree_bitwise(
    memory_client: optserve.Client,
    tcp_client: optserve.Client,
    shared_memory_client: optserve.Client,
    new_id: NewId,
) -> None:
    results = []
    for client in (memory_client, tcp_client, shared_memory_client):
        start = {"e": embedding(np.float32)}
        with client.create_parameter_set(new_id(), start, optim.Adagrad(lr=0.1)) as weights:
            for each in some_gradients(np.float32):
                weights.push({"e": each})
            results.append(weights.pull()["e"])
            weights.delete()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_batch_without_any_row_is_a_gradient_too(client: optserve.Client, new_id: NewId) -> None:
    """In a round with others, too, whose mean it has a part in."""
    set_id, nothing = new_id(), RowSparse([], np.ones((0, WIDTH)))
    made = client.create_parameter_set(set_id, {"e": embedding()}, optim.SGD(lr=1.0), policy=Sync(2), client_id="a")
    with made, client.parameter_set(set_id, client_id="b") as other, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.push, {"e": nothing})
        made.push({"e": RowSparse([1], np.ones((1, WIDTH)))})
        assert waiting.result().gradient_norm == 0
        expected = embedding()
        expected[1] -= 0.5
        np.testing.assert_allclose(made.pull()["e"], expected, rtol=1e-13)
        made.delete()


def test_sums_that_overflow_are_refused(client: optserve.Client, new_id: NewId) -> None:
    start = {"e": np.zeros((4, 2), np.float32)}
    with client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0)) as weights:
        with pytest.raises(optserve.NonFiniteValue, match="finite sum"):
            weights.push({"e": RowSparse([1, 1], np.full((2, 2), 3e38, np.float32))})
        np.testing.assert_array_equal(weights.pull()["e"], 0)
        weights.delete()


def test_clipping_and_norms_are_of_the_sums(memory_client: optserve.Client, new_id: NewId) -> None:
    transforms = Transforms(clip=optserve.ClipGlobalNorm(1.0))
    gradient = some_gradients()[0]
    norm = float(np.linalg.norm(dense(gradient)))
    with memory_client.create_parameter_set(
        new_id(), {"e": embedding()}, optim.SGD(lr=1.0), transforms=transforms
    ) as weights:
        receipt = weights.push({"e": gradient}, loss_scale=2.0)
        assert receipt.gradient_norm == pytest.approx(norm / 2, rel=1e-12)
        expected = embedding() - dense(gradient) / 2 / (norm / 2 + 1e-6)
        np.testing.assert_allclose(weights.pull()["e"], expected, rtol=1e-12)


def test_a_synchronous_round_has_the_mean_of_all_rows(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    first, second = some_gradients()[:2]
    made = client.create_parameter_set(set_id, {"e": embedding()}, optim.SGD(lr=1.0), policy=Sync(2), client_id="a")
    with made, client.parameter_set(set_id, client_id="b") as other:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(other.push, {"e": second})
            made.push({"e": first})
            assert waiting.result().version == 1
        expected = embedding() - (dense(first) + dense(second)) / 2
        np.testing.assert_allclose(made.pull()["e"], expected, rtol=1e-13)
        made.delete()


class TestPulls:
    def test_rows_come_in_the_order_that_was_asked_for(self, client: optserve.Client, new_id: NewId) -> None:
        start = {"e": embedding(), "w": np.arange(4.0), "h": embedding(np.float16)}
        with client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0)) as weights:
            rows = [7, 0, 7, 49]
            pulled = weights.pull(rows={"e": rows, "h": [3]}, tensors=["w"])
            assert list(pulled) == ["w", "e", "h"]
            np.testing.assert_array_equal(pulled["e"], start["e"][rows])
            np.testing.assert_array_equal(pulled["h"], start["h"][[3]])
            np.testing.assert_array_equal(pulled["w"], start["w"])
            assert weights.pull(rows={"e": []})["e"].shape == (0, WIDTH)
            weights.delete()

    def test_a_step_can_fetch_rows(self, client: optserve.Client, new_id: NewId) -> None:
        with client.create_parameter_set(new_id(), {"e": embedding()}, optim.SGD(lr=1.0)) as weights:
            stepped = weights.step({"e": RowSparse([3], np.ones((1, WIDTH)))}, rows={"e": [3, 4]})
            assert stepped.receipt is not None
            np.testing.assert_array_equal(stepped["e"], embedding()[[3, 4]] - [[1.0], [0.0]])
            weights.delete()

    def test_smaller_formats(self, tcp_client: optserve.Client, new_id: NewId) -> None:
        set_id = new_id()
        start = np.arange(12, dtype=np.float32).reshape(4, 3)
        with (
            tcp_client.create_parameter_set(set_id, {"e": start}, optim.SGD(lr=1.0)) as weights,
            tcp_client.parameter_set(set_id, pull_format=optserve.formats.BFloat16()) as other,
        ):
            np.testing.assert_array_equal(other.pull(rows={"e": [2, 1]})["e"], start[[2, 1]])
            weights.delete()

    @pytest.mark.parametrize(
        ("rows", "error"),
        [
            ({"x": [0]}, optserve.TensorMismatch),
            ({"e": [ROWS]}, optserve.TensorMismatch),
            ({"e": [-1]}, optserve.TensorMismatch),
            ({"s": [0]}, optserve.TensorMismatch),
            ({"e": [0.5]}, optserve.InvalidTensor),
            ({"e": [[1]]}, optserve.InvalidTensor),
            ({"e": np.zeros(2**20 + 1, np.int64)}, optserve.InvalidTensor),
            ("e", optserve.InvalidTensor),
        ],
    )
    def test_what_is_not_there_is_refused(
        self, rows: Mapping[str, Any], error: type[Exception], client: optserve.Client, new_id: NewId
    ) -> None:
        start = {"e": embedding(), "s": np.array(1.0)}
        with client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0)) as weights:
            with pytest.raises(error, match="expected"):
                weights.pull(rows=rows)
            with pytest.raises(error, match="expected"):
                weights.step({"e": np.ones((ROWS, WIDTH))}, rows=rows)
            np.testing.assert_array_equal(weights.pull()["e"], embedding())
            weights.delete()


@pytest.mark.parametrize(
    ("gradient", "optimizer", "options"),
    [
        (RowSparse([ROWS], np.ones((1, WIDTH))), optim.SGD(), {}),
        (RowSparse([-1], np.ones((1, WIDTH))), optim.SGD(), {}),
        (RowSparse([0], np.ones((1, WIDTH + 1))), optim.SGD(), {}),
        (RowSparse([0], np.ones((1, WIDTH), np.float32)), optim.SGD(), {}),
        (RowSparse([0], np.full((1, WIDTH), np.nan)), optim.SGD(), {}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.Adam(), {}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.SGD(momentum=0.9), {}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.SGD(weight_decay=0.1), {}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.SGD(), {"transforms": Transforms(average=optserve.EMA())}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.SGD(), {"transforms": Transforms(accumulate=2)}),
        (RowSparse([0], np.ones((1, WIDTH))), optim.SGD(), {"holds": "moments"}),
    ],
)
def test_gradients_that_do_not_fit_are_refused_and_nothing_changes(
    gradient: RowSparse, optimizer: optim.Optimizer, options: dict[str, Any], client: optserve.Client, new_id: NewId
) -> None:
    with client.create_parameter_set(new_id(), {"e": embedding()}, optimizer, **options) as weights:
        with pytest.raises(optserve.InvalidArgument, match="expected"):
            weights.push({"e": gradient})
        assert weights.describe().version == 0
        if "holds" not in options:
            np.testing.assert_array_equal(weights.pull()["e"], embedding())
        weights.delete()


def test_values_need_a_row_each() -> None:
    with pytest.raises(optserve.InvalidTensor, match="expected a row of values for each of 2"):
        RowSparse([1, 2], np.ones((3, 4)))


def test_a_push_that_comes_again_with_other_rows_is_not_the_same(memory_client: optserve.Client, new_id: NewId) -> None:
    with memory_client.create_parameter_set(new_id(), {"e": embedding()}, optim.SGD(lr=1.0)) as weights:
        weights.push({"e": RowSparse([1], np.ones((1, WIDTH)))})
        weights._session._ledger.sequence = 0
        again = OutgoingPush({"e": np.ones((1, WIDTH))}, {}, {}, rows={"e": np.array([2])})
        with pytest.raises(optserve.SequenceReused):
            weights._session._until_done(Exchange(again, None))


class TestTables:
    def table(self, **options: Any) -> Table:
        return Table((WIDTH,), capacity=100, dtype="float64", **options)

    def test_rows_come_into_being_with_their_first_gradient(self, client: optserve.Client, new_id: NewId) -> None:
        start = {"t": self.table(), "w": np.zeros(2)}
        with client.create_parameter_set(new_id(), start, optim.Adagrad(lr=0.5)) as weights:
            empty = weights.pull()
            assert (empty["t"].rows.tolist(), empty["t"].values.shape) == ([], (0, WIDTH))
            keys = [2**62, -5, 7]
            weights.push({"t": RowSparse(keys, np.ones((3, WIDTH)))})
            weights.push({"t": RowSparse([7, 99], np.ones((2, WIDTH))), "w": np.ones(2)})
            pulled = weights.pull()["t"]
            assert set(pulled.rows.tolist()) == {*keys, 99}
            rows = weights.pull(rows={"t": [99, 7, -5, 12345]})["t"]
            once, twice = -0.5, -0.5 - 0.5 / np.sqrt(2)
            np.testing.assert_allclose(rows, np.array([[once], [twice], [once], [0]]) * np.ones(WIDTH), rtol=1e-9)
            by_key = dict(zip(pulled.rows.tolist(), pulled.values, strict=True))
            np.testing.assert_array_equal(by_key[7], rows[1])
            weights.delete()

    def test_row_wise_adagrad_has_a_table(self, client: optserve.Client, new_id: NewId) -> None:
        optimizer = optim.RowWiseAdagrad(lr=0.5, initial_accumulator_value=3.0)
        with client.create_parameter_set(new_id(), {"t": self.table()}, optimizer) as weights:
            weights.push({"t": RowSparse([8, -8], np.array([[1.0] * WIDTH, [3.0] * WIDTH]))})
            weights.push({"t": RowSparse([8], np.array([[2.0] * WIDTH]))})
            expected = [[-0.5 / 2 - 1.0 / np.sqrt(8)], [-1.5 / np.sqrt(12)]] * np.ones(WIDTH)
            np.testing.assert_allclose(weights.pull(rows={"t": [8, -8]})["t"], expected, rtol=1e-9)
            weights.delete()

    @pytest.mark.parametrize("initial", [Constant(0.25), Uniform(-2.0, 1.0, seed=3), Normal(0.5, seed=-1)])
    def test_initial_values_depend_on_key_and_seed_only(
        self, initial: Any, memory_client: optserve.Client, tcp_client: optserve.Client, new_id: NewId
    ) -> None:
        keys = np.random.default_rng(0).integers(-(2**63), 2**63, 50)
        seen: list[Array] = []
        for client, order in itertools.product((memory_client, tcp_client), (keys, keys[::-1])):
            start = {"t": self.table(initial=initial)}
            with client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0)) as weights:
                before = weights.pull(rows={"t": keys})["t"]
                weights.push({"t": RowSparse(order, np.zeros((50, WIDTH)))})
                np.testing.assert_array_equal(before, weights.pull(rows={"t": keys})["t"])
                seen.append(before)
                weights.delete()
        for each in seen:
            np.testing.assert_array_equal(each, seen[0])

    def test_draws_have_the_moments_that_they_should(self) -> None:
        spec, keys = TensorSpec.of("t", np.zeros((1, 100))), np.arange(2_000)
        uniform = tables.Table(spec, Uniform(-2.0, 1.0, seed=3)).initial(keys)
        normal = tables.Table(spec, Normal(0.5, seed=3)).initial(keys)
        assert (uniform.min() >= -2, uniform.max() < 1) == (True, True)
        assert np.abs(uniform.mean() + 0.5) < 0.01
        assert np.abs(uniform.var() - 9 / 12) < 0.01
        assert np.abs(normal.mean()) < 0.005
        assert np.abs(normal.std() - 0.5) < 0.005
        assert np.abs(np.corrcoef(normal[:, 0], normal[:, 1])[0, 1]) < 0.1
        assert len(np.unique(normal)) == normal.size
        assert not np.array_equal(normal, tables.Table(spec, Normal(0.5, seed=4)).initial(keys))

    def test_a_full_table_takes_known_keys_only(self, client: optserve.Client, new_id: NewId) -> None:
        start = {"t": Table((WIDTH,), capacity=3)}
        with client.create_parameter_set(new_id(), start, optim.SGD(lr=1.0)) as weights:
            weights.push({"t": RowSparse([1, 2], np.ones((2, WIDTH), np.float32))})
            with pytest.raises(optserve.TensorMismatch, match="expected at most 3 rows"):
                weights.push({"t": RowSparse([1, 3, 4], np.ones((3, WIDTH), np.float32))})
            weights.push({"t": RowSparse([1, 3], np.ones((2, WIDTH), np.float32))})
            pulled = weights.pull()["t"]
            assert dict(zip(pulled.rows.tolist(), pulled.values[:, 0].tolist(), strict=True)) == {1: -2, 2: -1, 3: -1}
            weights.delete()

    def test_a_restarted_server_has_the_rows(self, tmp_path: Path) -> None:
        gradient = RowSparse([5, 9], np.ones((2, WIDTH)))
        pulled = []
        for _ in range(2):
            config = Config(listen="127.0.0.1:0", data_dir=tmp_path)
            with Server(config) as server, optserve.Client(server.address) as client:
                start = {"t": self.table(initial=Normal(1.0))}
                with client.create_parameter_set("t", start, optim.Adagrad(lr=0.5), exist_ok=True) as weights:
                    weights.push({"t": gradient})
                    pulled.append(weights.pull()["t"])
        assert pulled[1].rows.tolist() == pulled[0].rows.tolist()
        np.testing.assert_allclose(pulled[0].values - pulled[1].values, 0.5 / np.sqrt(2), rtol=1e-9)

    def test_tables_need_row_sparse_gradients(self, client: optserve.Client, new_id: NewId) -> None:
        with client.create_parameter_set(new_id(), {"t": self.table()}, optim.SGD()) as weights:
            with pytest.raises(optserve.TensorMismatch, match="RowSparse"):
                weights.push({"t": np.ones((100, WIDTH))})
            weights.delete()

    @pytest.mark.parametrize(
        ("table", "optimizer", "options"),
        [
            (Table((2,), capacity=5), optim.Adam(), {}),
            (Table((2,), capacity=5), optim.SGD(), {"holds": "moments"}),
            (Table((2,), capacity=5), optim.SGD(), {"transforms": Transforms(accumulate=2)}),
            (Table((2,), capacity=5, initial=Constant(1e39)), optim.SGD(), {}),
            (Table((2,), capacity=5, dtype="float16", initial=Constant(1e6)), optim.SGD(), {}),
            (Table((2,), capacity=5), optim.SparseAdam(), {"state": "int8"}),
        ],
    )
    def test_sets_that_could_not_have_tables_are_not_created(
        self, table: Table, optimizer: optim.Optimizer, options: dict[str, Any], memory_client: optserve.Client
    ) -> None:
        with pytest.raises(optserve.InvalidArgument, match="expected"):
            memory_client.create_parameter_set("never", {"t": table}, optimizer, **options)

    @pytest.mark.parametrize(
        "build",
        [
            lambda: Table((2,), capacity=0),
            lambda: Table((2,), capacity=5, dtype="int8"),  # type: ignore[arg-type]
            lambda: Table((2,), capacity=5, initial=0.0),  # type: ignore[arg-type]
            lambda: Table((2,), capacity=5, initial=Normal(1.0, seed=2**63)),
            lambda: Table((2,), capacity=True),
            lambda: Table(3, capacity=5),  # type: ignore[arg-type]
            lambda: Constant(float("nan")),
            lambda: Normal(-1.0),
            lambda: Uniform(1.0, 0.0),
            lambda: Uniform("0", 1.0),  # type: ignore[arg-type]
            lambda: RowSparse([2**63], np.ones((1, 2))),
            lambda: RowSparse([0, 1], [[1.0], [1.0, 2.0]]),
        ],
    )
    def test_ill_formed_tables_are_refused(self, build: Callable[[], object]) -> None:
        with pytest.raises(optserve.InvalidTensor, match="expected"):
            build()


def test_tables_travel() -> None:
    initial = {"a": Constant(1.5), "b": Uniform(-1.0, 2.0, -7), "c": Normal(0.1, 2**62)}
    tensors = tuple(TensorSpec.of(name, np.zeros((4, 2))) for name in initial)
    spec = ParameterSetSpec("s", tensors, optim.SGD(), tables=initial)
    assert decode_spec(encode_spec(spec)) == spec


def test_many_rows_are_cut_between_them() -> None:
    """As many parts as threads can use, of whole rows."""
    table = np.zeros((10_000, 8), np.int64)
    table[:, 0], table[:, 1] = np.arange(10_000) * 16, 16
    parts: Sequence[Array] = threads.split(table, {}, 8)
    assert len(parts) == 8
    np.testing.assert_array_equal(np.concatenate(parts), table)
