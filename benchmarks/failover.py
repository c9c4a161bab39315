"""What a standby costs, how far it is behind, and how long it takes to go on with it after the primary was killed.

Both servers and the worker share this machine, so the update of the standby
takes processors and the disk from the primary, which it would not on a machine of its own.
"""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import optserve
from benchmarks.contender import timed
from benchmarks.durability import TENSOR, serving
from benchmarks.measure import keep
from benchmarks.peers.gradient import gradient
from benchmarks.units import count, duration
from optserve import optim
from optserve._transport import connect_to
from optserve.v1 import optimizer_service_pb2 as pb

SIZES = {1_000: 100, 1_000_000: 10}  # parameters, and steps in a row of which the median counts
ROUNDS = 8
LEASE = 1.0  # seconds
KILLS = 5


def status(address: str) -> pb.GetServerStatusResponse:
    """What a server says of itself."""
    with closing(connect_to(address)) as transport:
        return transport.call("GetServerStatus", pb.GetServerStatusRequest(), 10.0)  # type: ignore[no-any-return]


def promote(address: str) -> None:
    """Let a standby serve."""
    with closing(connect_to(address)) as transport:
        transport.call("PromoteServer", pb.PromoteServerRequest(), 60.0)


@contextmanager
def pair(directory: Path, *leading: str, following: tuple[str, ...] = ()) -> Iterator[tuple[str, str, int]]:
    """A primary and a standby that has everything: their addresses, and the primary's process."""
    with (
        serving(directory / "primary", *leading) as (primary, process),
        serving(directory / "standby", "--follow", primary, *following) as (standby, _),
    ):
        while not status(standby).promotable:
            time.sleep(0.01)
        yield primary, standby, process.pid


def failover(*, leased: bool, wait: bool = True) -> float:
    """Seconds from the death of the primary to the first push that the standby acknowledges, of a worker that knows both."""
    following = ("--promote-after", str(LEASE)) if leased else ()
    leading = ("--wait-for-standby",) if wait else ()
    with (
        tempfile.TemporaryDirectory() as directory,
        pair(Path(directory), *leading, following=following) as (primary, standby, process),
        optserve.Client([primary, standby], transport="stream") as client,
    ):
        weights = client.create_parameter_set("set", {TENSOR: np.zeros(1000)}, optim.Adam(), journal="always")
        for _ in range(20):
            weights.push({TENSOR: np.ones(1000)})
        while status(primary).lag:
            time.sleep(0.01)
        time.sleep(LEASE if leased else 0.0)  # until the standby has heard that it may promote itself
        os.kill(process, signal.SIGKILL)
        began = time.monotonic()
        if not leased:
            promote(standby)
        weights.push({TENSOR: np.ones(1000)})
        return time.monotonic() - began


def following(size: int, steps: int) -> dict[str, tuple[float, float]]:
    """Seconds of a step, and events by which the standby was behind after a round: without one, with one, waiting for it."""
    optserve.keep_freed_memory()
    start, pushed = {TENSOR: np.zeros(size, np.float32)}, {TENSOR: gradient(size)}
    lags: dict[str, list[float]] = {}

    def round_of(name: str, weights: optserve.ParameterSet, address: str) -> float:
        seconds = statistics.median(timed(partial(weights.step, pushed)) for _ in range(steps))
        lags.setdefault(name, []).append(status(address).lag)
        while status(address).lag:
            time.sleep(0.01)
        return seconds

    with (
        tempfile.TemporaryDirectory() as directory,
        serving(Path(directory) / "alone") as (alone, _),
        pair(Path(directory) / "async") as (followed, _, _),
        pair(Path(directory) / "wait", "--wait-for-standby") as (waiting, _, _),
        optserve.Client(alone) as first,
        optserve.Client(followed) as second,
        optserve.Client(waiting) as third,
    ):
        addresses = {"alone": (first, alone), "followed": (second, followed), "waiting": (third, waiting)}
        handles = {
            name: (client.create_parameter_set("set", start, optim.Adam(), journal="always"), address)
            for name, (client, address) in addresses.items()
        }
        for handle, _ in handles.values():
            handle.step(pushed)
        seconds: dict[str, list[float]] = {name: [] for name in handles}
        for _ in range(ROUNDS):
            for name, (handle, address) in handles.items():
                seconds[name].append(round_of(name, handle, address))
    return {name: (statistics.median(seconds[name]), statistics.median(lags[name])) for name in handles}


def run() -> None:
    """Measure, and keep the figures."""
    console = Console()
    steps = {size: following(size, each) for size, each in SIZES.items()}
    kills = {
        "promoted at once by hand": [failover(leased=False) for _ in range(KILLS)],
        f"lease of {LEASE:g} s": [failover(leased=True) for _ in range(KILLS)],
    }
    table = Table("a step", "parameters", "median", "÷ alone", "events behind", box=box.SIMPLE)
    for size, found in steps.items():
        for name, (seconds, lag) in found.items():
            table.add_row(name, count(size), duration(seconds), f"{seconds / found['alone'][0]:.2f}", f"{lag:g}")
    console.print(table)
    table = Table("from kill -9 to the first acknowledged push", "median", "worst", box=box.SIMPLE)
    for name, times in kills.items():
        table.add_row(name, duration(statistics.median(times)), duration(max(times)))
    console.print(table)
    console.print(f"kept in {keep('failover', {'steps': steps, 'kills': kills})}")
