"""A worker process: `python -m benchmarks.trainee`.

For each job that comes on stdin, as JSON, it says `ready`, waits for a line, then says what each step was, as JSON, and `done`.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

import optserve
from benchmarks.training import DONE, READY, Job, Step, images
from optserve import ParameterSet, formats
from optserve_server.demo import digits


def main() -> None:
    """Work until stdin ends."""
    training, _ = images()
    for line in sys.stdin:
        job = Job(**json.loads(line))
        with optserve.Client(job.address, transport="stream") as client:
            weights = client.parameter_set(
                job.set_id,
                client_id=f"worker-{job.worker}",
                push_format=getattr(formats, job.push_format)() if job.push_format else None,
                pull_format=getattr(formats, job.pull_format)() if job.pull_format else None,
            )
            for step in steps(job, weights, training):
                print(json.dumps(asdict(step)), flush=True)
        print(DONE, flush=True)


def steps(job: Job, weights: ParameterSet, training: digits.Images) -> Iterator[Step]:
    """Say ready, and work once told to; it ends early with the set."""
    random = np.random.default_rng((job.seed, job.worker))
    parameters = weights.pull()
    print(READY, flush=True)
    sys.stdin.readline()
    for _ in range(job.steps):
        began = time.monotonic()
        batch = training[random.integers(len(training), size=job.batch)]
        loss, gradients = digits.loss_and_gradients(parameters, batch)
        if job.pace:
            time.sleep(max(0.0, began + job.pace * random.lognormal(0.0, job.jitter) - time.monotonic()))
        computed = time.monotonic()
        try:
            parameters = weights.step(gradients)
        except optserve.ParameterSetNotFound:
            return
        receipt = parameters.receipt
        assert receipt is not None
        exchanged = time.monotonic()
        yield Step(
            at=exchanged,
            computing=computed - began,
            exchanging=exchanged - computed,
            loss=loss,
            version=receipt.version,
            staleness=receipt.staleness,
            outcome=receipt.outcome.name,
        )


if __name__ == "__main__":
    main()
