"""DiLoCo around a torch loop that knows nothing of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

import optserve
from optserve import optim, presets
from optserve.torch import DiLoCo

NewId = Callable[[], str]

EVERY, STEPS = 5, 20


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, seed: int = 0) -> None:
    """A loop as anyone writes it."""
    for step in steps:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(1_000 * seed + step)).double()
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.named_parameters()}


def test_islands_follow_the_algorithm(client: optserve.Client, new_id: NewId) -> None:
    """Two islands; the outer optimizer is torch's, on the mean of pseudo-gradients, in the oracle."""
    expected, islands = model_of(0), [model_of(0) for _ in range(2)]
    outer = torch.optim.SGD(expected.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    inner = [torch.optim.AdamW(island.parameters(), lr=1e-2) for island in islands]
    for start in range(0, STEPS, EVERY):
        for seed, island in enumerate(islands):
            island.load_state_dict(expected.state_dict())
            train(island, inner[seed], range(start, start + EVERY), seed)
        for own, *theirs in zip(*(each.parameters() for each in (expected, *islands)), strict=True):
            own.grad = own.detach() - sum(each.detach() for each in theirs) / 2
        outer.step()

    creation = presets.diloco(2)
    weights = client.create_parameter_set(new_id(), arrays_of(model_of(0)), **creation)
    handles = [weights, client.parameter_set(weights.id)]

    def island(seed: int) -> torch.nn.Module:
        model = model_of(seed)  # which begins with the set's parameters all the same
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with handles[seed].worker(f"island-{seed}") as worker:
            together.wait()
            with DiLoCo(worker, optimizer, model.named_parameters(), every=EVERY):
                train(model, optimizer, range(STEPS), seed)
        return model

    together = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for model in pool.map(island, range(2)):
            for one, two in zip(model.parameters(), expected.parameters(), strict=True):
                np.testing.assert_allclose(one.detach(), two.detach(), rtol=0, atol=1e-12)


def test_after_the_block_the_optimizer_is_an_ordinary_one(memory_client: optserve.Client, new_id: NewId) -> None:
    model = model_of(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = memory_client.create_parameter_set(new_id(), arrays_of(model), optim.SGD(lr=1.0))
    with DiLoCo(weights, optimizer, model.named_parameters(), every=EVERY) as diloco:
        train(model, optimizer, range(EVERY))
        assert diloco.synchronisations == 1
    train(model, optimizer, range(EVERY))
    assert diloco.synchronisations == 1


def test_autograd_sees_what_it_changes(memory_client: optserve.Client, new_id: NewId) -> None:
    model = model_of(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = memory_client.create_parameter_set(new_id(), arrays_of(model), optim.SGD(lr=1.0))
    output = model(torch.ones(1, 3, dtype=torch.float64)).square().sum()
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        DiLoCo(weights, optimizer, model.named_parameters(), every=EVERY),
    ):
        output.backward()


def test_tensors_elsewhere_are_refused(memory_client: optserve.Client, new_id: NewId) -> None:
    model = model_of(0)
    weights = memory_client.create_parameter_set(new_id(), arrays_of(model), optim.SGD(lr=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(optserve.InvalidTensor, match="'0.weight' is on meta"):
        DiLoCo(weights, optimizer, model.to("meta").named_parameters(), every=EVERY)
