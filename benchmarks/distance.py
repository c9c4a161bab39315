"""How far float32 parameters end from torch's: on a server, and in torch's own other implementations.

Two small models are trained for some steps, each run with its own gradients, so that training amplifies what rounding does.
torch's loop over tensors in float32 is what the others are compared with, and it is with the loop in float64. Distances are the
largest difference in a model, in shares of its tensor's largest magnitude.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import optserve
from benchmarks.measure import keep
from benchmarks.models import OPTIONS, Convolutions, Transformer, backward, made
from benchmarks.tables import spread, table
from optserve import optim
from optserve.torch import RemoteOptimizer

STEPS = 200
SEEDS = 3
KINDS = {"convolutions": Convolutions, "transformer": Transformer}
NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "ASGD",
    "Adafactor",
)
NAMES += ("SparseAdam", "Muon")
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # all that have it for processors
FOREACH = tuple(name for name in NAMES if name not in ("SparseAdam", "Muon"))
COLUMNS = {
    "remote from loop": ("remote", "loop"),
    "foreach from loop": ("foreach", "loop"),
    "fused from loop": ("fused", "loop"),
    "remote from float64": ("remote", "float64"),
    "loop from float64": ("loop", "float64"),
}

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@contextmanager
def in_float64() -> Iterator[None]:
    """Let torch keep in float64 what it knows of a tensor, such as NAdam's product of momenta: it takes the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def tensors_of(name: str, model: nn.Module) -> list[nn.Parameter]:
    """What is trained: by Muon matrices only."""
    return [tensor for tensor in model.parameters() if name != "Muon" or tensor.ndim == 2]


def train(name: str, model: nn.Module, build: Build, batches: Iterable[int]) -> list[torch.Tensor]:
    """The parameters after some steps."""
    tensors = tensors_of(name, model)
    optimizer = build(tensors)
    for batch in batches:
        model.zero_grad()
        backward(model, batch)
        if name == "SparseAdam":
            for tensor in tensors:
                tensor.grad = None if tensor.grad is None else tensor.grad.to_sparse(1)
        optimizer.step()
    return [tensor.detach() for tensor in tensors]


def distance(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest difference, in shares of each tensor's largest magnitude."""
    return max(
        float((one.double() - other).abs().max() / other.double().abs().max())
        for one, other in zip(ones, others, strict=True)
    )


def runs(name: str, kind: type[nn.Module], seed: int, client: optserve.Client, steps: int) -> dict[str, float | None]:
    """The distances between all that there is of an optimizer."""
    options = OPTIONS.get(name, {"lr": 1e-2})
    batches = range(seed * STEPS, seed * STEPS + steps)

    def local(**choice: bool) -> Build:
        return lambda tensors: getattr(torch.optim, name)(tensors, **options, **choice)

    def remote(tensors: list[nn.Parameter]) -> torch.optim.Optimizer:
        return RemoteOptimizer(tensors, client, f"{kind.__name__}/{name}/{seed}", optim.catalogue()[name](**options))

    loop = local(foreach=False) if name in FOREACH else local()
    builds: dict[str, Build] = {"loop": loop, "remote": remote}
    builds |= {"foreach": local(foreach=True)} if name in FOREACH else {}
    builds |= {"fused": local(fused=True)} if name in FUSED else {}
    ends = {each: train(name, made(kind, torch.float32), build, batches) for each, build in builds.items()}
    exact = made(kind, torch.float32).double()
    with in_float64():
        ends["float64"] = train(name, exact, loop, batches)
    return {
        column: distance(ends[one], ends[other]) if one in ends else None for column, (one, other) in COLUMNS.items()
    }


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    steps, seeds = (20, 1) if short else (STEPS, SEEDS)
    figures: dict[str, dict[str, dict[str, list[float | None]]]] = {
        kind: {name: {column: [] for column in COLUMNS} for name in NAMES} for kind in KINDS
    }
    torch.set_num_threads(1)  # for models of this size, more are in each other's way
    console = Console()
    with optserve.Client(":memory:") as client:
        for kind, name, seed in track([*product(KINDS, NAMES, range(seeds))], "distances", console=console):
            for column, value in runs(name, KINDS[kind], seed, client, steps).items():
                figures[kind][name][column].append(value)
    for kind, rows in figures.items():
        _show(kind, rows, console)
    if not short:
        console.print(f"kept in {keep('torch_distance', {'steps': steps, 'distances': figures})}")


def _show(kind: str, rows: Mapping[str, Mapping[str, Sequence[Any]]], console: Console) -> None:
    shown = table(f"{kind}, medians of float32 distances", "optimizer", *COLUMNS)
    for name, columns in rows.items():
        shown.add_row(name, *(spread(values, "{:.1e}".format) for values in columns.values()))
    console.print(shown)
