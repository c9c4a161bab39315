"""Training through the service: where optimizers must arrive, and where one is known to go astray."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import optserve
from optserve import optim

NewId = Callable[[], str]


@pytest.mark.parametrize(
    "optimizer", [optim.SGD(lr=0.1), optim.Nesterov(lr=0.02), optim.Adam(lr=0.05)], ids=lambda o: o.rule
)
def test_linear_regression_converges_to_its_least_squares_solution(
    client: optserve.Client, new_id: NewId, optimizer: optim.Optimizer
) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 200)
    y = 3 * x + rng.normal(scale=0.1, size=200)
    slope, intercept = np.polyfit(x, y, 1)
    weights = client.create_parameter_set(new_id(), {"slope": np.zeros(()), "intercept": np.zeros(())}, optimizer)
    params = weights.pull()
    for _ in range(1500):
        error = params["slope"] * x + params["intercept"] - y
        params = weights.step({"slope": 2 * (error * x).mean(), "intercept": 2 * error.mean()})
    assert params["slope"] == pytest.approx(slope, abs=1e-9)
    assert params["intercept"] == pytest.approx(intercept, abs=1e-9)
    assert slope == pytest.approx(3, abs=0.05)


def test_four_asynchronous_workers_reach_the_same_solution(tcp_client: optserve.Client, new_id: NewId) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 400)
    y = 3 * x + rng.normal(scale=0.1, size=400)
    set_id = new_id()
    weights = tcp_client.create_parameter_set(set_id, {"slope": np.zeros(())}, optim.SGD(lr=0.02))

    def work(part: slice) -> None:
        with tcp_client.parameter_set(set_id) as mine:
            params = mine.pull()
            for _ in range(400):
                error = params["slope"] * x[part] - y[part]
                params = mine.step({"slope": 2 * (error * x[part]).mean()})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [slice(begin, begin + 100) for begin in range(0, 400, 100)]))
    params = weights.pull()
    assert params.version == 1600
    parts = [(x[begin : begin + 100], y[begin : begin + 100]) for begin in range(0, 400, 100)]
    solutions = [float(a @ b / (a @ a)) for a, b in parts]
    assert min(solutions) - 1e-3 <= params["slope"] <= max(solutions) + 1e-3


@pytest.mark.parametrize(("optimizer", "arrives_at"), [(optim.Adam, 1.0), (optim.AMSGrad, -1.0)])
def test_adam_fails_and_amsgrad_succeeds_where_reddi_et_al_say_so(
    client: optserve.Client, new_id: NewId, optimizer: type[optim.Adam], arrives_at: float
) -> None:
    """Theorem 1 of arXiv:1904.09237: losses Cx, -x, -x over x in [-1, 1], C = 3, betas (0, 1/(1 + C²)), rate 1/√t.

    The best point is -1; Adam goes to +1. The server holds the moments, the worker holds x and projects it.
    """
    c, x = 3.0, np.zeros(())
    weights = client.create_parameter_set(
        new_id(), {"x": x}, optimizer(betas=(0.0, 1 / (1 + c**2)), eps=0.0), holds="moments"
    )
    for t in range(1, 601):
        gradient = c if t % 3 == 1 else -1.0
        updates = weights.step({"x": np.array(gradient)}, hyperparameters={"default": {"lr": 0.5 / np.sqrt(t)}})
        x = np.clip(x + updates["x"], -1, 1)
    assert x == pytest.approx(arrives_at, abs=0.1)
