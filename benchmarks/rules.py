"""The update loops against the memory's bandwidth, torch's fused kernels, and themselves on denormal numbers.

A rule moves a known number of bytes for each parameter: it reads the gradient, and reads and writes parameter and slots; sign,
clipping and weight decay are in the same loop. The guard, which has to see every gradient before anything changes, reads it
once more. The roofline is the rate at which an in-place `a += s * b` moves its 12 bytes: compiled the same way, on the same
threads, and in memory of the same kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Timing, interleaved, keep
from benchmarks.tables import within_quartiles
from benchmarks.units import count, duration
from optserve import ClipGlobalNorm, ClipValue, TensorSpec, Transforms, optim
from optserve._specification import BLOCK, ParameterSetSpec, Run
from optserve_server.engine.arena import aligned
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.rules import rule_for
from optserve_server.engine.threads import Threads

SIZE = 25_000_000
AXPY_BYTES = 12
WIDTH = 120  # characters of the table
DENORMAL = 1e-42  # of float32, whose smallest normal number is 1.2e-38

RULES = {
    "SGD": optim.SGD(),
    "SGD, weight decay": optim.SGD(weight_decay=0.01),
    "Momentum": optim.Momentum(),
    "Nesterov": optim.Nesterov(),
    "VelocityMomentum": optim.VelocityMomentum(),
    "AveragedMomentum": optim.AveragedMomentum(),
    "Adagrad": optim.Adagrad(),
    "RMSprop": optim.RMSprop(),
    "RMSprop, centered": optim.RMSprop(centered=True),
    "RMSprop, momentum": optim.RMSprop(momentum=0.9),
    "RMSprop, centered, momentum": optim.RMSprop(centered=True, momentum=0.9),
    "BiasCorrectedRMSprop": optim.BiasCorrectedRMSprop(),
    "Adam": optim.Adam(),
    "AdamW": optim.AdamW(),
    "AMSGrad": optim.AMSGrad(),
    "NAdam": optim.NAdam(),
    "RAdam": optim.RAdam(),
    "Adamax": optim.Adamax(),
    "AdaBelief": optim.AdaBelief(),
    "Yogi": optim.Yogi(),
    "Adan": optim.Adan(),
    "AdEMAMix": optim.AdEMAMix(),
    "ADOPT": optim.ADOPT(),
    "ASGD": optim.ASGD(),
    "SignSGD": optim.SignSGD(),
    "Signum": optim.Signum(),
    "Lion": optim.Lion(),
    "Adadelta": optim.Adadelta(),
    "Rprop": optim.Rprop(),
    "FTRL": optim.FTRL(),
    "SparseAdam": optim.SparseAdam(),
    "ScheduleFreeSGD": optim.ScheduleFreeSGD(),
    "ScheduleFreeAdamW": optim.ScheduleFreeAdamW(),
    "FedAdagrad": optim.FedAdagrad(),
    "FedAdagrad, momentum": optim.FedAdagrad(beta1=0.9),
    "FedAdam": optim.FedAdam(),
    "FedYogi": optim.FedYogi(),
    "DelayedNesterov": optim.DelayedNesterov(),
}

PLAIN = Transforms()
CLIPPED = {
    "Adam, clipped by norm": Transforms(clip=ClipGlobalNorm(1.0)),
    "Adam, clipped by value": Transforms(clip=ClipValue(1.0)),
}

Kernel = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
TORCH: dict[str, Kernel] = {
    "SGD": lambda each: torch.optim.SGD(each, lr=1e-3, fused=True),
    "SGD, weight decay": lambda each: torch.optim.SGD(each, lr=1e-3, weight_decay=0.01, fused=True),
    "Momentum": lambda each: torch.optim.SGD(each, lr=1e-3, momentum=0.9, fused=True),
    "Nesterov": lambda each: torch.optim.SGD(each, lr=1e-3, momentum=0.9, nesterov=True, fused=True),
    "Adagrad": lambda each: torch.optim.Adagrad(each, fused=True),
    "Adam": lambda each: torch.optim.Adam(each, fused=True),
    "AdamW": lambda each: torch.optim.AdamW(each, fused=True),
    "AMSGrad": lambda each: torch.optim.Adam(each, amsgrad=True, fused=True),
}  # by rule: all fused kernels that it has for processors

WITH_DENORMALS = ("Momentum", "Adagrad", "RMSprop", "Adam")


class Contender:
    """One parameter set of one tensor, stepped directly on the engine."""

    def __init__(
        self, optimizer: optim.Optimizer, gradient: np.ndarray, threads: Threads, transforms: Transforms = PLAIN
    ) -> None:
        self.spec = TensorSpec.of("x", gradient)
        self.gradient = gradient
        spec = ParameterSetSpec("bench", (self.spec,), optimizer, transforms=transforms)
        self.set = ParameterSet(spec, incarnation=1, threads=threads)
        self.session = self.set.open("bench", 0, self)
        self.slots = rule_for(optimizer).slots
        self.bytes = 4 * (3 + 2 * len(self.slots))

    def guard(self) -> Push:
        """Stage the gradient and guard it."""
        push = self.set.begin(self.session.last_sequence + 1, [Declared(self.spec)])
        push.add([Run(0, 0, self.spec.size)], self.gradient.data, replace=False)
        push.finish()
        return push

    def fill(self, value: float) -> None:
        """Fill the whole state with a value."""
        with self.set.frozen() as state:
            for slot in self.slots:
                for array in state.arenas[slot].values():
                    array.fill(value)

    def step(self) -> None:
        """Guard and update."""
        self._apply(self.guard())

    def updater(self) -> Callable[[], None]:
        """Update alone, with a gradient that was guarded before."""
        push = self.guard()

        def update() -> None:
            push.sequence = self.session.last_sequence + 1
            self._apply(push)

        return update

    def _apply(self, push: Push) -> None:
        receipt, _ = self.set.push(self.session, self, push, pull=False)
        assert receipt.applied, receipt


def filled(values: np.ndarray) -> np.ndarray:
    """The values in memory as arenas have it."""
    array = aligned(values.nbytes).view(values.dtype)
    np.copyto(array, values)
    return array


def axpy(gradient: np.ndarray, threads: Threads) -> Callable[[], None]:
    """`a += s * b` in place, a block at a time as the rules have it."""

    @njit(nogil=True, error_model="numpy")
    def loop(table, a, b, s):  # type: ignore[no-untyped-def]
        for r in range(len(table)):
            end = table[r, 0] + table[r, 1]
            for first in range(table[r, 0], end, BLOCK):
                last = min(first + BLOCK, end)
                target, source = a[first:last], b[first:last]
                for i in range(last - first):
                    target[i] += s * source[i]

    target = filled(np.zeros_like(gradient))
    table = np.array([[0, gradient.size]], np.int64)
    return lambda: threads.run(loop, table, {}, target, gradient, np.float32(1e-3))


def torch_step(kernel: Kernel, gradient: np.ndarray) -> Callable[[], object]:
    """A step of one of torch's fused kernels, no guard."""
    parameter = torch.nn.Parameter(torch.zeros(gradient.size))
    parameter.grad = torch.from_numpy(gradient)
    return kernel([parameter]).step


