"""Second moments that are kept by row and column, to save memory."""

import math
from dataclasses import dataclass
from typing import ClassVar

from optserve._errors import InvalidHyperparameter
from optserve.optim._optimizer import MAXIMIZE, WEIGHT_DECAY, Optimizer, convention, defaults, hyperparameter


@defaults(keras={"lr": 0.001, "eps": (1e-30, 1e-3)})
@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adam's second moment in a matrix' row and column means, and steps relative to the parameters, as `torch.optim.Adafactor`.

        ρ = t^τ                                 τ is beta2_decay
        R ← R + ρ(mean(g²) − R)                 over each row; C likewise, over each column
        V = RC / max(mean(R), ε₁)               of a vector  V ← V + ρ(g² − V)
        U = g / √max(V, ε₁²)
        θ ← (1 − ηλ)θ − max(ε₂, rms(θ)) min(η, 1/√t) · U / max(1, rms(U)/d)

    rms(θ) is of the parameters before their decay; of more than two dimensions the last two make matrices. ε₁ = None is the
    epsilon of the type that the server computes in, which for half precision is float32.
    convention="keras" adds ε₁ to g² instead of bounding V and mean(R), and decays first.

    Reference: Shazeer & Stern, ICML 2018, arXiv:1804.04235.
    """

    own_weight_decay: ClassVar[bool] = True

    lr: float = hyperparameter(1e-2, "Learning rate η, at most 1/√t.")
    beta2_decay: float = hyperparameter(-0.8, "Power τ of the second moment's schedule, at most 0.", minimum=-math.inf)
    eps: tuple[float | None, float] = hyperparameter((None, 1e-3), "ε₁ of the second moment and ε₂ of the scale.")
    d: float = hyperparameter(1.0, "Root mean square d that a step is clipped to.", minimum=1.0)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("keras")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta2_decay > 0.0:
            raise InvalidHyperparameter(f"expected beta2_decay to be at most 0; got {self.beta2_decay}")
