"""Keras: an optimizer that runs on a server, for `model.compile(optimizer=...)` and `fit`, with the JAX or the PyTorch backend.

Variables are tensors by their paths: "reader/dense/kernel".
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from optserve._client import Client
from optserve._errors import FailedPrecondition, InvalidArgument
from optserve._parameter_set import ParameterSet
from optserve._results import Receipt
from optserve.optim import Group, Optimizer

__all__ = ["RemoteOptimizer"]

BACKENDS = ("jax", "torch")


class RemoteOptimizer(keras.optimizers.Optimizer):  # type: ignore[misc]  # Any to mypy
    """An optimizer of a Keras model whose state and arithmetic are a server's: a step pushes gradients, and pulls variables.

    The set `id` is created with the model's variables when the model trains for the first time; if there is one, of the same
    specification, they become what it has. What is assigned to `learning_rate`, as Keras' callbacks do, travels with the next
    step to the group `default`, unless the set has a schedule for it. `creation` is what else `Client.create_parameter_set`
    takes, such as `policy` or `transforms`: clipping and accumulation are those of the set.

    Raises InvalidArgument for another backend or for variables with constraints, and what `create_parameter_set` and
    `ParameterSet.step` raise; from within a compiled step of JAX, as JAX's error.
    """

    def __init__(self, client: Client, id: str, optimizer: Optimizer, **creation: Any) -> None:
        if keras.backend.backend() not in BACKENDS:
            raise InvalidArgument(f"expected Keras with the backend jax or torch; got {keras.backend.backend()}")
        super().__init__(learning_rate=float(optimizer.at(0).hyperparameters.get("lr", 1.0)))
        self._client, self._id, self._optimizer, self._creation = client, id, optimizer, creation
        self._weights: ParameterSet | None = None
        self._receipt: Receipt | None = None

    @property
    def weights(self) -> ParameterSet:
        """The handle on the parameter set; raises FailedPrecondition before the model has trained."""
        if self._weights is None:
            raise FailedPrecondition("expected an optimizer that a model has trained with; this one has no set yet")
        return self._weights

    @property
    def receipt(self) -> Receipt | None:
        """That of the last step."""
        return self._receipt

    def build(self, variables: Sequence[Any]) -> None:
        """Create the set, or attach to it, and let the variables be what it has."""
        if self.built:
            return
        for variable in variables:
            if variable.constraint is not None or getattr(variable, "overwrite_with_gradient", False):
                raise InvalidArgument(
                    f"expected variables that only a rule changes; {variable.path!r} has a constraint"
                )
        super().build(variables)
        self._names = [variable.path for variable in variables]
        initial = {variable.path: keras.ops.convert_to_numpy(variable.value) for variable in variables}
        self._weights = self._client.create_parameter_set(
            self._id, initial, self._optimizer, exist_ok=True, **self._creation
        )
        default, *_ = self._weights.describe().groups
        self._scheduled = "lr" in default.schedules
        self._rate = np.float32(default.optimizer.hyperparameters.get("lr", 1.0))
        self.learning_rate = float(self._rate)
        pulled = self._weights.pull()
        for variable in variables:
            variable.assign(pulled[variable.path])

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Push the gradients that there are, and take over the variables."""
        if not self.built:
            self.build(list(trainable_variables or ()))
        variables = self._trainable_variables
        given = zip(trainable_variables or variables, grads, strict=True)
        gradients = {variable.path: gradient for variable, gradient in given if gradient is not None}
        if keras.backend.backend() == "jax":
            import jax
            from jax.experimental import io_callback

            shapes = [jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in variables]
            rate = keras.ops.convert_to_tensor(self.learning_rate)
            values = io_callback(self._stepped, shapes, gradients, rate, ordered=True)
        else:
            arrays = {path: keras.ops.convert_to_numpy(gradient) for path, gradient in gradients.items()}
            values = self._stepped(arrays, keras.ops.convert_to_numpy(self.learning_rate))
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        self._iterations.assign_add(1)

    def _stepped(self, gradients: dict[str, Any], rate: Any) -> list[Any]:
        """The variables after a step."""
        rate, changes = np.float32(rate), {}
        if rate != self._rate and not self._scheduled:
            changes = {Group.DEFAULT: {"lr": float(str(rate))}}  # the number that was written, before Keras rounded it
        arrays = {path: np.asarray(gradient) for path, gradient in gradients.items()}
        pulled = self.weights.step(arrays, hyperparameters=changes)
        self._rate, self._receipt = rate, pulled.receipt
        return [pulled[name] for name in self._names]
