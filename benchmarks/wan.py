"""Ways to train over a slow link: what they achieve by when, what they send, and for how much of the time they calculate.

Four workers, each behind an emulated link of its own to the server; the processors they share with it. Their network is the
demonstration's, but wider, so that sending it takes longer than a round trip. All ways have the same number of images, and
learning rates that fall in a straight line to zero. Then DiLoCo against synchronous training over links without delay: what it
loses in accuracy, and saves in bytes.
"""

import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

import optserve
from benchmarks.children import server
from benchmarks.link import Network, NoLink, Traffic, isolated, network
from benchmarks.measure import keep
from benchmarks.pictures import coloured, draw_bars, draw_curves, over_time, picture, save
from benchmarks.tables import spread, table
from benchmarks.training import WORKER, Course, Job, Local, train
from optserve import Async, Sync, optim, presets, schedules
from optserve_server.demo import digits
from optserve_server.demo.processes import Child

WORKERS = 4
WIDTHS = (64, 512, 256, 10)
BATCH = 64
STEPS = 1000  # of each worker
EVERY = 50  # steps between DiLoCo's synchronisations
SEEDS = 3
AIM = 0.97  # of the test images
PORT = 50051
SLOW = {"rate": 100e6 / 8, "delay": 0.02, "room": 0.1}
FAST = {"rate": 100e9 / 8, "delay": 0.0, "room": 1.0}
LEARNING_RATE = 0.003  # of Adam, at the server
LOCAL_LEARNING_RATE = 0.002  # of DiLoCo's Adam, in workers
MOMENTUM = 0.8  # of DiLoCo: 0.9 remembers ten synchronisations, of which there are twenty
SYNC, DILOCO = "sync, float32", "DiLoCo"


@dataclass(frozen=True)
class Way:
    """How workers train: what their set is created with, and what their jobs say besides."""

    creation: Mapping[str, Any]
    job: Mapping[str, Any] = field(default_factory=dict)


