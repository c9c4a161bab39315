"""What is pushed: gradients, deltas or parameters, which mean the same; and values of buffers, which no rule touches."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import optserve
from optserve import (
    EMA,
    Async,
    Buffered,
    ClipGlobalNorm,
    ClipValue,
    Lookahead,
    Outcome,
    Policy,
    RowSparse,
    SkipNonFinite,
    Sync,
    Table,
    Transforms,
    aggregation,
    formats,
    optim,
    staleness,
)
from optserve_server import Server
from optserve_server.engine.parameter_set import ParameterSet

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

SHAPES = {"w": (9, 5), "b": (4,), "scalar": ()}
MEANINGS = ("gradients", "deltas", "parameters")


def drawn(seed: int, dtype: Any = np.float64) -> Tensors:
    """Numbers of few bits, whose sums and differences are exact."""
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.integers(-64, 64, shape) / 64).astype(dtype) for name, shape in SHAPES.items()}


def meant(gradient: Tensors, base: Mapping[str, Array], meaning: str) -> Tensors:
    """What says a gradient: itself, the delta that it is, or the parameters that follow from it."""
    of: dict[str, Callable[[Array, Array], Array]] = {
        "gradients": lambda g, _: g,
        "deltas": lambda g, _: -g,
        "parameters": lambda g, at: at - g,
    }
    return {name: np.asarray(of[meaning](each, base[name]), each.dtype) for name, each in gradient.items()}


def same_bits(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def inner(client: optserve.Client, weights: optserve.ParameterSet) -> ParameterSet:
    """The server's side of a set that is in this process."""
    return client._transport._engine.get(weights.id)  # type: ignore[attr-defined, no-any-return]


def await_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    never = threading.Event()
    while not condition():
        assert not never.wait(0.001)


