"""Rules that find a learning rate, its schedule, or the time to change rules by themselves."""

from dataclasses import dataclass
from typing import ClassVar

from optserve._errors import InvalidHyperparameter
from optserve.optim._optimizer import EPS, LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, hyperparameter

WARM_UP = "Updates over which the learning rate grows to η, in proportion to t."
WEIGHT_POWER = "Power r of the largest learning rate so far that weighs an update."


@dataclass(frozen=True)
class ScheduleFreeSGD(Optimizer):
    """Gradient descent that averages instead of lowering its learning rate.

        z ← z − ηₜg                             ηₜ = η min(1, t/warmup_steps)
        x ← x + c(z − x),  c = wₜ / (w₁ + ... + wₜ),  wₜ = max(η₁, ..., ηₜ)ʳ
        θ = (1 − β)z + βx                       β is `momentum`

    x, z and θ start as the parameters. Train on θ, evaluate x: `pull(evaluation=True)`.

    Reference: Defazio et al., NeurIPS 2024, arXiv:2405.15682; optax.contrib.schedule_free_sgd, whose warm-up begins one update
    later.
    """

    lr: float = hyperparameter(1.0, LR)
    momentum: float = hyperparameter(0.9, "β, how near to x gradients are taken.", below=1.0)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    warmup_steps: float = hyperparameter(0.0, WARM_UP)
    weight_lr_power: float = hyperparameter(2.0, WEIGHT_POWER)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class ScheduleFreeAdamW(Optimizer):
    """Adam that averages instead of momentum and of lowering its learning rate.

        v ← β₂v + (1 − β₂)g²
        z ← z − ηₜ(g / (√v̂ + ε) + λθ)           ηₜ = η min(1, t/warmup_steps)
        x ← x + c(z − x),  θ = (1 − β₁)z + β₁x  c as in `ScheduleFreeSGD`

    x, z and θ start as the parameters. Train on θ, evaluate x: `pull(evaluation=True)`.

    Reference: Defazio et al., NeurIPS 2024, arXiv:2405.15682; optax.contrib.schedule_free_adamw, whose warm-up begins one
    update later.
    """

    own_weight_decay: ClassVar[bool] = True

    lr: float = hyperparameter(2.5e-3, LR)
    betas: tuple[float, float] = hyperparameter(
        (0.9, 0.999), "β₁, how near to x gradients are taken; decay β₂ of the average.", below=1.0
    )
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    warmup_steps: float = hyperparameter(0.0, WARM_UP)
    weight_lr_power: float = hyperparameter(2.0, WEIGHT_POWER)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class SWATS(Optimizer):
    """Adam that goes over to SGD, with a learning rate that it finds, once that has settled.

        Adam:  s = −η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε),  θ ← θ + s
               γ = s·s / −(s·g)                 over all tensors of a group; nothing changes below if s·g = 0
               a ← β₂a + (1 − β₂)γ,  Γ = a / (1 − β₂ᵏ)
               go over if k > 1, Γ > 0 and |Γ − γ| < ε
        SGD:   b ← β₁b + g,  θ ← θ − (1 − β₁)Γb

    k counts the group's updates. A learning rate that changes after the switch changes Γ in proportion; the paper's lowers Γ
    by hand. Γ > 0 is not in the paper, and keeps the second phase from climbing.

    Reference: Keskar & Socher, arXiv:1712.07628.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-9, "ε, added to the denominator, and how near Γ and γ are at the switch.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class Prodigy(Optimizer):
    """Adam that finds its learning rate d from how far the parameters have come; leave `lr` at 1, or let a schedule lower it.

        q = dηc,  c = 1, or √(1 − β₂ᵏ)/(1 − β₁ᵏ) with use_bias_correction
        n ← β₃n + d/d₀ · q · g·(θ₀ − θ)         over all tensors of a group
        s ← β₃s + d/d₀ · qg                     with safeguard_warmup  d/d₀ · dg
        m ← β₁m + (1 − β₁)dg,  v ← β₂v + (1 − β₂)(dg)²
        d ← max(d, d_coef · n / ‖s‖₁)
        θ ← θ − q(m / (√v + dε) + λθ)

    d starts as d₀, θ₀ is what the parameters were at first, and k counts the group's updates.

    Reference: Mishchenko & Defazio, ICML 2024, arXiv:2306.06101; optax.contrib.prodigy, which corrects the bias.
    """

    own_weight_decay: ClassVar[bool] = True

    lr: float = hyperparameter(1.0, "Learning rate η, a factor of the one that is found.")
    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    beta3: float | None = hyperparameter(None, "Decay β₃ of n and s; None is √β₂.", below=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    use_bias_correction: bool = hyperparameter(False, "Correct the averages for their start at zero.", live=False)
    safeguard_warmup: bool = hyperparameter(False, "Leave η out of s, for a schedule that warms up.", live=False)
    d0: float = hyperparameter(1e-6, "What d starts as; too small rather than too large.", live=False)
    d_coef: float = hyperparameter(1.0, "Factor of what d is set to.")
    maximize: bool = hyperparameter(False, MAXIMIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d0 == 0.0:
            raise InvalidHyperparameter("expected a positive d0: d could not grow from nothing; got 0")
