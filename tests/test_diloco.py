"""DiLoCo: what it computes, what goes on meanwhile, what it leaves alone, and what is left after a failure."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import optserve
from optserve import Buffered, DiLoCo, SkipNonFinite, Sync, Transforms, formats, optim
from optserve._fragments import divide
from optserve._specification import TensorSpec
from optserve_server import Server
from proxy import Proxy
from restarts import Restarts

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
NewId = Callable[[], str]
PATIENCE = 60.0  # seconds

OUTER: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}  # as in the paper
PLAIN = optim.SGD(lr=1.0)  # the global parameters become the mean of the local ones
START: Arrays = {
    "layer1/w": np.linspace(-1, 1, 3 * 700).reshape(3, 700),
    "layer1/b": np.linspace(2, 3, 5),
    "layer2/w": np.linspace(-3, 3, 1000),
    "layer2/b": np.array(0.25),
    "head": np.ones((2, 2)),
}
ZEROS = {"x": np.zeros(4)}


class Worker:
    """A worker's own optimizer, Adam with decay, on a loss of its own: each step depends on all steps before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.targets = {name: self.random.normal(size=value.shape) for name, value in START.items()}
        self.m = {name: np.zeros(value.shape) for name, value in START.items()}
        self.v = {name: np.zeros(value.shape) for name, value in START.items()}

    def samples(self, step: int) -> float:
        """How many samples a step is on."""
        return 1.0 + (self.seed + step) % 3

    def train(self, parameters: Mapping[str, Array]) -> None:
        for name, array in parameters.items():
            gradient = array - self.targets[name] + 0.1 * self.random.normal(size=array.shape)
            self.m[name] = 0.9 * self.m[name] + 0.1 * gradient
            self.v[name] = 0.99 * self.v[name] + 0.01 * gradient**2
            array -= 0.01 * (self.m[name] / (np.sqrt(self.v[name]) + 1e-8) + 0.1 * array)


def simulated(
    count: int,
    steps: int,
    every: int,
    delay: int = 0,
    mixing: float | None = None,
    fragments: Sequence[Sequence[str]] = (tuple(START),),
) -> list[list[Arrays]]:
    """DiLoCo without a server: every worker's parameters after each step, and after the end."""
    workers = [Worker(seed) for seed in range(count)]
    local = [{name: value.copy() for name, value in START.items()} for _ in workers]
    shared = {name: torch.tensor(value) for name, value in START.items()}
    outer = torch.optim.SGD(shared.values(), **OUTER)
    base = {name: value.copy() for name, value in START.items()}  # what all workers took over last
    sent: list[Arrays] = [{} for _ in workers]
    samples = np.zeros((count, len(fragments)))  # since each fragment's last sending
    under_way: dict[int, Arrays] = {}  # what comes, by fragment
    due: dict[int, int] = {}

    def send(part: int) -> None:
        outer.zero_grad()
        for name in fragments[part]:
            differences = [base[name] - each[name] for each in local]
            shared[name].grad = torch.tensor(np.average(differences, axis=0, weights=samples[:, part]))
            for mine, copies in zip(local, sent, strict=True):
                copies[name] = mine[name].copy()
        outer.step()
        samples[:, part] = 0
        under_way[part] = {name: shared[name].numpy().copy() for name in fragments[part]}

    def take_over(part: int, mixing: float | None) -> None:
        for name, value in under_way.pop(part).items():
            for mine, copies in zip(local, sent, strict=True):
                mixed = (
                    value + mine[name] - copies[name] if mixing is None else mixing * mine[name] + (1 - mixing) * value
                )
                mine[name] = np.array(mixed)
            base[name] = value

    traces: list[list[Arrays]] = [[] for _ in workers]
    offsets = [part * every // len(fragments) for part in range(len(fragments))]
    last = dict.fromkeys(range(len(fragments)), 0)  # step of each fragment's last sending
    for step in range(1, steps + 1):
        for worker, mine in zip(workers, local, strict=True):
            worker.train(mine)
            samples[worker.seed] += worker.samples(step)
        for part in [part for part in under_way if due[part] == step]:
            take_over(part, mixing)
        for part, offset in enumerate(offsets):
            if step % every == offset:
                send(part)
                last[part], due[part] = step, step + delay
                if not delay:
                    take_over(part, mixing)
        for trace, mine in zip(traces, local, strict=True):
            trace.append({name: value.copy() for name, value in mine.items()})
    for part in list(under_way):
        take_over(part, mixing)
    for part in sorted(last, key=lambda part: last[part] + (last[part] == 0) * (offsets[part] - every)):
        if last[part] != steps:
            send(part)
            take_over(part, None)
    for mine in local:
        mine.update((name, value.copy()) for name, value in base.items())
    for trace, mine in zip(traces, local, strict=True):
        trace.append(mine)
    return traces


def trained(weights: optserve.ParameterSet, seed: int, steps: int, **options: Any) -> tuple[list[Arrays], DiLoCo]:
    """The same with a server, of one worker."""
    worker, trace = Worker(seed), list[Arrays]()
    with DiLoCo(weights, **options) as diloco:
        parameters = diloco.parameters
        for step in range(1, steps + 1):
            worker.train(parameters)
            diloco.step(samples=worker.samples(step))
            trace.append({name: value.copy() for name, value in parameters.items()})
    trace.append(dict(parameters))
    return trace, diloco


def compare(
    client: optserve.Client, set_id: str, count: int, steps: int, pushes: str = "gradients", **options: Any
) -> list[DiLoCo]:
    """Train with so many workers in threads, and hold every parameter after every step to the simulation."""
    client.create_parameter_set(set_id, START, optim.SGD(**OUTER), policy=Sync(count), pushes=pushes)
    workers = [client.parameter_set(set_id, client_id=f"worker-{seed}") for seed in range(count)]
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(trained, each, seed, steps, **options) for seed, each in enumerate(workers)]
        results = [future.result(PATIENCE) for future in futures]
    expected = simulated(count, steps, **options)
    for (trace, _), theirs in zip(results, expected, strict=True):
        assert len(trace) == len(theirs) == steps + 1
        for mine, other in zip(trace, theirs, strict=True):
            for name in START:
                np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=1e-12)
    for trace, _ in results:
        for name, value in results[0][0][-1].items():  # the end is the same for all, to the bit
            np.testing.assert_array_equal(trace[-1][name], value)
    return [diloco for _, diloco in results]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_computes_what_a_simulation_without_a_server_does(
    client: optserve.Client, new_id: NewId, count: int
) -> None:
    for diloco in compare(client, new_id(), count, steps=25, every=10):
        assert diloco.synchronisations == 3
        assert diloco.discarded == 0
        assert diloco.receipt is not None
        assert diloco.receipt.version == 3


