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
from typing import Any

from optserve._errors import UnknownRule
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
from optserve.optim._adaptive import FTRL, Adadelta, Adagrad, BiasCorrectedRMSprop, RMSprop, RowWiseAdagrad, Rprop
from optserve.optim._automatic import SWATS, Prodigy, ScheduleFreeAdamW, ScheduleFreeSGD
from optserve.optim._factored import Adafactor
from optserve.optim._group import Group
from optserve.optim._layerwise import LAMB, LARS, NovoGrad
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
from optserve.optim._optimizer import Optimizer, check_names, suggest
from optserve.optim._orthogonal import Muon

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
    "Group",
    "Lion",
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
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "SignSGD",
    "Signum",
    "SparseAdam",
    "VelocityMomentum",
    "Yogi",
    "catalogue",
]

_CATALOGUE: tuple[type[Optimizer], ...] = (
    SGD,
    Momentum,
    Nesterov,
    VelocityMomentum,
    AveragedMomentum,
    ASGD,
    SignSGD,
    Signum,
    Lion,
    Adagrad,
    RowWiseAdagrad,
    Adadelta,
    RMSprop,
    BiasCorrectedRMSprop,
    Rprop,
    FTRL,
    Adam,
    AdamW,
    AMSGrad,
    SparseAdam,
    NAdam,
    RAdam,
    Adamax,
    AdaBelief,
    Yogi,
    Adan,
    AdEMAMix,
    ADOPT,
    ScheduleFreeSGD,
    ScheduleFreeAdamW,
    LARS,
    NovoGrad,
    LAMB,
    Adafactor,
    SWATS,
    Prodigy,
    Muon,
)


def catalogue() -> dict[str, type[Optimizer]]:
    """All optimizers by the name of their rule, simplest first."""
    return {optimizer.__name__: optimizer for optimizer in _CATALOGUE}


def from_hyperparameters(rule: str, values: Mapping[str, Any]) -> Optimizer:
    """The optimizer of that name with those values; raises UnknownRule or InvalidHyperparameter."""
    known = catalogue()
    if rule not in known:
        raise UnknownRule(f"expected a rule among {', '.join(known)}; got {rule!r}{suggest(rule, list(known))}")
    check_names(known[rule], values)
    return known[rule](**values)


def documentation(optimizer: type[Optimizer]) -> tuple[str, str]:
    """The first sentence and the whole of an optimizer's documentation."""
    text = inspect.getdoc(optimizer) or ""
    return text.split("\n\n")[0], text
