"""The optimizers, as values: `optim.Adam(lr=3e-4)` names a rule and its hyperparameters; the server runs it.

Class names, argument names, defaults and mathematics are those of `torch.optim` unless the class says otherwise.
Sorted from simple to complex.

Notation: θ parameter, g gradient, t = 1, 2, ... updates that the tensor has had, η `lr`, λ `weight_decay`.
Before every rule, in this order:

    maximize:                     g ← −g
    weight decay (L2):            g ← g + λθ          before the moments
    weight decay (decoupled):     θ ← (1 − ηλ)θ       the moments don't see it (Loshchilov & Hutter, arXiv:1711.05101)

State starts at zero. A gradient of zero is a gradient; a tensor absent from a push is left alone, its t included.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optserve._errors import UnknownRule
from optserve.optim._group import Group
from optserve.optim._optimizer import Optimizer, catalogue, check_names, hyperparameter, suggest
from optserve.optim._refused import refusal
from optserve.optim._rule import Memory, Rule

# The families, in the order of the catalogue.
# isort: split
from optserve.optim._momentum import (
    ASGD,
    SGD,
    AveragedMomentum,
    Lion,
    Momentum,
    Nesterov,
    SignSGD,
    Signum,
    VelocityMomentum,
)

# isort: split
from optserve.optim._adaptive import FTRL, Adadelta, Adagrad, BiasCorrectedRMSprop, RMSprop, RowWiseAdagrad, Rprop

# isort: split
from optserve.optim._adam import (
    ADOPT,
    AdaBelief,
    Adam,
    Adamax,
    AdamW,
    Adan,
    AdEMAMix,
    AMSGrad,
    NAdam,
    RAdam,
    SparseAdam,
    Yogi,
)

# isort: split
from optserve.optim._layerwise import LAMB, LARS, NovoGrad

# isort: split
from optserve.optim._factored import Adafactor

# isort: split
from optserve.optim._automatic import SWATS, Prodigy, ScheduleFreeAdamW, ScheduleFreeSGD

# isort: split
from optserve.optim._orthogonal import Muon

# isort: split
from optserve.optim._federated import DelayedNesterov, FedAdagrad, FedAdam, FedYogi

__all__ = [
    "ADOPT",
    "ASGD",
    "FTRL",
    "LAMB",
    "LARS",
    "SGD",
    "SWATS",
    "AMSGrad",
    "AdEMAMix",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "AveragedMomentum",
    "BiasCorrectedRMSprop",
    "DelayedNesterov",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "Group",
    "Lion",
    "Memory",
    "Momentum",
    "Muon",
    "NAdam",
    "Nesterov",
    "NovoGrad",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "RowWiseAdagrad",
    "Rprop",
    "Rule",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "SignSGD",
    "Signum",
    "SparseAdam",
    "VelocityMomentum",
    "Yogi",
    "catalogue",
    "hyperparameter",
]


def from_hyperparameters(rule: str, values: Mapping[str, Any]) -> Optimizer:
    """The optimizer of that name with those values; raises UnknownRule or InvalidHyperparameter."""
    known = catalogue()
    if rule not in known:
        raise UnknownRule(
            refusal(rule)
            or f"expected a rule among {', '.join(known)}; got {rule!r}{suggest(rule, list(known))}. If it is one of your own, "
            "import the file that defines it, and name that file to the server: optserve serve --rule FILE"
        )
    check_names(known[rule], values)
    return known[rule](**values)


def documentation(optimizer: type[Optimizer]) -> tuple[str, str]:
    """The first sentence and the whole of an optimizer's documentation."""
    text = inspect.getdoc(optimizer) or ""
    return text.split("\n\n")[0], text


if not TYPE_CHECKING:  # to which every name would exist

    def __getattr__(name: str) -> Any:
        raise UnknownRule(why) if (why := refusal(name)) else AttributeError(f"module {__name__!r} has no {name!r}")
