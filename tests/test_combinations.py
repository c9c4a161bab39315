"""What pushes are, when they make an update and what is pulled, together: against a replay in NumPy."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pytest

import optserve
from optserve import ClipGlobalNorm, ClipValue, RowSparse, SkipNonFinite, Sync, Table, Transforms, formats, optim

Array = np.ndarray[Any, Any]
ROUNDS, WORKERS = 3, 2
LARGE, SMALL = (40_000, 16), (5, 3)  # of which the first is more than the C allocator keeps at hand

LR = 0.5
RULES = {"sgd": optim.SGD(lr=LR), "row-wise": optim.RowWiseAdagrad(lr=LR, eps=1e-6)}
CLIPS = {"": None, "norm": ClipGlobalNorm(1.0), "value": ClipValue(0.25)}


def gradients(kind: str, shape: tuple[int, int]) -> Iterator[list[Any]]:
    """Round by round, what each worker pushes."""
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        count = shape[0] if kind == "dense" else shape[0] // 2
        drawn = [rng.normal(size=(count, shape[1])).astype(np.float32) for _ in range(WORKERS)]
        rows = [rng.integers(0, shape[0], count) for _ in range(WORKERS)]
        yield drawn if kind == "dense" else [RowSparse(*each) for each in zip(rows, drawn, strict=True)]


def summed(gradient: Any, shape: tuple[int, int]) -> Array:
    whole = np.zeros(shape)
    if isinstance(gradient, RowSparse):
        np.add.at(whole, gradient.rows, gradient.values)
    else:
        whole += gradient
    return whole


def replayed(start: Array, updates: list[Array], rule: str, clip: str) -> Array:
    """The parameters after updates by these mean gradients, in float64."""
    p, s = start.astype(np.float64), np.zeros(len(start))
    for g in updates:
        if clip == "norm":
            g = g * min(1.0, 1.0 / (np.linalg.norm(g) + 1e-6))
        elif clip == "value":
            g = np.clip(g, -0.25, 0.25)
        if rule == "sgd":
            p = p - LR * g
            continue
        s = s + (g**2).mean(axis=1)
        p = p - LR * g / (np.sqrt(s) + 1e-6)[:, None]
    return p


@pytest.mark.parametrize(
    ("kind", "shape", "together", "rule", "clip"),
    [
        *product(("dense", "rows", "table"), (SMALL,), (False, True), RULES, CLIPS),
        *product(("dense", "rows", "table"), (LARGE,), (False, True), ("sgd",), CLIPS),
    ],
)
def test_many_workers_push_all_kinds(
    kind: str,
    shape: tuple[int, int],
    together: bool,
    rule: str,
    clip: str,
    tcp_client: optserve.Client,
    new_id: Callable[[], str],
) -> None:
    set_id = new_id()
    start = np.zeros(shape, np.float32)
    created = tcp_client.create_parameter_set(
        set_id,
        {"x": Table(shape[1:], capacity=shape[0]) if kind == "table" else start},
        RULES[rule],
        policy=Sync(WORKERS) if together else optserve.Async(),
        transforms=Transforms(clip=CLIPS[clip]),
        client_id="0",
    )
    updates: list[Array] = []
    with created, tcp_client.parameter_set(set_id, client_id="1", pull_format=formats.BFloat16()) as other:
        with ThreadPoolExecutor(1) as pool:
            for first, second in gradients(kind, shape):
                scaled = RowSparse(second.rows, 8 * second.values) if kind != "dense" else 8 * second
                if together:
                    waiting = pool.submit(other.push, {"x": scaled}, loss_scale=8.0)
                    assert created.push({"x": first}).applied
                    assert waiting.result().applied
                    updates.append((summed(first, shape) + summed(second, shape)) / WORKERS)
                else:
                    created.push({"x": first})
                    other.push({"x": scaled}, loss_scale=8.0)
                    updates += [summed(first, shape), summed(second, shape)]
        expected = replayed(start, updates, rule, clip)
        every = np.arange(shape[0])
        for handle, tolerance in ((created, 1e-4), (other, 1e-2)):
            pulled = handle.pull(rows={"x": every})["x"] if kind != "dense" else handle.pull()["x"]
            np.testing.assert_allclose(pulled, expected, rtol=tolerance, atol=tolerance)
        created.delete()


@pytest.mark.parametrize("pull_format", [None, formats.BFloat16()])
@pytest.mark.parametrize("client_name", ["memory_client", "tcp_client"])
def test_updates_of_moments_come_once(
    pull_format: formats.BFloat16 | None, client_name: str, new_id: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    """Not again with a push that makes none: one that waits for others, or is skipped."""
    client: optserve.Client = request.getfixturevalue(client_name)
    set_id, transforms = new_id(), Transforms(accumulate=2, nonfinite=SkipNonFinite())
    start = {"x": np.zeros(4, np.float32)}
    with (
        client.create_parameter_set(
            set_id, start, optim.SGD(lr=1.0), holds="moments", transforms=transforms
        ) as created,
        client.parameter_set(set_id, pull_format=pull_format) as weights,
    ):
        total = np.zeros(4)
        for value in (1.0, 2.0, np.nan, 3.0, np.nan, 5.0, 1.0):
            updates = weights.step({"x": np.full(4, value, np.float32)})
            assert set(updates) == ({"x"} if updates.receipt is not None and updates.receipt.applied else set())
            total += updates.get("x", 0.0)
        np.testing.assert_array_equal(total, -(1.5 + 4.0))
        created.delete()
