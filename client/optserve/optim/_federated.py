"""The outer optimizers of federated learning and of DiLoCo: what they take for a gradient is how far workers have come.

Workers train on their own for a while, and push g = θ_base − θ_local, the pseudo-gradient; papers on federated learning call
its opposite Δ. `optserve.presets` has these rules with the policies that go with them.
"""

from dataclasses import dataclass

from optserve._errors import InvalidHyperparameter
from optserve.optim._optimizer import LR, Optimizer, hyperparameter

TAU = "τ, added to the denominator: how little it adapts."
BETAS = "Decays β₁, β₂ of the averages, per update."
ACCUMULATOR = "What v starts at; None is τ²."
CORRECTION = "Whose correction of the averages for their start this is."


@dataclass(frozen=True)
class FedAdagrad(Optimizer):
    """A learning rate for every element that shrinks with its squared pseudo-gradients: Adagrad on the server.

        m ← β₁m + (1 − β₁)g                     with β₁ = 0, as in the paper, there is no m, but g
        v ← v + g²                              v starts at initial_accumulator_value, or at τ²
        θ ← θ − η m / (√v + τ)

    Flower's FedAdagrad starts v at 0. That of TensorFlow Federated is `Adagrad(convention="optax")`.

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, algorithm 2. η is Flower's; the paper chooses one for each task.
    """

    lr: float = hyperparameter(0.1, LR)
    beta1: float = hyperparameter(
        0.0, "Decay β₁ of the average; zero keeps none, and can't be left or reached live.", below=1.0
    )
    tau: float = hyperparameter(1e-3, TAU)
    initial_accumulator_value: float | None = hyperparameter(None, ACCUMULATOR, live=False)


@dataclass(frozen=True)
class FedAdam(Optimizer):
    """Adam on the server, without bias correction.

        m ← β₁m + (1 − β₁)g
        v ← β₂v + (1 − β₂)g²                    v starts at initial_accumulator_value, or at τ²
        θ ← θ − η m / (√v + τ)

    bias_correction has, instead of the last line, what others have, who start v at 0:

        "adam"     θ ← θ − η m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + τ)             torch and optax, with their ε for τ
        "tff"      θ ← θ − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + τ)               TensorFlow Federated
        "flower"   θ ← θ − η √(1 − β₂ᵗ⁺¹)/(1 − β₁ᵗ⁺¹) · m / (√v + τ)           Flower

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, algorithm 2. η is Flower's; the paper chooses one for each task.
    """

    lr: float = hyperparameter(0.1, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.99), BETAS, below=1.0)
    tau: float = hyperparameter(1e-3, TAU)
    initial_accumulator_value: float | None = hyperparameter(None, ACCUMULATOR, live=False)
    bias_correction: str = hyperparameter("none", CORRECTION, live=False, choices=("none", "adam", "tff", "flower"))


@dataclass(frozen=True)
class FedYogi(Optimizer):
    """Yogi on the server, without bias correction: the second moment changes by a bounded amount.

        m ← β₁m + (1 − β₁)g
        v ← v − (1 − β₂) sign(v − g²) g²        v starts at initial_accumulator_value, or at τ²
        θ ← θ − η m / (√v + τ)

    bias_correction is "adam" or "tff", as in `FedAdam`. Flower starts v at 0 and does not correct; TensorFlow Federated
    starts it at 1e-6 and does.

    Reference: Reddi et al., ICLR 2021, arXiv:2003.00295, algorithm 2. η is Flower's; the paper chooses one for each task.
    """

    lr: float = hyperparameter(1e-2, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.99), BETAS, below=1.0)
    tau: float = hyperparameter(1e-3, TAU)
    initial_accumulator_value: float | None = hyperparameter(None, ACCUMULATOR, live=False)
    bias_correction: str = hyperparameter("none", CORRECTION, live=False, choices=("none", "adam", "tff"))


@dataclass(frozen=True)
class DelayedNesterov(Optimizer):
    """Nesterov's momentum for pushes that come one by one: each moves the parameters, every N-th the momentum.

        Δ ← Δ + g
        every N-th update:  m ← βm + Δ/N,  Δ ← 0,  θ ← θ − η(g/N + (1 − cN + c)βm)
        otherwise:          θ ← θ − η(g/N + cβm)

    N is `every`: the number of workers, say. β is `momentum`. With c = 0, N updates are together one of `Nesterov` with the
    mean of their gradients; c > 0 spreads the momentum over them.

    Reference: Liu et al., arXiv:2401.09135. η is that of `Nesterov` in DiLoCo, and N its number of workers there.
    """

    lr: float = hyperparameter(0.7, LR)
    momentum: float = hyperparameter(0.9, "Momentum β.")
    every: int = hyperparameter(4, "Updates N that make one of the momentum.", minimum=1, live=False)
    c: float = hyperparameter(0.0, "Part c of the momentum in each update between, up to 1/N.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.c, float) and self.c > 1.0 / self.every:
            raise InvalidHyperparameter(f"expected c up to 1/every, 1/{self.every}; got {self.c}")