def run(sizes: Sequence[int] = (), rounds: int = 15) -> None:
    """Measure every rule, in rounds with the roofline and with torch, and keep the figures unless sizes are given."""
    threads = Threads()
    torch.set_num_threads(threads.count)
    for size in sizes or (SIZE,):
        gradient = filled(np.random.default_rng(0).normal(size=size).astype(np.float32))
        figures = {
            "rules": _rules(gradient, threads, rounds),
            "denormals_over_normals": _denormals(gradient, threads, rounds),
        }
        if not sizes:
            Console().print(f"kept in {keep('rules', figures)}")


def _rules(gradient: np.ndarray, threads: Threads, rounds: int) -> dict[str, Any]:
    table = Table(title=f"{count(gradient.size)} float32 parameters, {threads.count} threads, medians of {rounds}")
    for column in ("rule", "bytes", "update", "of roofline", "guard + update", "of roofline", "torch ÷ update"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    figures = {}
    roofline = axpy(gradient, threads)
    measured = {name: (optimizer, PLAIN) for name, optimizer in RULES.items()}
    for name, (optimizer, transforms) in (
        measured | {name: (optim.Adam(), each) for name, each in CLIPPED.items()}
    ).items():
        contender = Contender(optimizer, gradient, threads, transforms)
        turns = {"axpy": roofline, "update": contender.updater(), "step": contender.step}
        if name in TORCH:
            turns["torch"] = torch_step(TORCH[name], gradient)
        timings = interleaved(turns, rounds)
        figures[name] = _figures(timings, contender.bytes)
        table.add_row(name, *_row(timings, figures[name]))
    Console(width=WIDTH).print(table)
    return figures


def _figures(timings: Mapping[str, Timing], moved: int) -> dict[str, Any]:
    """The guard reads 4 bytes more than the update moves."""
    figures: dict[str, Any] = {
        "bytes_per_parameter": {"update": moved, "step": moved + 4},
        "of_roofline": {
            "update": _of_roofline(timings["update"], timings["axpy"], moved),
            "step": _of_roofline(timings["step"], timings["axpy"], moved + 4),
        },
    }
    if "torch" in timings:
        figures["torch_over_update"] = timings["torch"].ratio(timings["update"])
        figures["torch_over_step"] = timings["torch"].ratio(timings["step"])
    return figures | {"seconds": {name: timing.seconds for name, timing in timings.items()}}


def _of_roofline(timing: Timing, roofline: Timing, moved: int) -> tuple[float, float, float]:
    low, median, high = (moved / AXPY_BYTES * ratio for ratio in roofline.ratio(timing))
    return low, median, high


def _row(timings: Mapping[str, Timing], figures: Mapping[str, Any]) -> list[str]:
    row = [str(figures["bytes_per_parameter"]["update"])]
    for each in ("update", "step"):
        row += [duration(timings[each].median), within_quartiles(figures["of_roofline"][each])]
    return [*row, within_quartiles(figures["torch_over_update"]) if "torch" in timings else "—"]


def _denormals(gradient: np.ndarray, threads: Threads, rounds: int) -> dict[str, Any]:
    """How much longer an update takes whose gradients and state are all denormal."""
    small = filled(np.full_like(gradient, DENORMAL))
    figures = {}
    for name in WITH_DENORMALS:
        normal, denormal = (Contender(RULES[name], each, threads) for each in (gradient, small))
        normal.fill(1.0)
        denormal.fill(DENORMAL)
        timings = interleaved({"normal": normal.updater(), "denormal": denormal.updater()}, rounds)
        figures[name] = timings["denormal"].ratio(timings["normal"])
        Console().print(f"{name}: denormals ÷ normal numbers {within_quartiles(figures[name])}")
    return figures
