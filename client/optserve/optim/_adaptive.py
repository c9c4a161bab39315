"""A learning rate for every element, from the gradients that it has seen."""

from dataclasses import dataclass

from optserve._errors import InvalidHyperparameter
from optserve.optim._optimizer import EPS, LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, convention, defaults, hyperparameter


@defaults(
    optax={"initial_accumulator_value": 0.1, "eps": 1e-07},
    keras={"lr": 0.001, "initial_accumulator_value": 0.1, "eps": 1e-07},
)
@dataclass(frozen=True)
class Adagrad(Optimizer):
    """A learning rate for every element that shrinks with its squared gradients, as `torch.optim.Adagrad`.

        s ← s + g²                              s starts at initial_accumulator_value
        θ ← θ − η / (1 + (t − 1)·lr_decay) · g / (√s + ε)

    convention="optax" and "keras" divide by √(s + ε), and start s at 0.1; Keras' decay is decoupled.

    Reference: Duchi, Hazan & Singer, JMLR 12, 2011.
    """

    lr: float = hyperparameter(1e-2, LR)
    lr_decay: float = hyperparameter(0.0, "Decay of the learning rate, per update.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    initial_accumulator_value: float = hyperparameter(0.0, "What s starts at.", live=False)
    eps: float = hyperparameter(1e-10, EPS)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("optax", "keras")


@defaults(optax={"alpha": 0.9}, keras={"lr": 0.001, "alpha": 0.9, "eps": 1e-07})
@dataclass(frozen=True)
class RMSprop(Optimizer):
    """Divide by a running root mean square of the gradient, as `torch.optim.RMSprop`.

        v ← αv + (1 − α)g²
        centered:   a ← αa + (1 − α)g,  d = √(v − a²) + ε      otherwise  d = √v + ε
        momentum:   b ← μb + g/d,       θ ← θ − ηb             otherwise  θ ← θ − ηg/d

    convention="optax" and "keras" have ε inside the root and η inside the buffer: d = √(v − a² + ε), b ← μb + ηg/d, θ ← θ − b;
    Keras' decay is decoupled. `BiasCorrectedRMSprop` corrects the average for its start at zero.

    Reference: Tieleman & Hinton, lecture 6.5 of COURSERA, 2012; centered: Graves, arXiv:1308.0850.
    """

    lr: float = hyperparameter(1e-2, LR)
    alpha: float = hyperparameter(0.99, "Decay α of the averages, per update.", maximum=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    momentum: float = hyperparameter(0.0, "Momentum μ; zero keeps no buffer, and can't be left or reached live.")
    centered: bool = hyperparameter(False, "Subtract the squared mean: normalise by the variance.", live=False)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("optax", "keras")


@dataclass(frozen=True)
class BiasCorrectedRMSprop(Optimizer):
    """RMSprop whose average is corrected for its start at zero, with ε inside the root.

        e ← βe + (1 − β)g²
        θ ← θ − ηg / √(e / (1 − βᵗ) + ε)

    Reference: optax.rmsprop(bias_correction=True, eps_in_sqrt=True); the correction is Adam's (arXiv:1412.6980).
    """

    lr: float = hyperparameter(1e-2, LR)
    beta: float = hyperparameter(0.9, "Decay β of the average, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, "ε, added under the root so that it is never zero.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@defaults(keras={"lr": 0.001, "rho": 0.95, "eps": 1e-07})
@dataclass(frozen=True)
class Adadelta(Optimizer):
    """Steps in the parameter's own units, as `torch.optim.Adadelta`.

        v ← ρv + (1 − ρ)g²
        d = √(u + ε) / √(v + ε) · g
        u ← ρu + (1 − ρ)d²
        θ ← θ − ηd

    convention="keras" differs in defaults and in its decay, which is decoupled.

    Reference: Zeiler, arXiv:1212.5701.
    """

    lr: float = hyperparameter(1.0, LR)
    rho: float = hyperparameter(0.9, "Decay ρ of the averages, per update.", maximum=1.0)
    eps: float = hyperparameter(1e-6, "ε, added under both roots.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("keras")


@dataclass(frozen=True)
class Rprop(Optimizer):
    """A step for every element that grows while the gradient keeps its sign, as `torch.optim.Rprop`.

        g·g' > 0:  s ← min(η₊s, s_max)           g' is the gradient before, kept in the slot `prev`
        g·g' < 0:  s ← max(η₋s, s_min),  g ← 0
        θ ← θ − s sign(g)

    s starts at `lr`. For whole batches: signs of noisy gradients say little.

    Reference: Riedmiller & Braun, ICNN 1993.
    """

    lr: float = hyperparameter(1e-2, "What every step s starts at.", live=False)
    etas: tuple[float, float] = hyperparameter((0.5, 1.2), "Factors η₋ below and η₊ above 1.")
    step_sizes: tuple[float, float] = hyperparameter((1e-6, 50.0), "Bounds s_min and s_max of a step.")
    maximize: bool = hyperparameter(False, MAXIMIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.etas[0] < 1.0 < self.etas[1]:
            raise InvalidHyperparameter(f"expected etas as 0 < etas[0] < 1 < etas[1]; got {self.etas}")


@dataclass(frozen=True)
class FTRL(Optimizer):
    """Follow the regularised leader, for sparse linear models, as `keras.optimizers.Ftrl`.

        n' = n + g²
        z ← z + g + 2 l2_shrinkage·θ − (√n' − √n)/η · θ
        θ ← (clip(z, −l1, l1) − z) / (√n'/η + 2 l2 + β/η)

    n starts at initial_accumulator_value. l1 makes parameters exactly zero.

    Reference: McMahan et al., KDD 2013.
    """

    initial_accumulator_value: float = hyperparameter(0.1, "What n starts at.", live=False)
    l1_regularization_strength: float = hyperparameter(0.0, "l1.")
    l2_regularization_strength: float = hyperparameter(0.0, "l2.")
    l2_shrinkage_regularization_strength: float = hyperparameter(0.0, "l2 that acts on the gradient only.")
    beta: float = hyperparameter(0.0, "β.")
    maximize: bool = hyperparameter(False, MAXIMIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr == 0.0:
            raise InvalidHyperparameter("expected a positive lr: FTRL divides by it; got 0")
