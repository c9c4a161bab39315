"""What happens before every rule, and what a family's table of rules is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optserve._specification import TensorSpec
from optserve.optim import Memory, Optimizer, Rule

__all__ = ["Memory", "Preparation", "Rule", "Rules", "Shape", "Tensor", "TensorRule", "preparation"]

Shape = Callable[[TensorSpec], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a rule for whole tensors sees of one: arrays of its shape and of the compute dtype, and its update number t.

    The rule changes `parameter` and `slots` in place, and may use `gradient` as it likes: it has been clipped and decayed.
    """

    parameter: NDArray[Any]
    gradient: NDArray[Any]
    slots: Mapping[str, NDArray[Any]]
    t: int


@dataclass(frozen=True, eq=False)
class TensorRule:
    """A rule that needs whole tensors: norms, rows and columns, matrix products.

    `update(optimizer, tensors, memory)` makes one update of the tensors of a group that a push has; `memory`, float64, one
    value for each name in that order, is the group's own and changed in place. A slot has the shape that is given for a
    tensor; the rest is as in Rule.
    """

    update: Callable[[Any, Sequence[Tensor], NDArray[np.float64]], None]
    slots: Mapping[str, Shape] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    initial: Callable[[Any], Mapping[str, float]] = lambda optimizer: {}
    copies: tuple[str, ...] = ()
    evaluation: str = ""
    lazy: bool = False
    reads_parameters: bool = True


class Preparation(NamedTuple):
    """What happens before every rule: `g = clipped(scale * g) + l2 * p`, then `p = p - shrink * p`."""

    scale: float
    bound: float  # of `scale * g`; 0 where it is not clipped by value
    l2: float
    shrink: float  # rather than 1 - shrink, whose rounding in float32 would add up over the updates


def preparation(optimizer: Any, factor: float = 1.0, bound: float = 0.0) -> Preparation:
    """Sign and weight decay of an optimizer, for gradients that are to be multiplied by a factor and bounded.

    The learning rate enters decoupled decay.
    """
    scale = -factor if getattr(optimizer, "maximize", False) else factor
    weight_decay = getattr(optimizer, "weight_decay", 0.0)
    if optimizer.own_weight_decay:  # which is the rule's business
        return Preparation(scale, bound, l2=0.0, shrink=0.0)
    if getattr(optimizer, "decoupled_weight_decay", False) or getattr(optimizer, "convention", "") == "keras":
        return Preparation(scale, bound, l2=0.0, shrink=optimizer.lr * weight_decay)
    return Preparation(scale, bound, l2=weight_decay, shrink=0.0)


Rules = dict[type[Optimizer], Rule | TensorRule | Callable[[Any], Rule | TensorRule]]
