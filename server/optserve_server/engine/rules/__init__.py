"""The update rules, one scalar function each, in order of complexity.

A rule sees one element: parameter `p`, gradient `g`, its slots, and `h`, the scalars of this update. It returns the
new parameter and the new slots. `loops` compiles it into a loop over arenas. What depends on the step count is computed
once per update, in float64, by the rule's `scalars` function; so are complements such as 1 - beta. A number written
inside a rule would promote a float32 loop to float64. The mathematics, variants and references are in `optserve.optim`.

Averages are written as `m + (1 - beta) * (g - m)`: in float32 that loses less than `beta * m + (1 - beta) * g`,
because 1 - beta is small and its rounding only touches the increment.
"""

from optserve.optim import Optimizer
from optserve_server.engine.rules import adam, adaptive, momentum
from optserve_server.engine.rules.rule import (
    AVERAGE_SQUARES,
    AVERAGES,
    Memory,
    Preparation,
    Rule,
    Tensor,
    TensorRule,
    preparation,
)

__all__ = [
    "AVERAGES",
    "AVERAGE_SQUARES",
    "RULES",
    "Memory",
    "Preparation",
    "Rule",
    "Tensor",
    "TensorRule",
    "preparation",
    "rule_for",
]

# By optimizer: its rule, or a function from its flags to one of several. A subclass has its parent's.
RULES = momentum.RULES | adaptive.RULES | adam.RULES


def rule_for(optimizer: Optimizer) -> Rule | TensorRule:
    """The rule that an optimizer's flags choose; every optimizer of the catalogue has one."""
    for kind in type(optimizer).__mro__:
        if kind in RULES:
            rule = RULES[kind]
            return rule if isinstance(rule, Rule | TensorRule) else rule(optimizer)
    raise TypeError(f"no rule for {type(optimizer).__name__}")
