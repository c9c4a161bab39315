"""Policies compared, for who has to choose one: workers of which some are slow, and what each policy makes of them.

Eight processes train on the digits; a gradient takes six of them 30 ms and two of them 300, by the median, which they wait for
if they have calculated it before. That is real waiting for a real server, so figures differ from run to run.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import optserve
from benchmarks.children import python, server
from benchmarks.measure import keep
from benchmarks.pictures import coloured, draw_bars, draw_curves, over_time, picture, save
from benchmarks.tables import spread, table
from benchmarks.training import WORKER, Course, Job, Local, Step, train
from optserve import Async, BoundedStaleness, Buffered, Client, Outcome, Sync, optim, presets
from optserve_server.demo import digits
from optserve_server.demo.processes import Child

PACES = (0.03,) * 6 + (0.3,) * 2  # seconds of a gradient, by worker: the median of a log-normal distribution
FAST, SLOW = slice(6), slice(6, 8)
JITTER = 0.3  # its sigma
BATCH = 32
LIMIT = 30.0  # seconds
SEEDS = 3
AIM = 0.97  # of the test images
LEARNING_RATE = 0.003  # of Adam, wherever it runs
EVERY = 20  # steps between DiLoCo's synchronisations

ADAM = optim.Adam(lr=LEARNING_RATE)
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "Sync()": {"optimizer": ADAM, "policy": Sync()},
    "Sync(quorum=6)": {"optimizer": ADAM, "policy": Sync(quorum=6)},
    "BoundedStaleness(4)": {"optimizer": ADAM, "policy": BoundedStaleness(4)},
    "Buffered(pushes=8)": {"optimizer": ADAM, "policy": Buffered(pushes=8)},
    "Async()": {"optimizer": ADAM, "policy": Async()},
    f"DiLoCo(every={EVERY}), quorum of 6": presets.diloco(momentum=0.8) | {"policy": Sync(quorum=6)},
}


def measured(
    client: Client, address: str, children: Sequence[Child], name: str, seed: int, limit: float
) -> dict[str, Any]:
    """Train for so many seconds."""
    weights = client.create_parameter_set("digits", digits.initial_parameters(seed), **POLICIES[name])
    local = Local(every=EVERY, lr=LEARNING_RATE) if name.startswith("DiLoCo") else None
    job: dict[str, Any] = {
        "address": address,
        "set_id": weights.id,
        "seed": seed,
        "batch": BATCH,
        "steps": 1 << 30,
        "local": local,
    }
    jobs = [Job(worker=worker, pace=pace, jitter=JITTER, **job) for worker, pace in enumerate(PACES)]
    return _found(train(weights, children, jobs, limit))


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    limit, seeds = (4.0, 1) if short else (LIMIT, SEEDS)
    figures: dict[str, list[Any]] = {name: [] for name in POLICIES}
    console = Console()
    with ExitStack() as stack:
        address, _ = stack.enter_context(server())
        client = stack.enter_context(optserve.Client(address))
        children = [stack.enter_context(python(WORKER)) for _ in PACES]
        for name in POLICIES:  # what is compiled is compiled now
            measured(client, address, children, name, 0, 2.0)
        for seed, name in track([*product(range(seeds), POLICIES)], "policies", console=console):
            figures[name].append(measured(client, address, children, name, seed, limit))
    _show(figures, limit)
    if not short:
        console.print(f"kept in {keep('policies', figures)} and {_draw(figures)}")


def _found(course: Course) -> dict[str, Any]:
    steps = [step for some in course.steps for step in some]
    pushes = [step for step in steps if step.outcome is not None]
    return {
        "accuracy": course.accuracy,
        "seconds_to_aim": course.seconds_to(AIM),
        "updates": course.looks[-1].version,
        "gradients": len(steps),
        "pushes": len(pushes),
        "discarded": sum(step.outcome == Outcome.DISCARDED.name for step in pushes),
        "waiting": {"fast": _waiting(course.steps[FAST]), "slow": _waiting(course.steps[SLOW])},
        "staleness": np.bincount([step.staleness for step in pushes if step.staleness is not None]).tolist(),
        "looks": {
            "at": [look.at for look in course.looks if look.version],
            "accuracy": [look.accuracy for look in course.looks if look.version],
        },
    }


def _waiting(workers: Sequence[Sequence[Step]]) -> float:
    """The part of their time that workers wait for answers."""
    exchanging = sum(step.exchanging for steps in workers for step in steps)
    return exchanging / sum(step.exchanging + step.computing for steps in workers for step in steps)


def _staleness(runs: Sequence[Mapping[str, Any]], part: float) -> float:
    """What so much of the pushes of all runs was at most stale by, in updates."""
    counts = np.zeros(max(len(each["staleness"]) for each in runs))
    for each in runs:
        counts[: len(each["staleness"])] += each["staleness"]
    return float(np.searchsorted(np.cumsum(counts) / counts.sum(), part))


def _show(figures: Mapping[str, Sequence[Mapping[str, Any]]], limit: float) -> None:
    columns = (f"to {AIM:.0%}", "accuracy", "updates", "gradients", "discarded", "waiting", "stale by", "99 %")
    found = table(f"{limit:g} s of training; the fast workers' waiting; medians", "", *columns)
    for name, runs in figures.items():
        found.add_row(
            name,
            spread([each["seconds_to_aim"] for each in runs], "{:.1f} s".format),
            f"{statistics.median(each['accuracy'] for each in runs):.1%}",
            f"{statistics.median(each['updates'] for each in runs):g}",
            f"{statistics.median(each['gradients'] for each in runs):g}",
            f"{statistics.median(each['discarded'] / each['pushes'] for each in runs):.1%}",
            f"{statistics.median(each['waiting']['fast'] for each in runs):.0%}",
            f"{_staleness(runs, 0.5):g}",
            f"{_staleness(runs, 0.99):g}",
        )
    Console().print(found)


def _draw(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    figure = picture(11, 5.5, "Eight workers, of whom two take ten times as long, learn to read digits")
    panels = figure.subplot_mosaic([["curves", each] for each in ("aim", "waiting", "staleness")], width_ratios=(3, 2))
    colours = coloured(figures)
    looks = {
        name: [(each["looks"]["at"], each["looks"]["accuracy"]) for each in runs] for name, runs in figures.items()
    }
    draw_curves(panels["curves"], looks, colours)
    over_time(panels["curves"])
    bars: dict[str, tuple[str, Callable[[Any], float | None], Callable[[float], str]]] = {
        "aim": (f"seconds to {AIM:.0%}", lambda found: found["seconds_to_aim"], "{:.1f}".format),
        "waiting": (
            "time that fast workers wait",
            lambda found: found["waiting"]["fast"],
            "{:.0%}".format,
        ),
        "staleness": (
            "staleness, 95th percentile",
            lambda found: _staleness([found], 0.95),
            "{:g}".format,
        ),
    }
    for place, (title, value, text) in bars.items():
        values = {name: [value(found) for found in runs] for name, runs in figures.items()}
        draw_bars(panels[place], title, values, text, colours)
    return save(figure, "policies")
