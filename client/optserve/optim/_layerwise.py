"""A step for every tensor whose length follows the tensor's own, for large batches."""

from dataclasses import dataclass
from typing import ClassVar

from optserve.optim._optimizer import EPS, LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, convention, defaults, hyperparameter


@dataclass(frozen=True)
class LARS(Optimizer):
    """Momentum on gradients as long as their tensors, as `optax.lars`.

        r = κ‖θ‖ / (‖g‖ + ε)                    1 if either norm is zero
        b ← μb + ηrg
        θ ← θ − b,  or with Nesterov's look-ahead  θ ← θ − (ηrg + μb)

    g includes weight decay. The buffer remembers the learning rates that were.

    Reference: You, Gitman & Ginsburg, arXiv:1708.03888; optax.lars.
    """

    lr: float = hyperparameter(0.1, LR)
    momentum: float = hyperparameter(0.9, "Momentum μ.")
    trust_coefficient: float = hyperparameter(1e-3, "κ, the step's length as part of the tensor's.")
    eps: float = hyperparameter(0.0, "ε, added to the gradient's norm.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    nesterov: bool = hyperparameter(False, "Nesterov's look-ahead.", live=False)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@defaults(keras={"eps": 1e-07})
@dataclass(frozen=True)
class LAMB(Optimizer):
    """Adam whose steps are as long as their tensors, as `optax.lamb`.

        u = m̂ / (√v̂ + ε) + λθ                   m̂, v̂ as in Adam
        θ ← θ − η ‖θ‖/‖u‖ · u                   the ratio is 1 if either norm is zero

    convention="keras" has no λθ in u; its decay is decoupled.

    Reference: You et al., ICLR 2020, arXiv:1904.00962; optax.lamb.
    """

    own_weight_decay: ClassVar[bool] = True

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-6, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("keras")


@dataclass(frozen=True)
class NovoGrad(Optimizer):
    """Momentum on gradients divided by a running norm, one for each tensor.

        v ← ‖g‖²                                at the tensor's first update
        v ← β₂v + (1 − β₂)‖g‖²                  afterwards
        m ← β₁m + g / (√v + ε) + λθ
        θ ← θ − ηm

    Reference: Ginsburg et al., arXiv:1905.11286; optax.novograd.
    """

    own_weight_decay: ClassVar[bool] = True

    betas: tuple[float, float] = hyperparameter((0.9, 0.25), "Decays β₁, β₂, per update.", below=1.0)
    eps: float = hyperparameter(1e-6, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