def test_nothing_is_left_to_push_when_the_last_step_has_synchronised(client: optserve.Client, new_id: NewId) -> None:
    for diloco in compare(client, new_id(), 2, steps=20, every=10):
        assert diloco.synchronisations == 2


@pytest.mark.parametrize("delay", [1, 4, 10])
@pytest.mark.parametrize("mixing", [None, 0.0, 0.5, 1.0])
def test_a_delay_and_a_mixture_are_those_of_the_equations(
    memory_client: optserve.Client, new_id: NewId, delay: int, mixing: float | None
) -> None:
    compare(memory_client, new_id(), 2, steps=33, every=10, delay=delay, mixing=mixing)


def test_mixing_needs_no_delay(memory_client: optserve.Client, new_id: NewId) -> None:
    compare(memory_client, new_id(), 2, steps=25, every=10, mixing=0.25)


FRAGMENTS = [["layer1/*"], ["layer2/*"], ["head"]]


@pytest.mark.parametrize("every", [12, 10, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_fragments_take_turns(memory_client: optserve.Client, new_id: NewId, every: int, delay: int) -> None:
    names = [["layer1/w", "layer1/b"], ["layer2/w", "layer2/b"], ["head"]]
    compare(memory_client, new_id(), 2, steps=31, every=every, delay=delay, fragments=names)


def test_fragments_with_all_that_there_is(client: optserve.Client, new_id: NewId) -> None:
    names = [["layer1/w", "layer1/b"], ["layer2/w", "layer2/b"], ["head"]]
    compare(client, new_id(), 4, steps=40, every=12, delay=7, mixing=0.5, fragments=names)


@pytest.mark.parametrize("pushes", ["deltas", "parameters"])
@pytest.mark.parametrize("options", [{}, {"delay": 4}, {"delay": 4, "mixing": 0.5}], ids=["", "delay", "mixing"])
def test_sets_of_deltas_or_parameters_give_the_same(
    memory_client: optserve.Client, new_id: NewId, pushes: str, options: dict[str, Any]
) -> None:
    compare(memory_client, new_id(), 2, steps=25, every=10, pushes=pushes, **options)
    names = [["layer1/w", "layer1/b"], ["layer2/w", "layer2/b"], ["head"]]
    compare(memory_client, new_id(), 2, steps=25, every=10, pushes=pushes, fragments=names, **options)


@pytest.mark.parametrize("delay", [0, 1, 6])
@pytest.mark.parametrize("fragments", [1, 3])
def test_all_work_of_all_workers_counts_once(
    client: optserve.Client, new_id: NewId, delay: int, fragments: int
) -> None:
    """Nobody waits for anybody: the global parameters end at the sum of what all have added."""
    set_id, randomness = new_id(), random.Random(delay)
    client.create_parameter_set(set_id, START, PLAIN)
    total = {name: value.copy() for name, value in START.items()}
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"every": 6, "delay": delay, "fragments": fragments}
        workers = [stack.enter_context(DiLoCo(client.parameter_set(set_id), **options)) for _ in range(3)]
        for _ in range(100):
            diloco = randomness.choice(workers)
            for name, array in diloco.parameters.items():
                progress = np.array(randomness.randrange(8))
                array += progress
                total[name] += progress
            diloco.step()
    pulled = client.parameter_set(set_id).pull()
    for name, value in total.items():
        np.testing.assert_allclose(pulled[name], value, rtol=0, atol=1e-12 * abs(value).max())


def test_workers_go_through_the_fragments_in_one_order_also_after_one_of_them_begins_again(
    memory_client: optserve.Client, new_id: NewId
) -> None:
    """One worker fails after the first of three fragments, and enters again."""
    set_id = new_id()
    memory_client.create_parameter_set(set_id, START, PLAIN, policy=Sync(2))
    options: dict[str, Any] = {"every": 6, "fragments": FRAGMENTS}

    def steadily(weights: optserve.ParameterSet) -> None:
        with DiLoCo(weights, **options) as diloco:
            for _ in range(10):  # until its last step, this is 5 fragments
                diloco.step()

    def with_a_failure(weights: optserve.ParameterSet) -> None:
        diloco = DiLoCo(weights, **options)
        with contextlib.suppress(KeyError), diloco:
            for _ in range(3):
                diloco.step()
            raise KeyError
        with diloco:
            for _ in range(8):  # the steps 3 to 10 again
                diloco.step()

    with ThreadPoolExecutor(2) as pool:
        workers = [memory_client.parameter_set(set_id) for _ in range(2)]
        futures = [pool.submit(run, each) for run, each in zip((steadily, with_a_failure), workers, strict=True)]
        for future in futures:
            future.result(PATIENCE)
    assert workers[0].describe().version == 5 + 2


def test_pushes_and_pulls_carry_one_fragment(memory_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    weights = memory_client.create_parameter_set(set_id, START, PLAIN)
    onlooker = memory_client.parameter_set(set_id)
    changed = []
    with DiLoCo(weights, every=6, fragments=FRAGMENTS) as diloco:
        for _ in range(6):
            for array in diloco.parameters.values():
                array += 1
            before = onlooker.pull()
            diloco.step()
            after = onlooker.pull()
            changed.append([name for name in START if (before[name] != after[name]).any()])
    assert changed == [[], ["layer2/w", "layer2/b"], [], ["head"], [], ["layer1/w", "layer1/b"]]


def specs(**sizes: int) -> list[TensorSpec]:
    return [TensorSpec.of(name, np.empty(size, np.float32)) for name, size in sizes.items()]


def test_a_number_of_fragments_divides_by_size() -> None:
    tensors = specs(a=3, b=50, c=2, d=20, e=25, f=0)
    assert divide(tensors, 1) == [("a", "b", "c", "d", "e", "f")]
    assert divide(tensors, 2) == [("b", "f"), ("a", "c", "d", "e")]
    assert sorted(len(part) for part in divide(tensors, 6)) == [1] * 6
    assert divide(specs(a=0, b=0), 2) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        (0, "1 to 3 fragments"),
        (4, "1 to 3 fragments"),
        ([["a*"]], "'b1' is in 0"),
        ([["*"], ["b1"]], "'b1' is in 2"),
        ([["*"], ["c"]], r"nothing matches \['c'\]"),
        (["a1", "a2"], r"such as \['a1'\]; got 'a1'"),
    ],
)
def test_fragments_that_are_no_division_are_refused(fragments: Any, message: str) -> None:
    with pytest.raises(optserve.InvalidArgument, match=message):
        divide(specs(a1=1, a2=1, b1=1), fragments)


