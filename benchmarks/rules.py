"""The update loops against the memory's bandwidth, and Adam against torch's fused kernel.

A rule moves a known number of bytes for each parameter: it reads the gradient, and reads and writes parameter and slots. The
guard reads the gradient once more. The roofline is the rate at which an in-place `a += s * b`, compiled and threaded the same
way, moves its 12 bytes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Timing, interleaved, keep
from optserve import TensorSpec, optim
from optserve._specification import ParameterSetSpec, Run
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.threads import Threads

SIZE = 25_000_000
AXPY_BYTES = 12

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
}


class Contender:
    """One parameter set of one tensor, stepped directly on the engine."""

    def __init__(self, optimizer: optim.Optimizer, gradient: np.ndarray, threads: Threads) -> None:
        self.spec = TensorSpec.of("x", gradient)
        self.gradient = gradient
        self.set = ParameterSet(ParameterSetSpec("bench", (self.spec,), optimizer), incarnation=1, threads=threads)
        self.session = self.set.open("bench", 0, self)
        self.bytes = 4 * (3 + 2 * len(self.set.rule.slots))

    def guard(self) -> Push:
        """Stage the gradient and guard it."""
        push = self.set.begin(self.session.last_sequence + 1, [Declared(self.spec)])
        push.add([Run(0, 0, self.spec.size)], self.gradient.data, replace=False)
        push.finish()
        return push

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


def axpy(gradient: np.ndarray, threads: Threads) -> Callable[[], None]:
    """`a += s * b` in place, on the same threads."""

    @njit(nogil=True, error_model="numpy")
    def loop(table, a, b, s):  # type: ignore[no-untyped-def]
        for r in range(len(table)):
            for i in range(table[r, 0], table[r, 0] + table[r, 1]):
                a[i] += s * b[i]

    target = np.zeros_like(gradient)
    table = np.array([[0, gradient.size]], np.int64)
    return lambda: threads.run(loop, table, {}, target, gradient, np.float32(1e-3))


def torch_adam(gradient: np.ndarray) -> Callable[[], object]:
    """`torch.optim.Adam(fused=True)`, no guard."""
    parameter = torch.nn.Parameter(torch.zeros(gradient.size))
    parameter.grad = torch.from_numpy(gradient)
    return torch.optim.Adam([parameter], fused=True).step


def run(rounds: int = 15) -> None:
    """Measure every rule in a run with the roofline and with torch."""
    threads = Threads()
    torch.set_num_threads(threads.count)
    gradient = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    table = Table(title=f"{SIZE:,} float32 parameters, guard included, {threads.count} threads, medians of {rounds}")
    for column in ("rule", "bytes", "ms", "M/s", "of roofline", "(quartiles)"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    figures = {}
    roofline, peer = axpy(gradient, threads), torch_adam(gradient)
    for name, optimizer in RULES.items():
        contender = Contender(optimizer, gradient, threads)
        timings = interleaved(
            {"axpy": roofline, "step": contender.step, "update": contender.updater(), "torch": peer}, rounds
        )
        moved = contender.bytes + 4
        low, median, high = (moved / AXPY_BYTES / ratio for ratio in timings["step"].ratio(timings["axpy"])[::-1])
        figures[name] = _figures(timings, moved, (low, median, high))
        rate = SIZE / timings["step"].median / 1e6
        milliseconds = f"{timings['step'].median * 1e3:.2f}"
        table.add_row(name, str(moved), milliseconds, f"{rate:.0f}", f"{median:.2f}", f"{low:.2f}-{high:.2f}")
    Console().print(table)
    for what, key in (("update alone", "torch_over_update"), ("guard and update", "torch_over_step")):
        low, median, high = figures["Adam"][key]
        Console().print(f"torch.optim.Adam(fused=True) ÷ Adam, {what}: {median:.2f} ({low:.2f}-{high:.2f})")
    Console().print(f"kept in {keep('rules', figures)}")


def _figures(timings: dict[str, Timing], moved: int, roofline: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "bytes_per_parameter": moved,
        "of_roofline": roofline,
        "torch_over_update": timings["torch"].ratio(timings["update"]),
        "torch_over_step": timings["torch"].ratio(timings["step"]),
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }
