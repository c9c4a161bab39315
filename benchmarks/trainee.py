"""A worker process: `python -m benchmarks.trainee`.

For each job that comes on stdin, as JSON, it says `ready`, waits for a line, then says what each step was, as JSON, and `done`.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

import optserve
from benchmarks.training import DONE, READY, Job, Local, Step, images
from optserve import Client, DiLoCo, ParameterSet, Receipt, formats, optim, schedules
from optserve_server.demo import digits
from optserve_server.demo.digits import Array


class Pupil(Protocol):
    """What becomes of gradients."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What to compute them at."""

    def learn(self, gradients: Mapping[str, Array]) -> None:
        """Do with them what is done here."""

    def exchange(self) -> Receipt | None:
        """Do with them what is done with the server; the receipt of a push whose answer came."""


class Remote:
    """Each gradient goes to the server."""

    def __init__(self, weights: ParameterSet) -> None:
        self.parameters: Mapping[str, Any] = weights.pull()
        self._weights = weights
        self._gradients: Mapping[str, Array] = {}

    def learn(self, gradients: Mapping[str, Array]) -> None:
        self._gradients = gradients

    def exchange(self) -> Receipt | None:
        self.parameters = parameters = self._weights.step(self._gradients)
        return parameters.receipt


class Resident:
    """Gradients go to an optimizer here, and to the server now and then how far that has led."""

    def __init__(self, synchronized: DiLoCo, moments: ParameterSet) -> None:
        self.parameters = synchronized.parameters
        self._synchronized = synchronized
        self._moments = moments
        self._receipt: Receipt | None = None

    def learn(self, gradients: Mapping[str, Array]) -> None:
        for name, change in self._moments.step(gradients).items():
            self.parameters[name] += change

    def exchange(self) -> Receipt | None:
        self._synchronized.step()
        known, self._receipt = self._receipt, self._synchronized.receipt
        return self._receipt if self._receipt is not known else None


def main() -> None:
    """Work until stdin ends."""
    for line in sys.stdin:
        job = Job.of(line)
        with suppress(optserve.ParameterSetNotFound), joined(job) as weights, pupil(job.local, weights) as learner:
            print(READY, flush=True)
            sys.stdin.readline()
            for step in steps(job, learner):
                print(json.dumps(asdict(step)), flush=True)
        print(DONE, flush=True)


@contextmanager
def joined(job: Job) -> Iterator[ParameterSet]:
    """A member of the job's set."""
    chosen: dict[str, Any] = {
        "push_format": getattr(formats, job.push_format)() if job.push_format else None,
        "pull_format": getattr(formats, job.pull_format)() if job.pull_format else None,
    }
    with (
        Client(job.address, transport="stream") as client,
        client.parameter_set(job.set_id, **chosen) as weights,
        weights.worker(f"worker-{job.worker}") as worker,
    ):
        yield worker


@contextmanager
def pupil(local: Local | None, weights: ParameterSet) -> Iterator[Pupil]:
    """Who learns in this process."""
    if local is None:
        yield Remote(weights)
        return
    lr = local.lr if local.decay == math.inf else schedules.Linear(local.lr, 0.0, transition_steps=int(local.decay))
    with Client(":memory:") as client, DiLoCo(weights, every=local.every, delay=local.delay) as synchronized:
        adam = optim.Adam(lr=lr)
        yield Resident(
            synchronized, client.create_parameter_set("adam", synchronized.parameters, adam, holds="moments")
        )


def steps(job: Job, learner: Pupil) -> Iterator[Step]:
    """Learn from one minibatch after the other."""
    training, _ = images()
    random = np.random.default_rng((job.seed, job.worker))
    for _ in range(job.steps):
        began = time.monotonic()
        batch = training[random.integers(len(training), size=job.batch)]
        loss, gradients = digits.loss_and_gradients(learner.parameters, batch)
        learner.learn(gradients)
        if job.pace:
            time.sleep(max(0.0, began + job.pace * random.lognormal(0.0, job.jitter) - time.monotonic()))
        computed = time.monotonic()
        receipt = learner.exchange()
        now = time.monotonic()
        told = {} if receipt is None else _told(receipt)
        yield Step(at=now, computing=computed - began, exchanging=now - computed, loss=loss, **told)


def _told(receipt: Receipt) -> dict[str, Any]:
    return {"version": receipt.version, "staleness": receipt.staleness, "outcome": receipt.outcome.name}


if __name__ == "__main__":
    main()