def test_training_goes_on_while_a_push_is_under_way(client: optserve.Client, new_id: NewId) -> None:
    """Which it is until the other worker of the round has pushed."""
    set_id = new_id()
    other = client.create_parameter_set(set_id, ZEROS, PLAIN, policy=Sync(2))
    with ThreadPoolExecutor(1) as pool, DiLoCo(client.parameter_set(set_id), every=3, delay=2) as diloco:
        x = diloco.parameters["x"]
        for _ in range(4):
            x += 1
            diloco.step()
        assert other.describe().version == 0
        assert diloco.synchronisations == 0
        np.testing.assert_array_equal(x, 4)
        x += 1
        step = pool.submit(diloco.step)  # has to wait
        other.push({"x": np.full(4, -1.0)}, samples=3)
        step.result(PATIENCE)
        assert diloco.synchronisations == 1
        np.testing.assert_array_equal(x, (3 + 1) / 2 + 2)  # the mean, and the two steps meanwhile
        other.pull()
        pool.submit(other.push, ZEROS)  # for the end


def test_training_goes_on_while_the_network_holds_the_answer(server: Server, new_id: NewId) -> None:
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        weights = client.create_parameter_set(new_id(), ZEROS, PLAIN)
        with DiLoCo(weights, every=3, delay=2, mixing=0.5) as diloco:
            x = diloco.parameters["x"]
            proxy.hold_answers()
            for _ in range(4):
                x += 1
                diloco.step()
            assert diloco.synchronisations == 0
            proxy.release_answers()
            x += 1
            diloco.step()
            assert diloco.synchronisations == 1
            np.testing.assert_array_equal(x, 0.5 * 5 + 0.5 * 3)


def test_the_time_that_is_waited_is_told(memory_client: optserve.Client, new_id: NewId) -> None:
    with DiLoCo(memory_client.create_parameter_set(new_id(), ZEROS, PLAIN), every=2) as diloco:
        diloco.step()
        assert diloco.waited == 0
        diloco.step()
        assert diloco.waited > 0


