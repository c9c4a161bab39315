"""Second moments that are kept by row and column, to save memory."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from optserve import optim
from optserve._specification import TensorSpec
from optserve_server.engine.rules.arrays import Array, blend, root_mean_square, squares
from optserve_server.engine.rules.rule import NOTHING, Rules, Tensor, TensorRule


def by_row(tensor: TensorSpec) -> tuple[int, ...]:
    return (*tensor.shape[:-1], 1) if len(tensor.shape) > 1 else NOTHING


def by_column(tensor: TensorSpec) -> tuple[int, ...]:
    return (*tensor.shape[:-2], 1, tensor.shape[-1]) if len(tensor.shape) > 1 else NOTHING


def by_element(tensor: TensorSpec) -> tuple[int, ...]:
    return NOTHING if len(tensor.shape) > 1 else tensor.shape


def adafactor(o: optim.Adafactor, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p, eps = tensor.parameter, first_eps(o, tensor)
        v = np.maximum(variance(o, tensor, squares(tensor.gradient), eps), eps * eps)
        p -= step(o, tensor, v) + o.lr * o.weight_decay * p


def adafactor_inside(o: optim.Adafactor, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p, square = tensor.parameter, squares(tensor.gradient) + first_eps(o, tensor)
        p -= step(o, tensor, variance(o, tensor, square, 0.0))


def first_eps(o: optim.Adafactor, tensor: Tensor) -> float:
    return float(np.finfo(tensor.parameter.dtype).eps) if o.eps[0] is None else o.eps[0]


def variance(o: optim.Adafactor, tensor: Tensor, square: Array, least: float) -> Array:
    """The second moment of every element, from slots that have taken in the square of the gradient."""
    rho = tensor.t**o.beta2_decay
    if square.ndim < 2:
        v = tensor.slots["variance"]
        blend(v, rho, square)
        return v
    rows, columns = tensor.slots["row_var"], tensor.slots["col_var"]
    blend(rows, rho, square.mean(axis=-1, keepdims=True))
    blend(columns, rho, square.mean(axis=-2, keepdims=True))
    mean = rows.mean(axis=-2, keepdims=True, dtype=np.float64)
    product: Array = (rows / np.maximum(mean, least)).astype(rows.dtype) * columns
    return product


def step(o: optim.Adafactor, tensor: Tensor, v: Array) -> Array:
    """The gradient over its root mean square, clipped, with a learning rate in units of the parameters."""
    u = tensor.gradient / np.sqrt(v)
    scale = max(o.eps[1], root_mean_square(tensor.parameter)) * min(o.lr, 1.0 / sqrt(tensor.t))
    clipped: Array = scale / max(1.0, root_mean_square(u) / o.d) * u
    return clipped


ADAFACTOR, ADAFACTOR_INSIDE = (
    TensorRule(update, {"row_var": by_row, "col_var": by_column, "variance": by_element})
    for update in (adafactor, adafactor_inside)
)

RULES: Rules = {optim.Adafactor: lambda o: ADAFACTOR_INSIDE if o.convention == "keras" else ADAFACTOR}
