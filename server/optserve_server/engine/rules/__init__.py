"""The update rules, one function each, in order of complexity.

Most see one element: parameter `p`, gradient `g`, its slots, and `h`, the scalars of this update. It returns the
new parameter and the new slots. `loops` compiles it into a loop over arenas. What depends on the step count is computed
once per update, in float64, by the rule's `scalars` function; so are complements such as 1 - beta. A number written
inside a rule would promote a float32 loop to float64, which `own` refuses in rules that are not of this package. The
mathematics, variants and references are in `optserve.optim`.

Averages are written as `m + (1 - beta) * (g - m)`: in float32 that loses less than `beta * m + (1 - beta) * g`,
because 1 - beta is small and its rounding only touches the increment.

A rule that needs norms, rows or matrix products is a TensorRule instead: a function of the tensors of a group, in NumPy.
`arrays` has what these share.
"""

from collections.abc import Callable
from typing import Any

from optserve import optim
from optserve._errors import UnknownRule
from optserve.optim import Optimizer
from optserve_server.engine.rules import (
    adam,
    adaptive,
    automatic,
    factored,
    federated,
    layerwise,
    momentum,
    orthogonal,
    own,
)
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
    "known",
    "preparation",
    "rule_for",
]

# By optimizer: its rule, or a function from its flags to one of several. A subclass has its parent's.
RULES = (
    momentum.RULES
    | adaptive.RULES
    | adam.RULES
    | layerwise.RULES
    | factored.RULES
    | automatic.RULES
    | orthogonal.RULES
    | federated.RULES
)


def rule_for(optimizer: Optimizer) -> Rule | TensorRule:
    """The rule that an optimizer's flags choose; raises UnknownRule, or InvalidRule for one that can't be used."""
    for kind in type(optimizer).__mro__:
        if rule := _rule_of(kind):
            return rule if isinstance(rule, Rule | TensorRule) else rule(optimizer)
    raise UnknownRule(
        f"expected an optimizer that there is a rule for; {optimizer.rule} has none in a table RULES beside it. Name the file "
        "that has both to the server: optserve serve --rule FILE"
    )


def known() -> list[type[Optimizer]]:
    """Optimizers of the catalogue that there is a rule for here."""
    return [each for each in optim.catalogue().values() if any(map(_rule_of, each.__mro__))]


def _rule_of(kind: type) -> Rule | TensorRule | Callable[[Any], Rule | TensorRule] | None:
    return RULES.get(kind) or own.rule_of(kind)