def test_it_sends_a_fortieth_of_what_synchronising_every_step_sends(server: Server, new_id: NewId) -> None:
    start, steps = {"x": np.zeros(20_000, np.float32)}, 500

    def carried(train: Callable[[optserve.ParameterSet], None]) -> int:
        with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
            with optserve.Client(server.address) as other:
                set_id = new_id()
                other.create_parameter_set(set_id, start, PLAIN)
            train(client.parameter_set(set_id))
            return proxy.carried

    def every_step(weights: optserve.ParameterSet) -> None:
        weights.pull()
        for _ in range(steps):
            weights.step(start)

    def now_and_then(weights: optserve.ParameterSet) -> None:
        with DiLoCo(weights, every=50) as diloco:
            for _ in range(steps):
                diloco.step()

    assert carried(every_step) >= 40 * carried(now_and_then)


DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("options", [{}, {"delay": 2}, {"delay": 2, "mixing": 0.5}], ids=["", "delay", "mixing"])
def test_arrays_stay_the_same_objects_of_the_same_kind(
    client: optserve.Client, new_id: NewId, options: dict[str, Any]
) -> None:
    start = {f"{np.dtype(dtype)}{shape}": np.ones(shape, dtype) for dtype in DTYPES for shape in [(), (0,), (3, 5)]}
    weights = client.create_parameter_set(new_id(), start, PLAIN)
    diloco = DiLoCo(weights, every=3, **options)
    seen: dict[str, Array] = {}
    parameters = diloco.parameters
    for _ in range(2):
        with diloco:
            assert diloco.parameters is parameters
            for _ in range(7):
                for name, array in parameters.items():
                    assert seen.setdefault(name, array) is array
                    array += np.asarray(0.5, array.dtype)
                diloco.step()
    pulled = weights.pull()
    for name, value in start.items():
        assert parameters[name] is seen[name]
        assert (seen[name].dtype, seen[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(seen[name], pulled[name])
        np.testing.assert_array_equal(seen[name].astype(float), 8 if not options.get("mixing") else pulled[name])


def test_arrays_of_ones_own_are_trained_in_place(memory_client: optserve.Client, new_id: NewId) -> None:
    model = torch.nn.Linear(3, 2)
    own = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    start = {name: np.full(value.shape, 5, np.float32) for name, value in own.items()}
    weights = memory_client.create_parameter_set(new_id(), start, optim.SGD(lr=0.5))
    with DiLoCo(weights, every=2, parameters=own) as diloco:
        assert diloco.parameters["weight"] is own["weight"]
        assert (model.weight == 5).all()
        with torch.no_grad():
            model.weight += 1
        diloco.step()
        diloco.step()
        assert (model.weight == 5.5).all()


def test_others_may_take_the_place_of_arrays(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), ZEROS, optim.SGD(lr=0.5))
    with DiLoCo(weights, every=1) as diloco:
        parameters = diloco.parameters
        other = parameters["x"] = parameters["x"] + 1
        diloco.step()
        assert parameters["x"] is other
        np.testing.assert_array_equal(other, 0.5)
        read_only = other + 1
        read_only.flags.writeable = False
        parameters["x"] = read_only
        diloco.step()
        np.testing.assert_array_equal(parameters["x"], 1)
        parameters["x"] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda parameters: parameters.update(x=np.zeros(4, np.float32)),
            r"'x' to stay float64\[4\]; got float32\[4\]",
        ),
        (lambda parameters: parameters.update(x=np.zeros(5)), r"float64\[4\]; got float64\[5\]"),
        (lambda parameters: parameters.update(y=np.zeros(4)), r"\['y'\] are not in both"),
        (lambda parameters: parameters.clear(), r"\['x'\] are not in both"),
    ],
)
def test_parameters_of_another_kind_are_refused(
    memory_client: optserve.Client, new_id: NewId, change: Callable[[Arrays], None], message: str
) -> None:
    weights = memory_client.create_parameter_set(new_id(), ZEROS, PLAIN)
    with DiLoCo(weights, every=1) as diloco:
        change(diloco.parameters)
        with pytest.raises(optserve.TensorMismatch, match=message):
            diloco.step()
    assert weights.describe().version == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": 2.5},
        {"every": 5, "delay": 6},
        {"every": 5, "delay": -1},
        {"every": 5, "mixing": 1.5},
        {"every": 5, "mixing": float("nan")},
        {"every": 5, "parameters": {"x": [0.0]}},
        {"every": 5, "parameters": {"x": np.broadcast_to(0.0, 4)}},
    ],
)
def test_what_can_not_be_meant_is_refused(
    memory_client: optserve.Client, new_id: NewId, arguments: dict[str, Any]
) -> None:
    weights = memory_client.create_parameter_set(new_id(), ZEROS, PLAIN)
    with pytest.raises(optserve.InvalidArgument, match="expected"):
        DiLoCo(weights, **arguments)


