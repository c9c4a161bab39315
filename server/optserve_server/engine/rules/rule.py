"""What a rule is, and what happens before every one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optserve._specification import TensorSpec
from optserve.optim import Optimizer

Memory = tuple[float, ...]
Shape = Callable[[TensorSpec], tuple[int, ...]]

# Slots that may be kept in fewer bits, by their names in every rule: averages of gradients, and of squares.
AVERAGES = frozenset({"exp_avg", "exp_avg_diff", "exp_avg_slow", "momentum_buffer", "velocity"})
AVERAGE_SQUARES = frozenset({"acc_delta", "exp_avg_sq", "exp_avg_var", "square_avg"})


def _nothing(optimizer: Any, t: int, memory: Memory) -> Memory:
    return memory


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule for single elements: its function, its slots (values per element), its memory (values per tensor), its scalars.

    `scalars(optimizer, t, memory)` gives `h` for a tensor's update number t = 1, 2, ...; `remember(optimizer, t,
    memory)` gives the memory that update t sees. Slots start at `initial(optimizer)`, as the parameters if they are among
    `copies`, or at zero. The slot `evaluation` holds the parameters to evaluate, if they are others than those to train. A rule
    that `reads_parameters` does more with them than to add a step, and needs a set that holds them. Of the averages among the
    slots, those that are `exact` are never kept in fewer bits.
    """

    function: Callable[..., Any]
    scalars: Callable[[Any, int, Memory], NamedTuple]
    slots: tuple[str, ...] = ()
    memory: Mapping[str, float] = field(default_factory=dict)
    remember: Callable[[Any, int, Memory], Memory] = _nothing
    initial: Callable[[Any], Mapping[str, float]] = lambda optimizer: {}
    copies: tuple[str, ...] = ()
    evaluation: str = ""
    reads_parameters: bool = False
    exact: tuple[str, ...] = ()


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
    scale = -factor if optimizer.maximize else factor
    weight_decay = getattr(optimizer, "weight_decay", 0.0)
    if optimizer.own_weight_decay:  # which is the rule's business
        return Preparation(scale, bound, l2=0.0, shrink=0.0)
    if getattr(optimizer, "decoupled_weight_decay", False) or getattr(optimizer, "convention", "") == "keras":
        return Preparation(scale, bound, l2=0.0, shrink=optimizer.lr * weight_decay)
    return Preparation(scale, bound, l2=weight_decay, shrink=0.0)


Rules = dict[type[Optimizer], Rule | TensorRule | Callable[[Any], Rule | TensorRule]]
