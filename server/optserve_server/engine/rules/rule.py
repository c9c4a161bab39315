"""What happens before every rule, and what a family's table of rules is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from optserve.optim import Memory, Optimizer, Rule

__all__ = ["Memory", "Preparation", "Rule", "Rules", "preparation"]


class Preparation(NamedTuple):
    """What happens before every rule: `g = scale * g + l2 * p`, then `p = p - shrink * p`."""

    scale: float
    l2: float
    shrink: float  # rather than 1 - shrink, whose rounding in float32 would add up over the updates


def preparation(optimizer: Any) -> Preparation:
    """Sign and weight decay of an optimizer; the learning rate enters decoupled decay."""
    scale = -1.0 if getattr(optimizer, "maximize", False) else 1.0
    weight_decay = getattr(optimizer, "weight_decay", 0.0)
    if getattr(optimizer, "proximal_weight_decay", False):  # which is the rule's own business
        return Preparation(scale, l2=0.0, shrink=0.0)
    if getattr(optimizer, "decoupled_weight_decay", False) or getattr(optimizer, "convention", "") == "keras":
        return Preparation(scale, l2=0.0, shrink=optimizer.lr * weight_decay)
    return Preparation(scale, l2=weight_decay, shrink=0.0)


Rules = dict[type[Optimizer], Rule | Callable[[Any], Rule]]
