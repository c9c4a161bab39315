"""What stale gradients do to training, and what rules against that do about it.

Eight workers, of whom two take ten times as long for a gradient, train on the digits with an engine in this process and with
a clock that does not tick: time passes only as long as gradients are said to take, so that who pushes when, and with it all
staleness, is the same in every run with a seed, on any machine.
"""

import heapq
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optserve
from benchmarks import pictures
from benchmarks.measure import keep
from benchmarks.training import images
from optserve import Async, Client, ParameterSet, Policy, optim
from optserve_server.demo import digits

PACES = (1.0,) * 6 + (10.0,) * 2  # seconds of a gradient, by worker: the median of a log-normal distribution
JITTER = 0.3  # its sigma
BATCH = 32
PUSHES = 1500
LOOK = 50  # pushes between two looks at the parameters
LEARNING_RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
SHOWN = 0.05  # where a gradient that is not stale does well, and others don't
SEEDS = 5

ALONE = "one worker: never stale"
POLICIES: Mapping[str, Policy] = {
    "plain": Async(),
}


@dataclass(frozen=True)
class Run:
    """One training: what looks found, the loss at the end in nats, updates, and how often a push was how stale."""

    accuracies: list[float]
    loss: float
    updates: int
    staleness: dict[int, int]


def pushers(paces: tuple[float, ...], random: np.random.Generator) -> Iterator[int]:
    """Who pushes next, for ever: each worker begins its next gradient once it has pushed."""
    waiting = [(pace * random.lognormal(0.0, JITTER), worker) for worker, pace in enumerate(paces)]
    heapq.heapify(waiting)
    while True:
        now, worker = waiting[0]
        yield worker
        heapq.heapreplace(waiting, (now + paces[worker] * random.lognormal(0.0, JITTER), worker))


def train(client: Client, policy: Policy, paces: tuple[float, ...], lr: float, seed: int, pushes: int) -> Run:
    """Train on the digits; a run whose gradients stop being finite has reached nothing."""
    training, test = images()
    random = np.random.default_rng(seed)
    optimizer = optim.SGD(lr=lr, momentum=0.9)
    accuracies: list[float] = []
    staleness: dict[int, int] = {}
    with client.create_parameter_set("staleness", digits.initial_parameters(seed), optimizer, policy=policy) as weights:
        with ExitStack() as stack:
            workers = [stack.enter_context(client.parameter_set(weights.id)) for _ in paces]
            held = [worker.pull() for worker in workers]
            for push, who in zip(range(1, pushes + 1), pushers(paces, random)):
                batch = training[random.integers(len(training), size=BATCH)]
                _, gradients = digits.loss_and_gradients(held[who], batch)
                try:
                    held[who] = workers[who].step(gradients)
                except optserve.NonFiniteValue:
                    break
                receipt = held[who].receipt
                staleness[receipt.staleness] = staleness.get(receipt.staleness, 0) + 1
                if push % LOOK == 0:
                    accuracies.append(digits.accuracy(held[who], test))
        parameters = weights.pull()
        weights.delete()
        return Run(accuracies, digits.loss(parameters, training), parameters.version, staleness)
