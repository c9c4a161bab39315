"""Workers that die and workers that stop, in a synchronous set of as many members as there are.

Eight processes train; one is killed, and later another stopped for half a minute, as a debugger or a machine that swaps does
it. How long do the others stand still, what becomes of what the stopped one had computed, and what of the training?
"""

import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from rich.console import Console

import optserve
from benchmarks.children import python, server
from benchmarks.measure import keep
from benchmarks.tables import spread, table
from benchmarks.training import WORKER, Job, Step, images, ready, work
from benchmarks.units import duration
from optserve import Outcome, Sync, optim
from optserve_server.demo import digits
from optserve_server.demo.processes import Child, ChildFailed

WORKERS = 8
LEASE, DEADLINE = 10.0, 10.0  # seconds
BATCH = 32
PACE = 0.05  # seconds of a gradient
KILL, STOP, CONTINUE, END = 10.0, 30.0, 60.0, 75.0  # seconds after the beginning
ROUNDS = 3


def crashed(seed: int, kill: float, stop: float, resume: float, end: float) -> dict[str, Any]:
    """Train until the end, kill a worker and stop another on the way: what happened to everyone."""
    with ExitStack() as stack:
        address, _ = stack.enter_context(server("127.0.0.1:0", "--lease", str(LEASE)))
        client = stack.enter_context(optserve.Client(address))
        policy = Sync(deadline=DEADLINE)
        weights = client.create_parameter_set("digits", digits.initial_parameters(seed), optim.Adam(), policy=policy)
        children = [stack.enter_context(python(WORKER)) for _ in range(WORKERS)]
        job: dict[str, Any] = {
            "address": address,
            "set_id": weights.id,
            "seed": seed,
            "batch": BATCH,
            "pace": PACE,
            "steps": 1 << 30,
        }
        ready(children, [Job(worker=worker, **job) for worker in range(WORKERS)])
        with ThreadPoolExecutor(WORKERS) as readers:
            began = time.monotonic()
            _, stopped, *others = [readers.submit(_work, child, began) for child in children]
            for moment, child, number in (
                (kill, children[0], signal.SIGKILL),
                (stop, children[1], signal.SIGSTOP),
                (resume, children[1], signal.SIGCONT),
            ):
                time.sleep(began + moment - time.monotonic())
                child.process.send_signal(number)
            time.sleep(began + end - time.monotonic())
            accuracy = digits.accuracy(weights.pull(), images()[1])
            weights.delete()
        steps = [each.result() for each in others]
        return {
            "accuracy": accuracy,
            "updates": max(step.version or 0 for each in steps for step in each),
            "a step": statistics.median(step.computing + step.exchanging for each in steps for step in each),
            "stood still after the kill": _longest_gap(steps, kill, stop),
            "stood still after the stop": _longest_gap(steps, stop, resume),
            "stood still after it went on": _longest_gap(steps, resume, end),
            "others' pushes discarded": sum(step.outcome == Outcome.DISCARDED.name for each in steps for step in each),
            "the stopped one": _after(stopped.result(), resume),
        }


def _work(child: Child, began: float) -> list[Step]:
    try:
        return work(child, began)
    except ChildFailed:  # it was killed
        return []


def _longest_gap(workers: Sequence[Sequence[Step]], begin: float, end: float) -> float:
    """The longest time between two steps of a worker, of those that ended between two moments."""
    ends = [[step.at for step in steps] for steps in workers]
    return max(later - earlier for each in ends for earlier, later in pairwise(each) if begin < later <= end)


def _after(steps: Sequence[Step], resumed: float) -> dict[str, Any]:
    """What became of the pushes of the one that went on, in order, and seconds until one counted that it had begun since."""
    since = [step for step in steps if step.at > resumed]
    begun = [step for step in since if step.at - step.computing - step.exchanging > resumed]
    counted = next(step.at for step in begun if step.outcome == Outcome.APPLIED.name)
    return {
        "first": [step.outcome for step in since[:4]],
        "discarded": sum(step.outcome == Outcome.DISCARDED.name for step in since),
        "pushes": len(since),
        "seconds until one counted": counted - resumed,
    }


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    moments = (3.0, 17.0, 32.0, 36.0) if short else (KILL, STOP, CONTINUE, END)
    runs = [crashed(seed, *moments) for seed in range(1 if short else ROUNDS)]
    _show(runs)
    if not short:
        Console().print(f"kept in {keep('crash', runs)}")


def _show(runs: Sequence[dict[str, Any]]) -> None:
    shown = table(f"{WORKERS} workers in sync; lease {LEASE:g} s, deadline {DEADLINE:g} s", "", "median (range)")
    texts: dict[str, Callable[[Any], str]] = {
        "a step": duration,
        "stood still after the kill": duration,
        "stood still after the stop": duration,
        "stood still after it went on": duration,
        "others' pushes discarded": str,
        "updates": str,
        "accuracy": "{:.1%}".format,
    }
    for name, text in texts.items():
        shown.add_row(name, spread([each[name] for each in runs], text))
    back = [each["the stopped one"] for each in runs]
    counts = spread([each["seconds until one counted"] for each in back], duration)
    discarded = spread([each["discarded"] for each in back], str)
    shown.add_row("until a push of the stopped one counts", counts)
    shown.add_row("its pushes that were discarded", discarded)
    Console().print(shown)
    for each in back:
        Console().print(f"its first pushes: {', '.join(each['first'])}", highlight=False)