def test_sets_that_it_can_not_train_are_refused(memory_client: optserve.Client, new_id: NewId) -> None:
    moments = memory_client.create_parameter_set(new_id(), ZEROS, PLAIN, holds="moments")
    table = memory_client.create_parameter_set(new_id(), {"x": optserve.Table((2,), capacity=10)}, PLAIN)
    few = memory_client.create_parameter_set(new_id(), START, PLAIN)
    for weights, options in ((moments, {}), (table, {}), (few, {"fragments": 3})):
        diloco = DiLoCo(weights, every=2, **options)
        with pytest.raises(optserve.InvalidArgument, match="expected"), diloco:
            pass
        with pytest.raises(optserve.FailedPrecondition):
            diloco.step()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"policy": Buffered(pushes=2)}, "adds up pushes"),
        ({"transforms": Transforms(accumulate=2)}, "adds up pushes"),
        ({"policy": Sync(2, late="carry")}, "late='discard'"),
        ({"pushes": "parameters"}, "pushes='deltas'"),
    ],
)
def test_sets_that_can_not_take_fragments_in_turn_are_refused(
    memory_client: optserve.Client, new_id: NewId, choices: dict[str, Any], message: str
) -> None:
    weights = memory_client.create_parameter_set(new_id(), START, PLAIN, **choices)
    with DiLoCo(weights, every=5):
        pass
    with pytest.raises(optserve.InvalidArgument, match=message), DiLoCo(weights, every=5, fragments=2):
        pass


def test_steps_are_taken_inside_and_once(memory_client: optserve.Client, new_id: NewId) -> None:
    weights = memory_client.create_parameter_set(new_id(), ZEROS, PLAIN)
    diloco = DiLoCo(weights, every=1)
    with pytest.raises(optserve.FailedPrecondition, match="inside of `with`"):
        diloco.step()
    with diloco:
        with pytest.raises(optserve.FailedPrecondition, match="left before it is entered"):
            diloco.__enter__()
        for samples in (0, -1, float("nan"), float("inf")):
            with pytest.raises(optserve.InvalidArgument, match="positive number of samples"):
                diloco.step(samples)
        diloco.step()
    assert weights.describe().version == 1


@pytest.mark.parametrize("options", [{}, {"delay": 1}, {"delay": 1, "mixing": 0.5}], ids=["", "delay", "mixing"])
def test_a_skipped_push_is_counted_and_the_global_parameters_are_taken_over(
    client: optserve.Client, new_id: NewId, options: dict[str, Any]
) -> None:
    transforms = Transforms(nonfinite=SkipNonFinite())
    weights = client.create_parameter_set(new_id(), ZEROS, PLAIN, transforms=transforms)
    with DiLoCo(weights, every=2, **options) as diloco:
        x = diloco.parameters["x"]
        x[0] = np.nan
        for _ in range(3):
            diloco.step()
        assert diloco.discarded == diloco.synchronisations == 1
        assert diloco.receipt is not None
        assert diloco.receipt.outcome is optserve.Outcome.SKIPPED
        np.testing.assert_array_equal(x, 0)
        x += 1
        diloco.step()
    assert (diloco.discarded, diloco.synchronisations) == (1, 2)
    np.testing.assert_array_equal(weights.pull()["x"], 1)


def moved_on(weights: optserve.ParameterSet, *names: str) -> None:
    """Let a worker that nobody waits for push one to tensors, so that others are late."""
    weights.pull()
    weights.push({name: np.full_like(START[name], -1.0) for name in names})


@pytest.mark.parametrize("options", [{}, {"delay": 1}, {"delay": 1, "mixing": 0.5}], ids=["", "delay", "mixing"])
def test_a_push_that_is_too_late_is_counted_and_the_global_parameters_are_taken_over(
    client: optserve.Client, new_id: NewId, options: dict[str, Any]
) -> None:
    set_id = new_id()
    other = client.create_parameter_set(set_id, START, PLAIN, policy=Sync(2, quorum=1))
    with DiLoCo(client.parameter_set(set_id), every=2, **options) as diloco:
        parameters = diloco.parameters
        moved_on(other, *START)
        for _ in range(2 + diloco._delay):
            for array in parameters.values():
                array += 5
            diloco.step()
        assert (diloco.discarded, diloco.synchronisations) == (1, 1)
        assert diloco.receipt is not None
        assert diloco.receipt.discarded
        for name, value in START.items():
            np.testing.assert_array_equal(parameters[name], value + 1)
            parameters[name] += 1
        diloco.step()
    assert (diloco.discarded, diloco.synchronisations) == (1, 2)
    pulled = other.pull()
    for name, value in START.items():
        np.testing.assert_array_equal(pulled[name], value + 2)


