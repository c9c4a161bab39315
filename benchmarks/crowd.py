"""One set and a crowd of workers: does the server get as much done for it as for a few?

Workers are simulated: threads with a connection of their own, in a few processes, which push one gradient after the other and
calculate nothing. They share the processors with the server, so that what they cost themselves counts against the crowd's
rate; what the server's own process uses is measured besides. With pauses of random lengths before pushes, it has time, and its
rounds fill up slowly.
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import optserve
from benchmarks.children import python, server
from benchmarks.durability import resident
from benchmarks.measure import Timing, keep
from benchmarks.ours.worker import TENSOR
from benchmarks.tables import table
from benchmarks.units import count, duration
from optserve import Async, Policy, Sync, optim
from optserve_server.demo.processes import Child

SIZE = 100_000  # parameters
FEW, MANY = 8, 256  # workers
PROCESSES = 4  # of each crowd
PUSHES = 8192  # of all workers together, in a turn
ROUNDS = 10
PAUSE = 3.0  # seconds, at most
PUSHES_WITH_PAUSES = 4  # of each worker
POLICIES: Sequence[Policy] = (Async(), Sync())
TICKS = os.sysconf("SC_CLK_TCK")  # a second


@dataclass(frozen=True)
class Turn:
    """What a crowd did: seconds of each push, between two pushes while everyone was at it, and of processors for one."""

    latencies: Sequence[float]
    seconds: float
    server: float


@dataclass(frozen=True)
class Crowd:
    """Workers of one set, on a server of their own."""

    workers: int
    server: Child
    processes: Sequence[Child]

    def push(self, pushes: int, pause: float = 0.0) -> Turn:
        """So many pushes of all workers together, each after a pause of up to so many seconds."""
        before = self._server_seconds()
        for process in self.processes:
            process.write_line(f"{pushes // self.workers} {pause}")
        workers = [worker for process in self.processes for worker in json.loads(process.read_line())]
        server = (self._server_seconds() - before) / pushes
        begin, end = max(worker[0][0] for worker in workers), min(worker[-1][0] for worker in workers)
        together = sum(begin < ended <= end for worker in workers for ended, _ in worker)
        apart = (end - begin) / together if together else float("nan")
        return Turn([seconds for worker in workers for _, seconds in worker], apart, server)

    def memory(self, what: str) -> int:
        """Bytes that the server has (VmRSS), or has had at most (VmHWM)."""
        return resident(self.server.process, what)

    def _server_seconds(self) -> float:
        """Of processors that the server has used."""
        fields = Path(f"/proc/{self.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def crowd(workers: int, policy: Policy) -> Iterator[Crowd]:
    """Workers who are ready to push."""
    with ExitStack() as stack:
        address, process = stack.enter_context(server())
        client = stack.enter_context(optserve.Client(address))
        start = {TENSOR: np.zeros(SIZE, np.float32)}
        weights = client.create_parameter_set("crowd", start, optim.Adam(), policy=policy)
        share = workers // PROCESSES
        processes = tuple(
            stack.enter_context(python("benchmarks.pusher", address, weights.id, str(first), str(share), str(SIZE)))
            for first in range(0, workers, share)
        )
        for each in processes:
            each.read_line()
        yield Crowd(workers, process, processes)


def measured(policy: Policy, rounds: int, pushes: int) -> dict[str, Any]:
    """Both crowds in turns, then each with pauses; and the memory of their servers."""
    with ExitStack() as stack:
        crowds = [stack.enter_context(crowd(workers, policy)) for workers in (FEW, MANY)]
        started = {each: each.memory("VmRSS") for each in crowds}
        turns: dict[Crowd, list[Turn]] = {each: [] for each in crowds}
        for each in crowds:
            each.push(pushes)
        for _ in range(rounds):
            for each in crowds:
                turns[each].append(each.push(pushes))
            crowds.reverse()
        return {
            str(each.workers): {
                "seconds": [turn.seconds for turn in some],
                "server_seconds": [turn.server for turn in some],
                "latency": _quantiles(some),
                "server_seconds_with_pauses": each.push(PUSHES_WITH_PAUSES * each.workers, PAUSE).server,
                "memory": {"at the start": started[each], "at most": each.memory("VmHWM")},
            }
            for each, some in turns.items()
        }


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    rounds, pushes = (2, 4096) if short else (ROUNDS, PUSHES)
    policies = track(POLICIES, "crowds", console=Console())
    figures = {f"{type(policy).__name__}()": measured(policy, rounds, pushes) for policy in policies}
    _show(figures)
    if not short:
        Console().print(f"kept in {keep('crowd', figures)}")


def _quantiles(turns: Sequence[Turn]) -> dict[str, float]:
    seconds = [each for turn in turns for each in turn.latencies]
    return {"median": statistics.median(seconds), "p99": float(np.quantile(seconds, 0.99)), "worst": max(seconds)}


def _show(figures: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console()
    columns = ("workers", "pushes/s", "a push: median", "99 %", "worst", "memory", "by worker")
    shown = table(f"{count(SIZE)} float32 parameters under Adam, pushed by a crowd", "", *columns)
    for policy, (workers, found) in ((policy, item) for policy, crowds in figures.items() for item in crowds.items()):
        most = found["memory"]["at most"]
        shown.add_row(
            policy,
            workers,
            f"{1 / statistics.median(found['seconds']):.0f}",
            *(duration(found["latency"][part]) for part in ("median", "p99", "worst")),
            f"{most / 1e6:.0f} MB",
            f"{(most - found['memory']['at the start']) / int(workers) / 1e6:.1f} MB",
        )
    console.print(shown)
    for policy, crowds in figures.items():
        few, many = crowds[str(FEW)], crowds[str(MANY)]
        low, median, high = Timing(tuple(few["seconds"])).ratio(Timing(tuple(many["seconds"])))
        console.print(f"{policy}: pushes/s of {MANY} ÷ of {FEW}: {median:.2f} ({low:.2f}–{high:.2f})", highlight=False)
        usual = [duration(statistics.median(each["server_seconds"])) for each in (few, many)]
        paused = [duration(each["server_seconds_with_pauses"]) for each in (few, many)]
        console.print(
            f"the server's processors for a push: {usual[0]} of {FEW}, {usual[1]} of {MANY}; "
            f"with pauses {paused[0]} and {paused[1]}",
            highlight=False,
        )
