"""The rules that the demonstration shows, with learning rates that suit them."""

from collections.abc import Mapping
from dataclasses import dataclass

from optserve import optim


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Of one rule.

    `digits` is where the decay to zero starts, chosen for gradients that are 3 updates old: four workers. `plane` stays the
    same throughout.
    """

    digits: float
    plane: float


LEARNING_RATES: Mapping[str, LearningRates] = {
    "SGD": LearningRates(digits=0.2, plane=0.95),
    "Momentum": LearningRates(digits=0.02, plane=0.1),
    "Nesterov": LearningRates(digits=0.02, plane=0.1),
    "VelocityMomentum": LearningRates(digits=0.02, plane=0.1),
    "AveragedMomentum": LearningRates(digits=0.2, plane=1.0),
    "Adagrad": LearningRates(digits=0.02, plane=1.5),
    "RMSprop": LearningRates(digits=0.002, plane=0.1),
    "BiasCorrectedRMSprop": LearningRates(digits=0.002, plane=0.3),
    "Adam": LearningRates(digits=0.003, plane=0.3),
    "AdamW": LearningRates(digits=0.003, plane=0.3),
    "AMSGrad": LearningRates(digits=0.003, plane=0.3),
    "NAdam": LearningRates(digits=0.003, plane=0.3),
}


def for_digits(rule: str) -> optim.Optimizer:
    """The rule of that name, ready for the digits; raises UnknownRule."""
    return optim.from_hyperparameters(rule, {}).replace(lr=LEARNING_RATES[rule].digits)


def for_plane(rule: str) -> optim.Optimizer:
    """The rule of that name, ready for the valley in the plane; raises UnknownRule."""
    return optim.from_hyperparameters(rule, {}).replace(lr=LEARNING_RATES[rule].plane)
