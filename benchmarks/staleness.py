"""What stale gradients do to training, and what the rules against that do about it.

Eight workers, of whom two take ten times as long for a gradient, train on the digits with an engine in this process and by
a clock that does not tick: time passes only as long as gradients are said to take. So who pushes when, and with it all
staleness, is the same in every run with a seed, on any machine.
"""

import heapq
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator, PercentFormatter
from rich.console import Console
from rich.progress import track

import optserve
from benchmarks.measure import keep
from benchmarks.pictures import coloured, draw_curves, draw_range, picture, save
from benchmarks.tables import spread, table
from benchmarks.training import images
from optserve import Async, Client, Policy, optim
from optserve.staleness import DelayCompensation, DivideLearningRate, GapAware, Polynomial, Reject
from optserve_server.demo import digits

PACES = (1.0,) * 6 + (10.0,) * 2  # seconds of a gradient, by worker: the median of a log-normal distribution
JITTER = 0.3  # its sigma
BATCH = 32
PUSHES = 1500
LOOK = 25  # pushes between two looks at the parameters
MOMENTUM = 0.9
LEARNING_RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
SHOWN = 0.05  # what gradients that are not stale take well
SEEDS = 5
BOUND = 10  # updates; the fast workers' gradients are about six old

ALONE = "one worker, never stale"
RULES: Mapping[str, tuple[Policy, Sequence[float]]] = {
    ALONE: (Async(), PACES[:1]),
    "nothing done": (Async(), PACES),
    f"Reject({BOUND})": (Async(Reject(BOUND)), PACES),
    "DivideLearningRate()": (Async(DivideLearningRate()), PACES),
    "Polynomial()": (Async(Polynomial()), PACES),
    "DelayCompensation()": (Async(DelayCompensation()), PACES),
    "GapAware()": (Async(GapAware()), PACES),
}


def pushers(paces: Sequence[float], random: np.random.Generator) -> Iterator[int]:
    """Who pushes next, for ever: a worker begins another gradient once it has pushed one."""
    due = [(pace * random.lognormal(0.0, JITTER), worker) for worker, pace in enumerate(paces)]
    heapq.heapify(due)
    while True:
        now, worker = due[0]
        yield worker
        heapq.heapreplace(due, (now + paces[worker] * random.lognormal(0.0, JITTER), worker))


def train(client: Client, policy: Policy, paces: Sequence[float], lr: float, seed: int, pushes: int) -> dict[str, Any]:
    """Train on the digits, until so many pushes or until gradients are not finite any more."""
    training, test = images()
    random = np.random.default_rng(seed)
    optimizer = optim.SGD(lr=lr, momentum=MOMENTUM)
    staleness: list[int] = []
    looks: dict[str, list[float]] = {"pushes": [], "accuracy": []}
    with ExitStack() as stack, np.errstate(all="ignore"):
        weights = stack.enter_context(
            client.create_parameter_set("digits", digits.initial_parameters(seed), optimizer, policy=policy)
        )
        workers = [stack.enter_context(weights.worker(f"worker-{worker}")) for worker in range(len(paces))]
        held = [worker.pull() for worker in workers]
        order = pushers(paces, random)
        for push in range(1, pushes + 1):
            worker = next(order)
            batch = training[random.integers(len(training), size=BATCH)]
            _, gradients = digits.loss_and_gradients(held[worker], batch)
            try:
                held[worker] = workers[worker].step(gradients)
            except optserve.NonFiniteValue:
                break
            receipt = held[worker].receipt
            assert receipt is not None
            assert receipt.staleness is not None
            staleness.append(receipt.staleness)
            if push % LOOK == 0:
                looks["pushes"].append(push)
                looks["accuracy"].append(digits.accuracy(held[worker], test))
        last = weights.pull()
        weights.delete()
        return {
            "accuracy": digits.accuracy(last, test),
            "updates": last.version,
            "staleness": np.bincount(staleness).tolist(),
            "looks": looks,
        }


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    pushes, seeds, rates = (200, 2, (SHOWN,)) if short else (PUSHES, SEEDS, LEARNING_RATES)
    figures: dict[str, dict[str, list[Any]]] = {name: {f"{lr:g}": [] for lr in rates} for name in RULES}
    console = Console()
    with optserve.Client(":memory:") as client:
        for name, lr, seed in track([*product(RULES, rates, range(seeds))], "stale gradients", console=console):
            policy, paces = RULES[name]
            trained = train(client, policy, paces, lr, seed, pushes)
            if lr != SHOWN:
                del trained["looks"]
            figures[name][f"{lr:g}"].append(trained)
    _show(figures)
    if not short:
        console.print(f"kept in {keep('staleness', figures)} and {_draw(figures)}")


def _show(figures: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    rates = list(figures[ALONE])
    shown = table("accuracy on the test images, by learning rate", "", *rates, f"updates at {SHOWN:g}")
    for name, runs in figures.items():
        accuracies = [spread([each["accuracy"] for each in runs[rate]], "{:.1%}".format) for rate in rates]
        updates = statistics.median(each["updates"] for each in runs[f"{SHOWN:g}"])
        shown.add_row(name, *accuracies, f"{updates:g}")
    Console().print(shown)


def _draw(figures: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Path:
    figure = picture(11, 5, "Eight workers, of whom two take ten times as long, learn to read digits")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = coloured(figures)
    shown = {
        name: [(each["looks"]["pushes"], each["looks"]["accuracy"]) for each in runs[f"{SHOWN:g}"]]
        for name, runs in figures.items()
    }
    draw_curves(left, shown, colours)
    left.set(xlabel="gradients pushed", ylabel="accuracy on the test images", ylim=(0, 1))
    left.set_title(f"Learning rate {SHOWN:g}: median and range of {SEEDS} seeds", loc="left", size=10)
    ends = {
        name: ([float(rate) for rate in runs], [[each["accuracy"] for each in some] for some in runs.values()])
        for name, runs in figures.items()
    }
    draw_range(right, ends, colours)
    right.set(xscale="log", xlabel=f"learning rate of SGD with momentum {MOMENTUM:g}")
    right.set_xticks(LEARNING_RATES, labels=[f"{rate:g}" for rate in LEARNING_RATES])
    right.xaxis.set_minor_locator(NullLocator())
    right.set_title(f"After {PUSHES} gradients", loc="left", size=10)
    right.legend(frameon=False, loc="lower left", fontsize=9)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    return save(figure, "staleness")
