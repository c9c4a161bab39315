"""Clients and processes that are forked: what belongs to one is not touched by another."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Server

NewId = Callable[[], str]

COUNTING = optim.SGD(lr=1.0, maximize=True)  # each push of ones adds one
ONES = {"x": np.ones(4, np.float32)}
PATIENCE = 60.0  # seconds

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")


def forked(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises, in a process that is forked here."""

    def run() -> None:
        try:
            answers.send(call())
        except BaseException as error:
            answers.send(error)

    received, answers = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        assert received.poll(PATIENCE), "the forked process says nothing"
        answer = received.recv()
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
    return answer


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_a_handle_is_of_no_use_in_a_forked_process_and_goes_on_in_its_own(
    client: optserve.Client, new_id: NewId
) -> None:
    weights = client.create_parameter_set(new_id(), {"x": np.zeros(4, np.float32)}, COUNTING)
    weights.step(ONES)
    calls: list[Callable[[], Any]] = [
        lambda: weights.step(ONES),
        lambda: weights.push(ONES),
        weights.pull,
        weights.describe,
        weights.barrier,
        weights.settle,
        weights.gradient_buffers,
        client.list_parameter_sets,
        lambda: client.parameter_set(weights.id),
    ]
    for error in forked(lambda: list(map(error_of, calls))):
        assert isinstance(error, optserve.FailedPrecondition)
        assert "expected a client of this process" in str(error)
    assert forked(lambda: (weights.close(), client.close())) == (None, None)
    np.testing.assert_array_equal(weights.step(ONES)["x"], 2 * ONES["x"])
    assert weights.identity.sequence == 2


@pytest.mark.parametrize("transport", ["stream", "shared_memory"])
def test_a_forked_process_has_a_client_of_its_own(transport: str, server: Server, new_id: NewId) -> None:
    set_id = new_id()

    def step() -> float:
        with optserve.Client(server.address, transport=transport) as own:
            return float(own.parameter_set(set_id).step(ONES)["x"][0])

    with optserve.Client(server.address, transport=transport) as client:
        weights = client.create_parameter_set(set_id, {"x": np.zeros(4, np.float32)}, COUNTING)
        assert [float(weights.step(ONES)["x"][0]), forked(step), float(weights.step(ONES)["x"][0])] == [1.0, 2.0, 3.0]


class Numbers(Dataset[torch.Tensor]):
    """So many numbers."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def test_a_data_loader_may_fork_workers_between_steps(server: Server, new_id: NewId) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = RemoteOptimizer(model.named_parameters(), server.address, new_id(), optim.SGD(lr=1e-4))
    for _ in range(2):
        for batch in DataLoader(Numbers(), batch_size=16, num_workers=2, multiprocessing_context="fork"):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    assert optimizer.weights.describe().position.version == 8
    optimizer.close()