def ways(steps: int) -> dict[str, Way]:
    """Everyone who is measured, for so many steps of each worker."""

    def adam(updates: int) -> optim.Adam:
        return optim.Adam(lr=schedules.Linear(LEARNING_RATE, 0.0, transition_steps=updates))

    def diloco(delay: int) -> Way:
        local = Local(every=EVERY, lr=LOCAL_LEARNING_RATE, decay=steps, delay=delay)
        return Way(presets.diloco(WORKERS, momentum=MOMENTUM), {"local": local})

    sync = {"optimizer": adam(steps), "policy": Sync(WORKERS)}
    return {
        SYNC: Way(sync),
        "sync, int8 up, bfloat16 down": Way(sync, {"push_format": "Int8", "pull_format": "BFloat16"}),
        "async, float32": Way({"optimizer": adam(steps * WORKERS), "policy": Async()}),
        DILOCO: diloco(0),
        "DiLoCo, overlapped": diloco(EVERY // 2),
    }


@dataclass(frozen=True)
class Site:
    """Worker processes, each behind a link to a server in this process's network."""

    net: Network
    client: optserve.Client
    children: Sequence[Child]

    def train(self, way: Way, seed: int, steps: int) -> dict[str, Any]:
        """What became of it, from when the workers connect."""
        start = digits.initial_parameters(seed, widths=WIDTHS)
        weights = self.client.create_parameter_set("digits", start, **way.creation)
        jobs = [
            Job(
                address=host.address_of_hub(PORT),
                set_id=weights.id,
                worker=host.number,
                seed=seed,
                batch=BATCH,
                steps=steps,
                **way.job,
            )
            for host in self.net.hosts
        ]
        before = self.net.traffic()
        course = train(weights, self.children, jobs)
        return _found(course, [now - then for now, then in zip(self.net.traffic(), before, strict=True)])


@contextmanager
def site(link: Mapping[str, float]) -> Iterator[Site]:
    """Workers behind links of that kind, and a server."""
    with ExitStack() as stack:
        net = stack.enter_context(network(WORKERS, **link))
        stack.enter_context(server(f"0.0.0.0:{PORT}"))
        client = stack.enter_context(optserve.Client(f"127.0.0.1:{PORT}"))
        yield Site(net, client, [stack.enter_context(host.python(WORKER)) for host in net.hosts])


def measured(link: Mapping[str, float], names: Collection[str], seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Runs of these ways, in turns; the first ones, in which loops are compiled, don't count."""
    chosen = {name: way for name, way in ways(steps).items() if name in names}
    runs: dict[str, list[Any]] = {name: [] for name in chosen}
    with site(link) as here:
        for way in chosen.values():
            here.train(way, seeds[0], steps=2)
        for seed, (name, way) in product(seeds, chosen.items()):
            runs[name].append(here.train(way, seed, steps))
    return runs


def run(*, short: bool) -> None:
    """Measure in a network of its own, show, and keep the figures unless they are of a short run."""
    try:
        isolated("benchmarks.wan", *(["short"] if short else []))
    except NoLink as missing:
        Console().print(f"without wan: {missing}")


def main(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    steps, seeds = (2 * EVERY, 1) if short else (STEPS, SEEDS)
    slow = measured(SLOW, ways(steps), range(seeds), steps)
    fast = measured(FAST, (SYNC, DILOCO), range(seeds), steps)
    figures = {"slow": slow, "fast": fast}
    _show(figures)
    if not short:
        Console().print(f"kept in {keep('wan', figures)} and {_draw(slow)}")


def _found(course: Course, traffic: Sequence[Traffic]) -> dict[str, Any]:
    looks = [look for look in course.looks if look.version]
    shown = [looks[0]]
    for look in looks:
        if look.at > 1.05 * shown[-1].at:
            shown.append(look)
    return {
        "accuracy": course.accuracy,
        "seconds": course.seconds,
        "seconds_to_aim": course.seconds_to(AIM),
        "computing": course.computing,
        "bytes_of_a_worker": {
            "up": statistics.mean(each.up for each in traffic),
            "down": statistics.mean(each.down for each in traffic),
        },
        "dropped_packets": sum(each.dropped for each in traffic),
        "looks": {"at": [look.at for look in shown], "accuracy": [look.accuracy for look in shown]},
    }


def _bytes(found: Mapping[str, Any]) -> float:
    return float(found["bytes_of_a_worker"]["up"] + found["bytes_of_a_worker"]["down"])


def _show(figures: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console()
    columns = ("accuracy", f"to {AIM:.0%}", "in all", "computing", "MB of a worker")
    for link, title in (("slow", "links of 100 Mbit/s and 40 ms there and back"), ("fast", "links without delay")):
        found = table(title, "", *columns)
        for name, runs in figures[link].items():
            found.add_row(
                name,
                spread([each["accuracy"] for each in runs], "{:.1%}".format),
                spread([each["seconds_to_aim"] for each in runs], "{:.1f} s".format),
                spread([each["seconds"] for each in runs], "{:.1f} s".format),
                spread([each["computing"] for each in runs], "{:.0%}".format),
                spread([_bytes(each) / 1e6 for each in runs], "{:.1f}".format),
            )
        console.print(found)
    sync, diloco = (figures["fast"][name] for name in (SYNC, DILOCO))
    lost = statistics.mean(a["accuracy"] - b["accuracy"] for a, b in zip(sync, diloco, strict=True))
    fewer = statistics.mean(map(_bytes, sync)) / statistics.mean(map(_bytes, diloco))
    console.print(f"{DILOCO}: {100 * lost:.2f} points below {SYNC}, at 1/{fewer:.1f} of its bytes", highlight=False)


def _draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    figure = picture(11, 5, "Four workers, each behind 100 Mbit/s and 40 ms, learn to read digits")
    panels = figure.subplot_mosaic([["curves", each] for each in ("aim", "computing", "bytes")], width_ratios=(3, 2))
    colours = coloured(runs)
    curves = {name: [(each["looks"]["at"], each["looks"]["accuracy"]) for each in some] for name, some in runs.items()}
    draw_curves(panels["curves"], curves, colours)
    over_time(panels["curves"])
    bars: dict[str, tuple[str, Callable[[Any], float | None], Callable[[float], str]]] = {
        "aim": (f"seconds to {AIM:.0%}", lambda found: found["seconds_to_aim"], "{:.1f}".format),
        "computing": ("part of the time that workers calculate", lambda found: found["computing"], "{:.0%}".format),
        "bytes": ("MB of a worker, both ways", lambda found: _bytes(found) / 1e6, "{:.0f}".format),
    }
    for place, (title, value, text) in bars.items():
        values = {name: [value(found) for found in some] for name, some in runs.items()}
        draw_bars(panels[place], title, values, text, colours)
    return save(figure, "wan")


if __name__ == "__main__":
    main(short="short" in sys.argv)
