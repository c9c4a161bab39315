"""What a rule is, and what happens before every one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from optserve.optim import Optimizer

Memory = tuple[float, ...]


def _nothing(optimizer: Any, t: int, memory: Memory) -> Memory:
    return memory


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule: its function, its slots (values per element), its memory (values per tensor) and its scalars.

    `scalars(optimizer, t, memory)` gives `h` for a tensor's update number t = 1, 2, ...; `remember(optimizer, t,
    memory)` gives the memory that update t sees. Slots start at `initial(optimizer)`, or at zero. A rule that
    `reads_parameters` does more with them than to add a step, and needs a set that holds them.
    """

    function: Callable[..., Any]
    scalars: Callable[[Any, int, Memory], NamedTuple]
    slots: tuple[str, ...] = ()
    memory: Mapping[str, float] = field(default_factory=dict)
    remember: Callable[[Any, int, Memory], Memory] = _nothing
    initial: Callable[[Any], Mapping[str, float]] = lambda optimizer: {}
    reads_parameters: bool = False


class Preparation(NamedTuple):
    """What happens before every rule: `g = scale * g + l2 * p`, then `p = p - shrink * p`."""

    scale: float
    l2: float
    shrink: float  # rather than 1 - shrink, whose rounding in float32 would add up over the updates


def preparation(optimizer: Any) -> Preparation:
    """Sign and weight decay of an optimizer; the learning rate enters decoupled decay."""
    scale = -1.0 if optimizer.maximize else 1.0
    weight_decay = getattr(optimizer, "weight_decay", 0.0)
    if getattr(optimizer, "proximal_weight_decay", False):  # which is the rule's own business
        return Preparation(scale, l2=0.0, shrink=0.0)
    if getattr(optimizer, "decoupled_weight_decay", False) or getattr(optimizer, "convention", "") == "keras":
        return Preparation(scale, l2=0.0, shrink=optimizer.lr * weight_decay)
    return Preparation(scale, l2=weight_decay, shrink=0.0)


Rules = dict[type[Optimizer], Rule | Callable[[Any], Rule]]
