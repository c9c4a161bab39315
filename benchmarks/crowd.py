"""One set and a crowd of workers: does the server get as much done for it as for a few?

Workers are simulated: threads with a connection of their own, in a few processes, which push without a pause and calculate
nothing. They share the processors with the server, so that what they cost themselves counts against it.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

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


@dataclass(frozen=True)
class Turn:
    """What a crowd did: seconds of each push; and for one, of all together, while everyone was at it."""

    latencies: Sequence[float]
    seconds: float


@dataclass(frozen=True)
class Crowd:
    """Workers of one set, on a server of their own."""

    workers: int
    server: Child
    processes: Sequence[Child]

    def push(self, pushes: int) -> Turn:
        """So many pushes, of all workers together."""
        for process in self.processes:
            process.write_line(str(pushes // self.workers))
        answers = [json.loads(process.read_line()) for process in self.processes]
        workers = [worker for answer in answers for worker in answer]
        begin, end = max(worker[0][0] for worker in workers), min(worker[-1][0] for worker in workers)
        together = sum(begin < ended <= end for worker in workers for ended, _ in worker)
        return Turn([seconds for worker in workers for _, seconds in worker], (end - begin) / together)

    def memory(self, what: str) -> int:
        """Bytes that the server has (VmRSS), or has had at most (VmHWM)."""
        return resident(self.server.process, what)


@contextmanager
def crowd(workers: int, policy: Policy) -> Iterator[Crowd]:
    """Workers who are ready to push."""
    with ExitStack() as stack:
        address, process = stack.enter_context(server())
        client = stack.enter_context(optserve.Client(address))
        start = {TENSOR: np.zeros(SIZE, np.float32)}
        weights = client.create_parameter_set("crowd", start, optim.Adam(), policy=policy)
        share = workers // PROCESSES
        processes = [
            stack.enter_context(python("benchmarks.pusher", address, weights.id, str(first), str(share), str(SIZE)))
            for first in range(0, workers, share)
        ]
        for each in processes:
            each.read_line()
        yield Crowd(workers, process, processes)


def measured(policy: Policy, rounds: int, pushes: int) -> dict[str, Any]:
    """Both crowds in turns: seconds for one push, of all pushes, and the memory of their servers."""
    with ExitStack() as stack:
        crowds = [stack.enter_context(crowd(workers, policy)) for workers in (FEW, MANY)]
        started = {each.workers: each.memory("VmRSS") for each in crowds}
        for each in crowds:
            each.push(pushes)
        turns: dict[int, list[Turn]] = {each.workers: [] for each in crowds}
        for _ in range(rounds):
            for each in crowds:
                turns[each.workers].append(each.push(pushes))
            crowds.reverse()
        return {
            str(each.workers): {
                "seconds": [turn.seconds for turn in turns[each.workers]],
                "latency": _quantiles(turns[each.workers]),
                "memory": {"at the start": started[each.workers], "at most": each.memory("VmHWM")},
            }
            for each in crowds
        }


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    rounds, pushes = (2, 4096) if short else (ROUNDS, PUSHES)
    figures = {
        "Async()": measured(Async(), rounds, pushes),
        "Sync()": measured(Sync(), rounds, pushes),
    }
    _show(figures)
    if not short:
        Console().print(f"kept in {keep('crowd', figures)}")


def _quantiles(turns: Sequence[Turn]) -> dict[str, float]:
    seconds = [each for turn in turns for each in turn.latencies]
    return {"median": statistics.median(seconds), "p99": float(np.quantile(seconds, 0.99)), "worst": max(seconds)}


def _show(figures: dict[str, Any]) -> None:
    console = Console()
    columns = ("workers", "pushes/s", "a push: median", "99 %", "worst", "server's memory", "by worker")
    shown = table(f"{count(SIZE)} float32 parameters under Adam, pushed by a crowd", "", *columns)
    for policy, crowds in figures.items():
        for workers, found in crowds.items():
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
        few, many = (Timing(tuple(crowds[str(workers)]["seconds"])) for workers in (FEW, MANY))
        low, median, high = few.ratio(many)
        console.print(f"{policy}: pushes/s of {MANY} ÷ of {FEW}: {median:.2f} ({low:.2f}–{high:.2f})", highlight=False)