@pytest.mark.parametrize("delay", [0, 6])
def test_who_is_late_with_a_fragment_goes_on_with_the_one_whose_turn_it_is(
    client: optserve.Client, new_id: NewId, delay: int
) -> None:
    """The second fragment is late, after which the third was updated already; with a delay the third is queued, too."""
    set_id = new_id()
    other = client.create_parameter_set(set_id, START, PLAIN, policy=Sync(2, quorum=1))
    weights = client.parameter_set(set_id)
    with DiLoCo(weights, every=6, delay=delay, fragments=FRAGMENTS) as diloco:
        moved_on(other, "layer2/w", "layer2/b")
        moved_on(other, "head")
        with weights._session._lock if delay else contextlib.nullcontext():
            for _ in range(2 + delay // 2):
                for array in diloco.parameters.values():
                    array += 5
                diloco.step()
            answers = [each.answer for each in diloco._under_way]
        if delay:
            assert answers[0].result(PATIENCE).receipt
            with pytest.raises(CancelledError):
                answers[1].result(PATIENCE)
        for _ in range(delay - delay // 2):
            diloco.step()
        assert (diloco.discarded, diloco.synchronisations) == (1, 1)
        pulled = other.pull()
        for name, array in diloco.parameters.items():
            np.testing.assert_array_equal(pulled[name], START[name] + (not name.startswith("layer1")))
            np.testing.assert_array_equal(array, pulled[name])
            array += 1
        for _ in range(2):
            diloco.step()
        if not delay:
            changed = [name for name, array in other.pull().items() if (array != pulled[name]).any()]
            assert changed == ["layer1/w", "layer1/b"]
    for name, array in other.pull().items():
        np.testing.assert_array_equal(array, pulled[name] + 1)


def test_who_misses_a_round_while_its_own_answer_is_lost_goes_on_from_the_global_parameters(
    server: Server, new_id: NewId
) -> None:
    with (
        optserve.Client(server.address) as direct,
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        set_id = new_id()
        other = direct.create_parameter_set(set_id, START, PLAIN, policy=Sync(2, quorum=1))
        with DiLoCo(client.parameter_set(set_id), every=3, fragments=FRAGMENTS) as diloco:
            proxy.swallow_answers()
            diloco.parameters["layer2/b"] += 1
            step = pool.submit(diloco.step)
            while other.describe().version == 0:
                assert not step.done()
            moved_on(other, "head")
            proxy.cut()
            step.result(PATIENCE)
            assert (diloco.discarded, diloco.synchronisations) == (0, 1)
            for name, array in other.pull().items():
                np.testing.assert_array_equal(diloco.parameters[name], array)
                diloco.parameters[name] += 1
            before = other.pull()
            diloco.step()
            changed = [name for name, array in other.pull().items() if (array != before[name]).any()]
            assert changed == ["layer1/w", "layer1/b"]  # after layer2, and the head


def test_a_late_fragment_is_discarded_also_while_a_round_of_another_waits(
    client: optserve.Client, new_id: NewId
) -> None:
    """And not refused because it does not fit that round."""
    set_id, ones = new_id(), {name: np.ones(4) for name in "xy"}
    client.create_parameter_set(set_id, ones, PLAIN, policy=Sync(3, quorum=2))
    first, second, late = (client.parameter_set(set_id, client_id=name) for name in ("first", "second", "late"))
    for each in (first, second, late):
        each.pull()
    with ThreadPoolExecutor(2) as pool:
        for push in [pool.submit(each.step, {"x": ones["x"]}) for each in (first, second)]:
            push.result(PATIENCE)
        waiting = pool.submit(first.push, {"y": ones["y"]})
        while not any(each.waiting for each in late.workers()):
            assert not waiting.done()
        assert late.push({"x": ones["x"]}).discarded
        second.push({"y": ones["y"]})
        waiting.result(PATIENCE)
    np.testing.assert_array_equal(late.pull()["x"], 0)


def test_members_train_until_they_leave_and_are_not_waited_for_longer(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), ZEROS, PLAIN, policy=Sync())

    def train(worker: optserve.ParameterSet, steps: int) -> DiLoCo:
        with worker, DiLoCo(worker, every=2) as diloco:
            for _ in range(steps):
                diloco.parameters["x"] += steps
                diloco.step()
        return diloco

    with ThreadPoolExecutor(2) as pool:
        workers = [weights.worker().__enter__() for _ in range(2)]
        few, many = (pool.submit(train, *each) for each in zip(workers, (4, 8), strict=True))
        assert (few.result(PATIENCE).synchronisations, many.result(PATIENCE).synchronisations) == (2, 4)
    np.testing.assert_array_equal(weights.pull()["x"], 2 * (8 + 16) / 2 + 2 * 16)


def test_where_pushes_are_gathered_each_begins_from_the_global_parameters(
    client: optserve.Client, new_id: NewId
) -> None:
    weights = client.create_parameter_set(new_id(), ZEROS, PLAIN, policy=Buffered(pushes=2))
    with DiLoCo(weights, every=1) as diloco:
        x = diloco.parameters["x"]
        for expected in (0, 3):
            x += expected + 1.5
            diloco.step()
            np.testing.assert_array_equal(x, expected)
        assert (diloco.discarded, diloco.synchronisations) == (0, 2)


@pytest.mark.parametrize("pushes", ["gradients", "deltas", "parameters"])
@pytest.mark.parametrize("options", [{}, {"delay": 1}, {"delay": 1, "mixing": 0.5}], ids=["", "delay", "mixing"])
@pytest.mark.parametrize("fragments", [1, 3])
def test_buffers_become_what_the_server_makes_of_their_values(
    memory_client: optserve.Client, new_id: NewId, pushes: str, options: dict[str, Any], fragments: int
) -> None:
    set_id, start = new_id(), {name: np.ones(3) for name in ("mean", "count", "w", "frozen")}
    buffers = {"mean": "average", "count": "replace", "frozen": "freeze"}
    memory_client.create_parameter_set(set_id, start, PLAIN, policy=Sync(2), pushes=pushes, buffers=buffers)
    steps = 3 + options.get("delay", 0)

    def train(weights: optserve.ParameterSet, value: float) -> Arrays:
        with DiLoCo(weights, every=3, fragments=fragments, **options) as diloco:
            for _ in range(steps):
                for array in diloco.parameters.values():
                    array += value
                diloco.step()
            return {name: array.copy() for name, array in diloco.parameters.items()}

    with ThreadPoolExecutor(2) as pool:
        handles = [memory_client.parameter_set(set_id) for _ in range(2)]
        futures = [pool.submit(train, weights, value) for weights, value in zip(handles, (1.0, 3.0), strict=True)]
        for future, value in zip(futures, (1.0, 3.0), strict=True):
            ended = future.result(PATIENCE)
            np.testing.assert_array_equal(ended["mean"], 1 + 3 * (1 + 3) / 2)  # after three steps of each
            if fragments == 1:  # else it is in another than the first, with which other steps end
                assert ended["count"][0] in (1 + 3 * 1, 1 + 3 * 3)
            np.testing.assert_array_equal(ended["frozen"], 1 + steps * value)  # which nobody else sees
    np.testing.assert_array_equal(handles[0].pull()["frozen"], 1)


@pytest.mark.parametrize("format", [formats.Int8(), formats.TopK(0.5), formats.BFloat16()], ids=str)
def test_what_a_compressed_push_leaves_unsaid_comes_with_the_next(
    tcp_client: optserve.Client, new_id: NewId, format: formats.Format
) -> None:
    start = {"x": np.zeros(5000, np.float32)}
    weights = tcp_client.create_parameter_set(new_id(), start, PLAIN, push_format=format)
    progress = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    with DiLoCo(weights, every=1) as diloco:
        x = diloco.parameters["x"]
        x += progress
        diloco.step()
        first = float(abs(x - progress).max())
        diloco.step()  # has no progress of its own
        second = float(abs(x - progress).max())
    assert first > 0
    assert second <= (first / 100 if format.error_feedback else first)


def test_a_rounded_pull_is_no_progress(tcp_client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    tcp_client.create_parameter_set(set_id, {"x": np.linspace(0, 1, 100, dtype=np.float32)}, PLAIN)
    weights = tcp_client.parameter_set(set_id, pull_format=formats.BFloat16())
    with DiLoCo(weights, every=1) as diloco:
        for _ in range(3):
            diloco.step()
            assert diloco.receipt is not None
            assert diloco.receipt.gradient_norm == 0


def test_an_exception_inside_pushes_nothing_and_waits_for_nothing(
    client: optserve.Client, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push is under way, which would have to wait for another worker."""
    set_id = new_id()
    other = client.create_parameter_set(set_id, ZEROS, PLAIN, policy=Sync(2))
    weights = client.parameter_set(set_id)
    begun, step = threading.Event(), weights.step
    monkeypatch.setattr(weights, "step", lambda *args, **kwargs: (begun.set(), step(*args, **kwargs))[1])
    diloco = DiLoCo(weights, every=2, delay=2)

    def train() -> None:
        with diloco:
            for _ in range(3):
                diloco.parameters["x"] += 1
                diloco.step()
            assert begun.wait(PATIENCE)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    other.push(ZEROS, samples=2)
    with diloco:
        np.testing.assert_array_equal(diloco.parameters["x"], 1)  # what was under way was not lost
    assert other.describe().version == 1


def test_an_error_is_raised_once_and_nothing_is_pushed_after_it(client: optserve.Client, new_id: NewId) -> None:
    weights = client.create_parameter_set(new_id(), ZEROS, PLAIN)
    diloco = DiLoCo(weights, every=2)
    with diloco:
        diloco.parameters["x"][1] = np.inf
        diloco.step()
        with pytest.raises(optserve.NonFiniteValue):
            diloco.step()
        diloco.parameters["x"][1] = 1
        with pytest.raises(optserve.FailedPrecondition, match="to be entered again"):
            diloco.step()
    assert weights.describe().version == 0
    with diloco:
        np.testing.assert_array_equal(diloco.parameters["x"], 0)
        diloco.parameters["x"] += 1
        diloco.step()
    np.testing.assert_array_equal(weights.pull()["x"], 1)


def deleted_under_way(client: optserve.Client, set_id: str, diloco: DiLoCo) -> None:
    """Let the set be deleted while a push of its worker is under way, until the worker's thread knows of it."""
    for _ in range(2):
        diloco.step()
    answer = diloco._under_way[0].answer
    client.parameter_set(set_id).delete()
    assert isinstance(answer.exception(PATIENCE), optserve.ParameterSetNotFound)


def test_an_error_in_the_background_is_raised_by_the_next_step(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    client.create_parameter_set(set_id, ZEROS, PLAIN, policy=Sync(2))
    with DiLoCo(client.parameter_set(set_id), every=2, delay=2) as diloco:
        deleted_under_way(client, set_id, diloco)
        answer = diloco._under_way[0].answer
        with pytest.raises(optserve.ParameterSetNotFound) as raised:  # which would not yet take the answer over
            diloco.step()
        assert raised.value is answer.exception()


def test_an_error_in_the_background_is_raised_at_the_end(client: optserve.Client, new_id: NewId) -> None:
    set_id = new_id()
    client.create_parameter_set(set_id, ZEROS, PLAIN, policy=Sync(2))
    with (
        pytest.raises(optserve.ParameterSetNotFound),
        DiLoCo(client.parameter_set(set_id), every=2, delay=2) as diloco,
    ):
        deleted_under_way(client, set_id, diloco)


def test_after_an_error_no_later_fragment_is_pushed(memory_client: optserve.Client, new_id: NewId) -> None:
    """Two fragments are under way; the first of them is refused."""
    start = {"x": np.zeros(4), "y": np.zeros(4)}
    weights = memory_client.create_parameter_set(new_id(), start, PLAIN)
    with DiLoCo(weights, every=4, delay=4, fragments=[["x"], ["y"]]) as diloco:
        held = weights._session._lock
        diloco.parameters["y"][0] = np.nan
        with held:
            for _ in range(4):
                diloco.step()
            first, second = (each.answer for each in diloco._under_way)
        assert isinstance(first.exception(PATIENCE), optserve.NonFiniteValue)
        with pytest.raises(optserve.NonFiniteValue):
            diloco.step()
        assert second.cancelled()
    assert weights.describe().version == 0


def test_connections_that_break_cost_nothing(server: Server, new_id: NewId) -> None:
    """Every push is applied exactly once: the result is that of an undisturbed run, to the bit."""
    randomness = random.Random(0)
    limit: Callable[[], int] = lambda: randomness.randrange(2_000, 60_000)  # noqa: E731
    options: dict[str, Any] = {"every": 4, "delay": 3, "fragments": FRAGMENTS}
    results = []
    for address in (server.address, "proxy"):
        with Proxy(server.address, limit) as proxy:
            with optserve.Client(server.address) as client:
                set_id = new_id()
                client.create_parameter_set(set_id, START, optim.SGD(**OUTER))
            through = proxy.address if address == "proxy" else address
            with optserve.Client(through, transport="stream") as client:
                trace, diloco = trained(client.parameter_set(set_id), 0, 30, **options)
            assert proxy.connections > 3 or address != "proxy"
        results.append(trace)
        assert diloco.receipt is not None
        assert diloco.receipt.sequence == diloco.receipt.version == diloco.synchronisations
    for one, other in zip(*results, strict=True):
        for name in START:
            np.testing.assert_array_equal(one[name], other[name])


def test_after_an_outcome_unknown_the_work_counts_once(server: Server, new_id: NewId) -> None:
    """The push was applied, its receipt never came; entering again takes over what there is."""
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        weights = client.create_parameter_set(new_id(), ZEROS, PLAIN)
        diloco = DiLoCo(weights, every=1)
        with diloco:
            diloco.parameters["x"] += 1
            weights._session._timeout = 1.0
            proxy.swallow_answers()
            with pytest.raises(optserve.OutcomeUnknown):
                diloco.step()
        proxy.cut()
        weights._session._timeout = PATIENCE
        with diloco:
            np.testing.assert_array_equal(diloco.parameters["x"], 1)
            diloco.parameters["x"] += 1
            diloco.step()
            assert diloco.receipt is not None
            assert diloco.receipt.version == 2
        np.testing.assert_array_equal(weights.pull()["x"], 2)


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    with Restarts(tmp_path) as restarts:
        yield restarts


def test_after_a_rollback_entering_again_goes_on_from_the_servers_state(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client:
        weights = client.create_parameter_set("a", ZEROS, PLAIN)
        weights.checkpoint()
        restarts.remember()
        diloco = DiLoCo(weights, every=1, delay=1)
        with diloco:
            x = diloco.parameters["x"]
            for _ in range(3):
                x += 1
                diloco.step()
            restarts.come_back()
            with contextlib.suppress(optserve.RolledBack):
                for _ in range(2):
                    diloco.step()
                raise AssertionError("nothing was raised")
        with diloco:
            assert diloco.parameters["x"] is x
            np.testing.assert_array_equal(x, 0)
            x += 1
            diloco.step()
        np.testing.assert_array_equal(weights.pull()["x"], 1)


def test_with_a_replay_window_a_rollback_is_not_noticed(restarts: Restarts) -> None:
    with optserve.Client(restarts.address) as client:
        weights = client.create_parameter_set("a", ZEROS, PLAIN, replay_window_bytes=1 << 20)
        weights.checkpoint()
        restarts.remember()
        with DiLoCo(weights, every=1, delay=1) as diloco:
            for step in range(5):
                diloco.parameters["x"] += 1
                if step == 3:
                    restarts.come_back()
                diloco.step()
        np.testing.assert_array_equal(diloco.parameters["x"], 5)
