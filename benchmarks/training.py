"""Training on the digits with worker processes, watched from here."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache

from optserve import Parameters, ParameterSet
from optserve_server.demo import digits
from optserve_server.demo.processes import Child

WORKER = "benchmarks.trainee"  # the module that worker processes run
READY, GO, DONE = "ready", "go", "done"
LOOK = 0.2  # seconds between two looks at the parameters


@dataclass(frozen=True, kw_only=True)
class Local:
    """A worker's own Adam, whose learning rate falls in a straight line to zero over `decay` steps, or stays.

    Every so many steps the worker says how far that has led, and trains on for `delay` steps until it takes over the answer.
    """

    every: int
    lr: float
    decay: float = math.inf
    delay: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told to do: `steps` gradients of `batch` images each, unless the set is deleted before.

    Formats are names of classes in `optserve.formats`. A gradient takes `pace` seconds by the median, log-normally spread with
    `jitter`, of which the worker waits what it does not calculate; 0 is as long as it takes.
    """

    address: str
    set_id: str
    worker: int
    seed: int
    batch: int
    steps: int
    push_format: str | None = None
    pull_format: str | None = None
    local: Local | None = None
    pace: float = 0.0
    jitter: float = 0.0

    @classmethod
    def of(cls, line: str) -> "Job":
        """From JSON."""
        job = cls(**json.loads(line))
        return replace(job, local=Local(**job.local)) if isinstance(job.local, dict) else job


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a worker did: when it was through, in seconds of the monotonic clock, and what its own seconds went to.

    `version`, `staleness` and `outcome` are those of a push whose answer came, if one did.
    """

    at: float
    computing: float
    exchanging: float
    loss: float
    version: int | None = None
    staleness: int | None = None
    outcome: str | None = None


@dataclass(frozen=True)
class Look:
    """The accuracy on the test images, of which version, and when."""

    at: float
    version: int
    accuracy: float


@dataclass(frozen=True)
class Course:
    """How training went: each worker's steps, and looks at the parameters, at seconds after the beginning."""

    steps: Sequence[Sequence[Step]]
    looks: Sequence[Look]

    @property
    def seconds(self) -> float:
        """Until the last worker was through."""
        return max(steps[-1].at for steps in self.steps)

    @property
    def accuracy(self) -> float:
        """What the last look found."""
        return self.looks[-1].accuracy

    @property
    def computing(self) -> float:
        """The part of the workers' time that went to gradients."""
        return sum(step.computing for steps in self.steps for step in steps) / (self.seconds * len(self.steps))

    def seconds_to(self, accuracy: float) -> float | None:
        """When a look first found that accuracy; None if none did."""
        return next((look.at for look in self.looks if look.accuracy >= accuracy), None)


@cache
def images() -> tuple[digits.Images, digits.Images]:
    """Images to train on, and to test on."""
    return digits.load()


def train(weights: ParameterSet, children: Sequence[Child], jobs: Sequence[Job], limit: float = math.inf) -> Course:
    """Let processes that run `WORKER` do their jobs on a set, then delete it; after `limit` seconds at the latest."""
    ready(children, jobs)
    with ThreadPoolExecutor(len(children)) as readers:
        began = time.monotonic()
        workers = [readers.submit(work, child, began) for child in children]
        try:
            looks = list(_looks(weights, workers, began, limit))
        finally:
            weights.delete()  # which ends those who are not through
        return Course([worker.result() for worker in workers], looks)


def ready(children: Sequence[Child], jobs: Sequence[Job]) -> None:
    """Give workers their jobs; they are members of the set then, and wait."""
    for child, job in zip(children, jobs, strict=True):
        child.write_line(json.dumps(asdict(job)))
    for child in children:
        child.read_line()


def work(child: Child, began: float) -> list[Step]:
    """Let a worker do its job: its steps, at seconds after the beginning."""
    child.write_line(GO)
    steps = [Step(**json.loads(line)) for line in iter(child.read_line, DONE)]
    return [replace(step, at=step.at - began) for step in steps]


def _looks(weights: ParameterSet, workers: Sequence[Future[list[Step]]], began: float, limit: float) -> Iterator[Look]:
    """Each version that is found until all workers are through."""
    _, test = images()
    newest: Parameters | None = None
    while True:
        done, working = wait(workers, LOOK, FIRST_EXCEPTION)
        for worker in done:
            worker.result()
        at = time.monotonic() - began
        found = weights.pull() if newest is None else weights.pull(newer_than=newest)
        if found is not None:
            newest = found
            yield Look(at, found.version, digits.accuracy(found, test))
        if not working or at > limit:
            return
