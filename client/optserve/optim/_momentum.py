"""Gradient descent, its momenta, and rules that take a sign only."""

from dataclasses import dataclass
from typing import ClassVar

from optserve._errors import InvalidHyperparameter
from optserve.optim._optimizer import LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, convention, defaults, hyperparameter


@defaults(keras={"lr": 0.01})
@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent, with momentum if asked for, as `torch.optim.SGD`.

    θ ← θ − ηg. With momentum μ and dampening τ, a buffer b accumulates gradients and η stays outside of it:

        b ← g              at the tensor's first update (no dampening)
        b ← μb + (1 − τ)g  afterwards
        θ ← θ − ηb,  or with Nesterov's look-ahead  θ ← θ − η(g + μb)

    convention="keras" keeps η inside the buffer, v ← μv − ηg, θ ← θ + v or θ + μv − ηg, and decays decoupled.
    `VelocityMomentum` does the first, too, and `AveragedMomentum` weighs g by 1 − β: the three agree while η is constant,
    up to a rescaling, and differ once it changes.

    Reference: Robbins & Monro 1951; Polyak 1964; Sutskever et al., ICML 2013 (momentum as written here).
    """

    momentum: float = hyperparameter(0.0, "Momentum μ; zero keeps no buffer, and can't be left or reached live.")
    dampening: float = hyperparameter(0.0, "Dampening τ of the gradient as it enters the buffer.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    nesterov: bool = hyperparameter(False, "Nesterov's look-ahead.", live=False)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("keras")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise InvalidHyperparameter(
                "expected a positive momentum and no dampening with nesterov=True; "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )
        if self.dampening != 0 and self.convention != "torch":
            raise InvalidHyperparameter(
                f"expected no dampening, which {self.convention} does not have; got {self.dampening}"
            )


@defaults(keras={"lr": 0.01})
@dataclass(frozen=True)
class Momentum(SGD):
    """`SGD` with a momentum of 0.9: a buffer with the learning rate outside, as torch has it."""

    momentum: float = hyperparameter(0.9, "Momentum μ.")


@defaults(keras={"lr": 0.01})
@dataclass(frozen=True)
class Nesterov(SGD):
    """`SGD` with Nesterov's look-ahead and a momentum of 0.9, as torch has it.

    The server stores, and workers pull, the look-ahead point θ + μv of the textbook form.

    Reference: Nesterov 1983; Sutskever et al., ICML 2013.
    """

    momentum: float = hyperparameter(0.9, "Momentum μ.")
    nesterov: bool = hyperparameter(True, "Nesterov's look-ahead.", live=False)


@dataclass(frozen=True)
class VelocityMomentum(Optimizer):
    """Momentum with the learning rate inside the buffer, as Keras and the first papers have it.

        v ← μv − ηg
        θ ← θ + v

    The velocity remembers the learning rates that were: after a change of η it differs from `Momentum`.

    Reference: Polyak 1964; Rumelhart et al. 1986; keras.optimizers.SGD.
    """

    lr: float = hyperparameter(1e-2, LR)
    momentum: float = hyperparameter(0.9, "Momentum μ.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class AveragedMomentum(Optimizer):
    """Momentum as an exponential average of gradients, without bias correction.

        v ← βv + (1 − β)g
        θ ← θ − ηv

    `Momentum` with dampening β differs at the first update only: its buffer starts as g, this one as (1 − β)g.

    Reference: optax.ema(β, debias=False) followed by optax.sgd(η).
    """

    lr: float = hyperparameter(1e-2, LR)
    beta: float = hyperparameter(0.9, "Decay β of the average, per update.", below=1.0)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class ASGD(Optimizer):
    """Gradient descent whose iterates are averaged, as `torch.optim.ASGD`.

        θ ← (1 − λ'ηₜ)θ − ηₜg,           ηₜ₊₁ = η / (1 + λ'ηt)^α
        a ← a + μₜ(θ − a),               μₜ₊₁ = 1 / max(1, t − t₀)

    λ' is `lambd`; η₁ = η and μ₁ = 1. a is the slot `ax`.

    Reference: Polyak & Juditsky, SIAM J. Control Optim. 30, 1992.
    """

    lr: float = hyperparameter(1e-2, LR)
    lambd: float = hyperparameter(1e-4, "Decay λ' of the parameters and of the learning rate.")
    alpha: float = hyperparameter(0.75, "Power α of the learning rate's decay.")
    t0: float = hyperparameter(1e6, "Updates t₀ before averaging begins.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class SignSGD(Optimizer):
    """Gradient descent by signs: θ ← θ − η sign(g), where sign(0) = 0.

    Reference: Bernstein et al., ICML 2018, arXiv:1802.04434; optax.sign_sgd.
    """

    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class Signum(Optimizer):
    """The sign of an average of gradients, without bias correction.

        m ← βm + (1 − β)g
        θ ← θ − η sign(m)

    Reference: Bernstein et al., ICML 2018, arXiv:1802.04434; optax.signum.
    """

    beta: float = hyperparameter(0.9, "Decay β of the average, per update.", below=1.0)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of a gradient mixed into its average; weight decay is decoupled.

        θ ← (1 − ηλ)θ − η sign(β₁m + (1 − β₁)g)
        m ← β₂m + (1 − β₂)g

    Reference: Chen et al., arXiv:2302.06675; optax.lion.
    """

    decoupled_weight_decay: ClassVar[bool] = True

    lr: float = hyperparameter(1e-4, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.99), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
