"""What rules for whole tensors have in common: sums, and averages in place.

Sums are added up in float64, in an order that depends on nothing but the shape. They are Python floats, so that float32 times
one of them is float32.
"""

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve_server.engine.rules.rule import Tensor

Array = NDArray[Any]


def dot(a: Array, b: Array) -> float:
    """The sum of products."""
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))


def norm(a: Array) -> float:
    """The Euclidean length."""
    return sqrt(dot(a, a))


def root_mean_square(a: Array) -> float:
    """The root of the mean of squares."""
    return sqrt(dot(a, a) / a.size)


def squares(a: Array) -> Array:
    """Squares, in float64."""
    return np.square(a, dtype=np.float64)


def blend(average: Array, alpha: float, new: Array) -> None:
    """Let an average take in something new."""
    average += alpha * (new - average)


def adam_direction(tensor: Tensor, betas: tuple[float, float], eps: float) -> Array:
    """Adam's step before the learning rate, from moments that have taken in the gradient."""
    (beta1, beta2), g, t = betas, tensor.gradient, tensor.t
    m, v = tensor.slots["exp_avg"], tensor.slots["exp_avg_sq"]
    blend(m, 1.0 - beta1, g)
    blend(v, 1.0 - beta2, g * g)
    direction: Array = m / (1.0 - beta1**t) / (np.sqrt(v) / sqrt(1.0 - beta2**t) + eps)
    return direction