@pytest.mark.parametrize(
    ("policy", "transforms"),
    [
        (Async(), Transforms()),
        (Async(), Transforms(clip=ClipGlobalNorm(0.5))),
        (Async(), Transforms(clip=ClipValue(0.25), average=EMA(0.5))),
        (Async(staleness=staleness.Polynomial()), Transforms(accumulate=2)),
        (Buffered(pushes=2), Transforms()),
    ],
    ids=str,
)
def test_the_three_meanings_make_the_same_steps(
    client: optserve.Client, new_id: NewId, policy: Policy, transforms: Transforms
) -> None:
    """Those of parameters but for what rounding took from what was trained."""
    ends = []
    for meaning in MEANINGS:
        weights = client.create_parameter_set(
            new_id(), drawn(0), optim.SGD(lr=0.5), policy=policy, transforms=transforms, pushes=meaning
        )
        at = weights.pull()
        for step in range(1, 5):
            at = weights.step(meant(drawn(step), at, meaning))
        ends.append(at)
        weights.delete()
    assert same_bits(ends[0], ends[1])
    for name in SHAPES:
        np.testing.assert_allclose(ends[2][name], ends[0][name], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("optimizer", [optim.Adam(lr=0.5), optim.Muon(lr=0.5)], ids=lambda each: each.rule)
def test_so_they_do_for_every_rule_in_the_first_step(
    memory_client: optserve.Client, new_id: NewId, optimizer: optim.Optimizer
) -> None:
    ends = []
    for meaning in MEANINGS:
        weights = memory_client.create_parameter_set(new_id(), drawn(0), optimizer, pushes=meaning)
        ends.append(weights.step(meant(drawn(1), weights.pull(), meaning)))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


@pytest.mark.parametrize(
    ("meaning", "dtype"),
    [("deltas", np.float16), ("parameters", np.float16), ("parameters", ml_dtypes.bfloat16)],
)
def test_in_half_precision_what_a_worker_left_alone_does_not_move(
    memory_client: optserve.Client, new_id: NewId, meaning: str, dtype: Any
) -> None:
    """The server has more bits than the worker could train."""
    start = drawn(0, dtype)
    weights = memory_client.create_parameter_set(new_id(), start, optim.SGD(lr=1 / 3), pushes=meaning)
    at = weights.step(meant(drawn(1, dtype), weights.pull(), meaning))
    masters = weights.state().parameters
    nothing = {name: np.zeros_like(each) for name, each in at.items()}
    weights.step(meant(nothing, at, meaning))
    assert same_bits(weights.state().parameters, masters)


@pytest.mark.parametrize(
    "policy",
    [
        Sync(3),
        Sync(3, deterministic=True),
        Sync(3, aggregation=aggregation.Median()),
        Buffered(samples=6.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_what_several_workers_push_is_one_mean(
    memory_client: optserve.Client, new_id: NewId, policy: Policy, meaning: str
) -> None:
    """Trained parameters become their mean, which is what federated averaging is."""
    set_id, start = new_id(), drawn(0)
    memory_client.create_parameter_set(set_id, start, optim.SGD(lr=1.0), policy=policy, pushes=meaning)
    workers = [memory_client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(3)]
    gradients, samples = [drawn(k + 1) for k in range(3)], [1.0, 2.0, 3.0]
    with ThreadPoolExecutor(3) as pool:
        pushes = [
            pool.submit(worker.push, meant(g, worker.pull(), meaning), samples=n)
            for worker, g, n in zip(workers, gradients, samples, strict=True)
        ]
        assert {each.result().outcome for each in pushes} <= {Outcome.APPLIED, Outcome.ACCUMULATED}
    for name, at in workers[0].pull().items():
        each = np.stack([g[name] for g in gradients])
        robust = isinstance(policy, Sync) and policy.aggregation is not None
        mean = np.median(each, axis=0) if robust else np.average(each, axis=0, weights=samples)
        np.testing.assert_allclose(at, start[name] - mean, rtol=0, atol=1e-14)


def test_parameters_are_compared_with_those_that_their_worker_pulled(client: optserve.Client, new_id: NewId) -> None:
    """However many updates of others there were since: what they learnt is not undone."""
    set_id = new_id()
    client.create_parameter_set(set_id, {"w": np.zeros(3)}, optim.SGD(lr=1.0), pushes="parameters")
    slow, quick = (client.parameter_set(set_id, client_id=each) for each in ("slow", "quick"))
    slow.pull()
    at = quick.pull()
    for _ in range(5):
        at = quick.step({"w": at["w"] + 1})
    at = slow.step({"w": np.full(3, 0.25)})
    assert at.receipt is not None
    assert at.receipt.staleness == 5
    np.testing.assert_array_equal(at["w"], 5.25)


def test_parameters_of_no_known_base_are_discarded_and_a_step_brings_the_present_ones(
    client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    created = client.create_parameter_set(set_id, {"w": np.zeros(3)}, optim.SGD(lr=1.0), pushes="parameters")
    never_pulled, other = (client.parameter_set(set_id, client_id=each) for each in ("never-pulled", "other"))
    assert other.push({"w": np.ones(3)}).refusal is not None
    other.pull()
    assert other.push({"w": np.ones(3)}).applied
    for weights, message in ((never_pulled, "that this worker had pulled"), (created, "still kept for its worker")):
        at = weights.step({"w": np.full(3, 9.0)})
        assert at.receipt is not None
        assert at.receipt.refusal is not None
        assert (at.receipt.outcome, at.receipt.refusal.reason) == (Outcome.DISCARDED, "TOO_STALE")
        assert message in at.receipt.refusal.message
        np.testing.assert_array_equal(at["w"], 1.0)
        assert weights.step({"w": at["w"] + 1}).receipt.applied  # type: ignore[union-attr]
        created.update(policy=Async())
        other.push({"w": other.pull()["w"] - 1})


def test_what_workers_have_is_kept_as_long_as_they_have_it(memory_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    created = memory_client.create_parameter_set(set_id, {"w": np.zeros(3)}, optim.SGD(lr=1.0), pushes="parameters")
    bases = inner(memory_client, created)._pipeline.bases
    assert bases.versions == []
    first, second = (memory_client.parameter_set(set_id, client_id=each) for each in ("first", "second"))
    for each in (first, second):
        each.pull()
    assert bases.versions == [0]
    second.step({"w": np.ones(3)})
    assert bases.versions == [0, 1]
    for _ in range(20):
        second.step({"w": np.ones(3)})
    assert bases.versions == [0, 21]
    first.pull()
    assert bases.versions == [21]
    with created.worker("third") as third:
        second.step({"w": np.ones(3)})
        third.pull()
        second.step({"w": np.ones(3)})
        assert bases.versions == [21, 22, 23]
    assert bases.versions == [21, 23]
    first.close()
    second.close()
    await_until(lambda: bases.versions == [])


def test_what_only_a_lost_stream_has_read_is_let_go_of(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    set_id = new_id()
    with optserve.Client(server.address) as lost:
        tcp_client.create_parameter_set(set_id, {"w": np.zeros(3)}, optim.SGD(), pushes="parameters")
        lost.parameter_set(set_id).pull()
        bases = server._engine.get(set_id)._pipeline.bases
        assert bases.versions == [0]
    await_until(lambda: bases.versions == [])
    tcp_client.parameter_set(set_id).pull()
    assert bases.versions == [0]
    tcp_client.parameter_set(set_id).delete()
    assert bases.versions == []


def test_another_policy_lets_go_of_what_it_does_not_look_at(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(
        new_id(), {"w": np.zeros(3)}, optim.SGD(), policy=Async(staleness=staleness.DelayCompensation())
    )
    weights.pull()
    bases = inner(memory_client, weights)._pipeline.bases
    assert bases.versions == [0]
    weights.update(policy=Async())
    assert bases.versions == []


STATISTICS = {"average": "mean", "replace": "last", "freeze": "constant"}
START = {name: np.full(3, 100.0) for name in ("w", *STATISTICS.values(), "layer.running_mean")}
BUFFERS = {name: treatment for treatment, name in STATISTICS.items()} | {"*.running_mean": "optimize"}


@pytest.mark.parametrize(
    "policy",
    [
        Async(),
        Sync(3),
        Sync(3, deterministic=True),
        Sync(3, aggregation=aggregation.Median()),
        Buffered(pushes=3),
        Buffered(samples=6.0, staleness=staleness.DelayCompensation(scale=9.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("meaning", MEANINGS)
def test_buffers_become_what_is_pushed_of_them_and_no_rule_touches_them(
    memory_client: optserve.Client, new_id: NewId, policy: Policy, meaning: str
) -> None:
    """Neither decay, clipping, averages, loss scales nor what is done about staleness, whatever is pushed beside them."""
    set_id = new_id()
    transforms = Transforms(clip=ClipGlobalNorm(0.5), lookahead=Lookahead(2), average=EMA(0.9))
    created = memory_client.create_parameter_set(
        set_id, START, optim.AdamW(lr=0.1, weight_decay=0.5), policy=policy, transforms=transforms, pushes=meaning,
        buffers=BUFFERS,
    )  # fmt: skip
    workers = [memory_client.parameter_set(set_id, client_id=f"worker-{k}") for k in range(3)]
    for worker in workers:
        worker.pull()
    pushes = [{name: np.full(3, 10.0 * (k + 1)) for name in START} for k in range(3)]
    scale = 1.0 if meaning == "parameters" else 8.0
    with ThreadPoolExecutor(3) as pool:
        together = []
        for k, worker in enumerate(workers):
            together.append(pool.submit(worker.push, pushes[k], samples=k + 1.0, loss_scale=scale))
            if isinstance(policy, Sync):
                await_until(lambda: len(inner(memory_client, created)._rounds._waiting) == (k + 1) % 3)  # noqa: B023
            else:
                together[-1].result()
        receipts = [each.result() for each in together]
    mean = 30.0 if policy == Async() else (10 * 1 + 20 * 2 + 30 * 3) / 6
    if isinstance(policy, Sync) and policy.aggregation is not None:
        mean = 20.0
    for pulled in (created.pull(), created.pull(evaluation=True)):
        np.testing.assert_allclose(pulled["mean"], mean, rtol=1e-14)
        np.testing.assert_array_equal(pulled["last"], 30.0)
        np.testing.assert_array_equal(pulled["constant"], 100.0)
        for name in ("w", "layer.running_mean"):
            assert (pulled[name] != 100.0).all()
            assert (abs(pulled[name] - 100.0) < 30.0).all()
    for receipt, pushed in zip(receipts, pushes, strict=True):
        norm = np.sqrt(6.0) * pushed["w"][0] / scale
        assert receipt.gradient_norm == pytest.approx(norm)


def test_what_is_optimized_does_not_depend_on_the_buffers_beside_it(client: optserve.Client, new_id: NewId) -> None:
    ends = []
    for values in (0.0, 1e6):
        weights = client.create_parameter_set(
            new_id(), START, optim.Adam(lr=0.1), transforms=Transforms(clip=ClipGlobalNorm(1.0)), buffers=BUFFERS
        )
        for _ in range(3):
            weights.push({name: np.ones(3) if name == "w" else np.full(3, values) for name in ("w", "mean", "last")})
        ends.append(weights.pull()["w"])
    np.testing.assert_array_equal(*ends)


def test_evaluation_has_the_buffers_of_now_where_a_rule_keeps_parameters_for_it(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    start = {"w": np.zeros(3), "f": np.ones(2)}
    weights = memory_client.create_parameter_set(new_id(), start, optim.ASGD(), buffers={"f": "replace"})
    weights.push({"w": np.ones(3), "f": np.full(2, 7.0)})
    np.testing.assert_array_equal(weights.pull(evaluation=True)["f"], 7.0)


def test_a_push_may_have_buffers_alone(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.Muon(), buffers=BUFFERS)
    assert weights.push({"mean": np.full(3, 5.0), "constant": np.zeros(3)}).applied
    pulled = weights.pull()
    np.testing.assert_array_equal(pulled["mean"], 5.0)
    np.testing.assert_array_equal(pulled["w"], 100.0)


def test_what_is_frozen_makes_no_update(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(), buffers=BUFFERS)
    with pytest.raises(optserve.TensorMismatch, match="not frozen; got 1 that are"):
        weights.push({"constant": np.zeros(3)})
    assert weights.push({"w": np.zeros(3), "constant": np.zeros(3)}).version == 1


@pytest.mark.parametrize(
    "name",
    ["bn1.running_mean", "running_var", "net/batch_stats/mean", "bn.num_batches_tracked", "bn/moving_variance:0"],
)
def test_a_tensor_that_is_called_like_a_statistic_needs_a_treatment(
    memory_client: optserve.Client, new_id: NewId, name: str
) -> None:
    start = {"w": np.ones(3), name: np.ones(3)}
    with pytest.raises(optserve.InvalidGroup, match=r"called like a statistic.*'average'}, 'replace' or 'freeze'"):
        memory_client.create_parameter_set(new_id(), start, optim.SGD())
    for treatment in ("average", "optimize"):
        weights = memory_client.create_parameter_set(new_id(), start, optim.SGD(lr=0.5), buffers={name: treatment})
        weights.push({name: np.full(3, 8.0)})
        np.testing.assert_array_equal(weights.pull()[name], 8.0 if treatment == "average" else -3.0)
        assert weights.describe().spec.buffers == {name: optserve.Treatment(treatment)}


TABLE = {"t": Table((2,), capacity=4), "w": np.zeros((4, 2), np.float32)}
ROWS = RowSparse(np.array([1]), np.ones((1, 2), np.float32))
ARRAY = {"w": np.zeros((4, 2), np.float32)}

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "parameters, of moments": ({"holds": "moments", "pushes": "parameters"}, optserve.InvalidTensor, "moments only"),
    "buffers, of moments": ({"holds": "moments", "buffers": {"w": "average"}}, optserve.InvalidTensor, "moments only"),
    "compensation, of moments": (
        {"holds": "moments", "policy": Async(staleness=staleness.GapAware())}, optserve.InvalidPolicy, "moments only"
    ),
    "parameters, of tables": ({"parameters": TABLE, "pushes": "parameters"}, optserve.InvalidTensor, "some rows of tables"),
    "tables as buffers": ({"parameters": TABLE, "buffers": {"t": "replace"}}, optserve.InvalidTensor, "rows of tables"),
    "tables in a buffer": ({"parameters": TABLE, "policy": Buffered(pushes=2)}, optserve.InvalidPolicy, "has tables"),
    "tables, compensated": (
        {"parameters": TABLE, "policy": Async(staleness=staleness.DelayCompensation())}, optserve.InvalidPolicy, "has tables"
    ),
    "a buffer, accumulated": (
        {"policy": Buffered(pushes=2), "transforms": Transforms(accumulate=2)}, optserve.InvalidPolicy, "accumulates 2 pushes"
    ),
    "a pattern without tensors": ({"buffers": {"x*": "average"}}, optserve.InvalidGroup, r"'x\*' to match a tensor"),
    "two patterns": ({"buffers": {"w*": "average", "*": "freeze"}}, optserve.InvalidGroup, "one pattern of buffers"),
    "an unknown treatment": ({"buffers": {"w": "mean"}}, optserve.InvalidGroup, "'average', 'replace', 'freeze', 'optimize'"),
    "an unknown meaning": ({"pushes": "steps"}, optserve.InvalidArgument, "'gradients', 'deltas', 'parameters'"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused(
    tcp_client: optserve.Client, new_id: NewId, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"parameters": ARRAY} | options
    with pytest.raises(error, match=message):
        tcp_client.create_parameter_set(new_id(), optimizer=optim.SGD(), **options)


@pytest.mark.parametrize(
    ("options", "policy", "message"),
    [
        ({"holds": "moments"}, Async(staleness=staleness.GapAware()), "moments only"),
        ({"parameters": TABLE}, Buffered(pushes=2), "has tables"),
        ({"transforms": Transforms(accumulate=2)}, Buffered(pushes=2), "accumulates 2 pushes"),
    ],
)
def test_nor_can_it_be_changed_to_that(
    tcp_client: optserve.Client, new_id: NewId, options: dict[str, Any], policy: Policy, message: str
) -> None:
    weights = tcp_client.create_parameter_set(new_id(), optimizer=optim.SGD(), **({"parameters": ARRAY} | options))
    with pytest.raises(optserve.InvalidPolicy, match=message):
        weights.update(policy=policy)
    assert weights.describe().policy == Async()


@pytest.mark.parametrize(
    ("options", "pushed", "error", "message"),
    [
        ({"buffers": {"w": "replace"}}, {"w": ROWS}, optserve.TensorMismatch, "all values of 'w'"),
        ({"pushes": "parameters"}, {"w": ROWS}, optserve.TensorMismatch, "looks at all rows"),
        ({"policy": Buffered(pushes=2)}, {"w": ROWS}, optserve.TensorMismatch, "looks at all rows"),
        (
            {"policy": Async(staleness=staleness.DelayCompensation())}, {"w": ROWS}, optserve.TensorMismatch,
            "looks at all rows",
        ),
        ({"pushes": "parameters", "push_format": formats.Int8()}, ARRAY, optserve.InvalidFormat, "as they are, or rounded"),
        ({"buffers": {"w": "average"}, "push_format": formats.TopK(0.5)}, ARRAY, optserve.InvalidFormat, "of 'w' as they"),
    ],
)  # fmt: skip
def test_values_are_pushed_as_they_are(
    tcp_client: optserve.Client,
    new_id: NewId,
    options: dict[str, Any],
    pushed: Any,
    error: type[Exception],
    message: str,
) -> None:
    weights = tcp_client.create_parameter_set(new_id(), ARRAY, optim.SGD(), **options)
    with pytest.raises(error, match=message):
        weights.push(pushed)
    assert weights.push(ARRAY).sequence == 2 if "push_format" not in options else weights.describe().version == 0


def test_parameters_have_no_loss_scale(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), ARRAY, optim.SGD(), pushes="parameters")
    with pytest.raises(optserve.InvalidTransform, match="loss_scale of 8"):
        weights.push(ARRAY, loss_scale=8.0)


@pytest.mark.parametrize("samples", [0.0, -1.0, float("nan"), float("inf"), "many"])
def test_samples_are_a_positive_number(memory_client: optserve.Client, new_id: NewId, samples: Any) -> None:
    weights = memory_client.create_parameter_set(new_id(), ARRAY, optim.SGD())
    with pytest.raises(
        optserve.InvalidPolicy, match="expected samples to be a number of at least 1e-09, at most 1e.12"
    ):
        weights.push(ARRAY, samples=samples)


def test_however_many_samples_there_are_nothing_overflows(memory_client: optserve.Client, new_id: NewId) -> None:
    policies: Sequence[Policy] = [Buffered(pushes=2), Buffered(samples=2.0), Sync(1)]
    for policy in policies:
        weights = memory_client.create_parameter_set(new_id(), ARRAY, optim.SGD(lr=1.0), policy=policy)
        for _ in range(2):
            weights.push({"w": np.full((4, 2), 1e6, np.float32)}, samples=1e12)
        assert np.isfinite(weights.pull()["w"]).all()


def test_pushes_of_a_buffer_have_the_same_tensors(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD(), policy=Buffered(pushes=2), buffers=BUFFERS)
    assert weights.push({"w": np.ones(3), "constant": np.ones(3)}).outcome is Outcome.ACCUMULATED
    with pytest.raises(optserve.TensorMismatch, match="gradients of the 1 tensors"):
        weights.push({"w": np.ones(3), "mean": np.ones(3)})
    assert weights.push({"w": np.ones(3)}).applied


def test_what_is_not_finite_is_skipped_in_a_buffer(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(
        new_id(), {"w": np.zeros(3)}, optim.SGD(lr=1.0), policy=Buffered(pushes=2),
        transforms=Transforms(nonfinite=SkipNonFinite()),
    )  # fmt: skip
    outcomes = [weights.push({"w": np.full(3, value)}).outcome for value in (1.0, np.nan, 3.0)]
    assert outcomes == [Outcome.ACCUMULATED, Outcome.SKIPPED, Outcome.APPLIED]
    np.testing.assert_array_equal(weights.pull()["w"], -2.0)
