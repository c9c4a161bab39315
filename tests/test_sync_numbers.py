"""Synchronous training in numbers: workers on parts of a batch come to where one worker on the whole of it does."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import optserve
from direct import DirectSet
from optserve import Sync, optim
from optserve_server.demo import digits

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
NewId = Callable[[], str]

STEPS, BATCH = 200, 32
OPTIMIZERS = {"momentum": optim.Momentum(lr=0.05), "Adam": optim.Adam(lr=0.01)}
INPUTS, HIDDEN = 12, 9


class Regression:
    """A network with one hidden layer that is to become another one; batches are drawn by number."""

    def __init__(self, dtype: Any) -> None:
        random = np.random.default_rng(7)
        truth = random.normal(size=INPUTS)
        self.inputs = random.normal(size=(STEPS, BATCH, INPUTS)).astype(dtype)
        self.targets = np.sin(self.inputs @ truth.astype(dtype))
        self.start: Tensors = {
            "inner": random.normal(size=(INPUTS, HIDDEN), scale=0.3).astype(dtype),
            "outer": random.normal(size=HIDDEN, scale=0.3).astype(dtype),
            "bias": np.zeros((), dtype),
        }

    def gradients(self, at: Tensors, step: int, rows: slice) -> Tensors:
        """Those of the mean squared error over some rows of a batch."""
        x, y = self.inputs[step, rows], self.targets[step, rows]
        hidden = np.tanh(x @ at["inner"])
        error = 2 * (hidden @ at["outer"] + at["bias"] - y) / len(x)
        back = np.outer(error, at["outer"]) * (1 - hidden**2)
        return {"inner": x.T @ back, "outer": hidden.T @ error, "bias": np.asarray(error.sum())}


def train(
    task: Regression,
    optimizer: optim.Optimizer,
    sizes: Sequence[int],
    *,
    order: int = 0,
    deterministic: bool = False,
    steps: int = STEPS,
) -> Tensors:
    """The parameters after all steps of workers that have parts of each batch of certain sizes, arriving in some order."""
    ends = np.cumsum([0, *sizes])
    parts = {f"worker-{k}": slice(*ends[k : k + 2]) for k in range(len(sizes))}
    arrivals = np.random.default_rng(order)
    direct = DirectSet(task.start, optimizer, policy=Sync(len(sizes), deterministic=deterministic))
    for step in range(steps):
        at = direct.pull()
        clients = arrivals.permutation(list(parts))
        direct.arrive(
            {str(client): task.gradients(at, step, parts[str(client)]) for client in clients},
            {client: float(rows.stop - rows.start) for client, rows in parts.items()},
        )
    assert direct.set.position.version == steps
    return direct.pull()


def distance(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference of an element, as a part of its tensor's largest magnitude."""
    return max(float(np.abs(ours[name] - each).max() / np.abs(each).max()) for name, each in theirs.items())


def assert_trained(start: Tensors, end: Tensors) -> None:
    assert distance(start, end) > 0.1


@functools.cache
def trained_alone(optimizer: optim.Optimizer, dtype: Any) -> Tensors:
    """What one worker makes of the whole batches."""
    task = Regression(dtype)
    whole = train(task, optimizer, (BATCH,))
    assert_trained(task.start, whole)
    return whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize(
    ("sizes", "deterministic"),
    [((16, 16), False), ((8,) * 4, False), ((4,) * 8, False), ((1, 30, 1), False), ((17, 2, 13), True)],
    ids=str,
)
def test_parts_of_a_batch_train_as_the_whole_does(
    optimizer: optim.Optimizer, sizes: tuple[int, ...], deterministic: bool
) -> None:
    """Also parts of several sizes, which weigh by their samples; whether they are folded as they come or kept."""
    parts = train(Regression(np.float64), optimizer, sizes, deterministic=deterministic)
    assert distance(parts, trained_alone(optimizer, np.float64)) < 1e-9


def test_in_float32_it_is_as_near_as_another_split(record_property: Callable[[str, object], None]) -> None:
    """As near as rounding allows; which distance is larger is chance, so that they are recorded, not compared."""
    task, optimizer = Regression(np.float32), OPTIMIZERS["Adam"]
    whole = trained_alone(optimizer, np.float32)
    parts = [train(task, optimizer, sizes) for sizes in ((8, 8, 16), (16, 8, 8))]
    distances = {"from the whole": distance(parts[0], whole), "between two splits": distance(*parts)}
    for name, each in distances.items():
        record_property(f"float32 distance {name}", each)
        assert 0 < each < 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_order_of_arrival_changes_no_bit_of_a_deterministic_set(dtype: Any) -> None:
    task = Regression(dtype)
    sizes = (5, 9, 11, 7)
    runs = [train(task, OPTIMIZERS["Adam"], sizes, order=order, deterministic=True, steps=20) for order in (0, 1)]
    assert all(runs[0][name].tobytes() == runs[1][name].tobytes() for name in task.start)


def test_the_order_of_arrival_changes_bits_where_pushes_are_folded() -> None:
    """Which is why there is a choice."""
    task = Regression(np.float32)
    runs = [train(task, OPTIMIZERS["Adam"], (8,) * 4, order=order, steps=20) for order in (0, 1)]
    assert any(runs[0][name].tobytes() != runs[1][name].tobytes() for name in task.start)


def test_digits_over_the_wire(tcp_client: optserve.Client, new_id: NewId) -> None:
    """Three workers in threads of their own, with a push of parts of several sizes each step."""
    random, (images, _) = np.random.default_rng(0), digits.load()
    start: Tensors = {}
    for layer, shape in enumerate(((64, 24), (24, 16), (16, 10)), start=1):
        start |= {
            f"layer{layer}/weight": random.normal(size=shape, scale=0.25),
            f"layer{layer}/bias": np.zeros(shape[1]),
        }
    sizes, set_id = (7, 20, 5), new_id()
    batches = np.random.default_rng(0).integers(0, len(images), (STEPS, sum(sizes)))
    alone = tcp_client.create_parameter_set(new_id(), start, OPTIMIZERS["momentum"])
    tcp_client.create_parameter_set(set_id, start, OPTIMIZERS["momentum"], policy=Sync(len(sizes)))
    ends = np.cumsum([0, *sizes])

    def work(k: int) -> optserve.Parameters:
        with tcp_client.parameter_set(set_id, client_id=f"worker-{k}") as mine:
            at = mine.pull()
            for rows in batches[:, ends[k] : ends[k + 1]]:
                at = mine.step(digits.loss_and_gradients(at, images[rows])[1], samples=float(len(rows)))
            return at

    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(work, range(len(sizes))))
    whole = alone.pull()
    for rows in batches:
        whole = alone.step(digits.loss_and_gradients(whole, images[rows])[1])
    assert_trained(start, whole)
    for result in results:
        assert result.version == STEPS
        assert distance(result, whole) < 1e-9
