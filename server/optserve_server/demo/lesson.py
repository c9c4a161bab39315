"""Training on the digits with workers that take turns in one process, which gives the same result every time."""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

import optserve
from optserve import optim
from optserve._specification import BLOCK
from optserve.formats import BFloat16, Float16, Format
from optserve_server.demo import digits
from optserve_server.demo.digits import Array, Images
from optserve_server.demo.replica import Replica

WORKERS = 4  # so that every gradient is three updates old


@dataclass(frozen=True, slots=True)
class Traffic:
    """What gradients and parameters travel as; None is as they are."""

    push_format: Format | None = None
    pull_format: BFloat16 | Float16 | None = None

    @property
    def bits(self) -> tuple[float, float]:
        """Bits for each element on the way to the server and back, of a large tensor."""
        formats = (self.push_format, self.pull_format)
        up, down = (32.0 if each is None else 8 * each.encoded_size(BLOCK) / BLOCK for each in formats)
        return up, down


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a rule achieved: the loss of each minibatch, (steps,), and the accuracy on the test images at the end."""

    rule: optim.Optimizer
    losses: Array
    accuracy: float


def teach(
    client: optserve.Client,
    rule: optim.Optimizer,
    training: Images,
    test: Images,
    *,
    steps: int,
    seed: int,
    traffic: Traffic = Traffic(),
) -> Lesson:
    """Train with a rule for `steps` updates."""
    set_id = f"demo/digits-{rule.rule}"
    with ExitStack() as stack:
        weights = stack.enter_context(client.create_parameter_set(set_id, digits.initial_parameters(seed), rule))
        handles = [
            stack.enter_context(
                client.parameter_set(set_id, push_format=traffic.push_format, pull_format=traffic.pull_format)
            )
            for _ in range(WORKERS)
        ]
        replicas = [
            Replica(handle, training, worker=worker, seed=seed, steps=-(-steps // WORKERS))
            for worker, handle in enumerate(handles)
        ]
        losses = [replicas[step % WORKERS].step().loss for step in range(steps)]
        parameters = weights.pull()
        weights.delete()
    assert parameters is not None
    return Lesson(rule, np.array(losses), digits.accuracy(parameters, test))
