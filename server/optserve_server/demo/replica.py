"""What one worker does, whichever process it runs in."""

import numpy as np

from optserve import ParameterSet
from optserve_server.demo.digits import Images, loss_and_gradients
from optserve_server.demo.history import Measurement

BATCH = 64  # images


class Replica:
    """One worker's minibatches, and its parameters: as fresh as its own last step.

    Over its `steps`, the learning rate falls in a straight line from the set's own to zero.
    """

    def __init__(self, weights: ParameterSet, images: Images, *, worker: int, seed: int, steps: int) -> None:
        self._weights = weights
        self._images = images
        self._random = np.random.default_rng((seed, worker))
        self._learning_rates = iter(np.linspace(weights.describe().spec.optimizer.lr, 0, steps, endpoint=False))
        self._parameters = weights.pull()

    def step(self) -> Measurement:
        """Push the gradient of a minibatch, and take over the parameters that come back."""
        batch = self._images[self._random.integers(len(self._images), size=BATCH)]
        loss, gradients = loss_and_gradients(self._parameters, batch)
        changes = {"default": {"lr": next(self._learning_rates)}}
        self._parameters = self._weights.step(gradients, hyperparameters=changes)
        receipt = self._parameters.receipt
        assert receipt is not None
        assert receipt.staleness is not None
        return Measurement(receipt.version, receipt.staleness, loss, len(batch))
