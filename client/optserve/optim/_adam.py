"""Adaptive moments: Adam, and what has been made of it."""

from dataclasses import dataclass
from typing import ClassVar

from optserve.optim._optimizer import EPS, LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, convention, defaults, hyperparameter


@defaults(keras={"eps": 1e-07})
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adaptive moments, algorithm 1 of the paper, as `torch.optim.Adam`.

        m ← β₁m + (1 − β₁)g         m̂ = m / (1 − β₁ᵗ)
        v ← β₂v + (1 − β₂)g²        v̂ = v / (1 − β₂ᵗ)
        θ ← θ − η m̂ / (√v̂ + ε)

    AMSGrad keeps v_max ← max(v_max, v) over the uncorrected v and puts it in the place of v.
    convention="optax" takes the maximum over v̂. "keras" is the "ε̂" form of the paper's section 2, with decoupled decay:

        θ ← θ − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)

    Reference: Kingma & Ba, arXiv:1412.6980; AMSGrad: Reddi, Kale & Kumar, ICLR 2018, arXiv:1904.09237.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    amsgrad: bool = hyperparameter(False, "Divide by the largest average so far.", live=False)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    decoupled_weight_decay: bool = hyperparameter(False, "Decay the parameters, not the gradient.")
    convention: str = convention("optax", "keras")


@defaults(optax={"weight_decay": 0.0001}, keras={"eps": 1e-07, "weight_decay": 0.004})
@dataclass(frozen=True)
class AdamW(Adam):
    """`Adam` with decoupled weight decay of 0.01, as `torch.optim.AdamW`.

    Reference: Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101.
    """

    weight_decay: float = hyperparameter(1e-2, WEIGHT_DECAY)
    decoupled_weight_decay: bool = hyperparameter(True, "Decay the parameters, not the gradient.")


@defaults(keras={"eps": 1e-07})
@dataclass(frozen=True)
class AMSGrad(Adam):
    """`Adam` that divides by the largest average so far, as `torch.optim.Adam(amsgrad=True)`.

    The maximum is taken over the uncorrected v and corrected afterwards; the paper corrects neither moment.

    Reference: Reddi, Kale & Kumar, ICLR 2018, arXiv:1904.09237.
    """

    amsgrad: bool = hyperparameter(True, "Divide by the largest average so far.", live=False)


@dataclass(frozen=True)
class SparseAdam(Optimizer):
    """Adam for embeddings, in the "ε̂" form, as `torch.optim.SparseAdam`: moments of a row that has no gradient stay.

        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
        θ ← θ − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)

    t counts the updates of the tensor, not of the row.

    Reference: Kingma & Ba, arXiv:1412.6980, section 2; torch.optim.SparseAdam.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@defaults(keras={"lr": 0.001, "eps": 1e-07, "momentum_decay": 1.0})
@dataclass(frozen=True)
class NAdam(Optimizer):
    """Adam with Nesterov's look-ahead and a momentum schedule, as `torch.optim.NAdam`; also called Nadam.

        μₜ = β₁(1 − ½·0.96^(tψ)),  Πₜ = μ₁μ₂…μₜ
        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
        θ ← θ − η [μₜ₊₁ m / (1 − Πₜμₜ₊₁) + (1 − μₜ) g / (1 − Πₜ)] / (√(v / (1 − β₂ᵗ)) + ε)

    ψ is `momentum_decay`: 0.004 in torch, 1 in Keras, which decays decoupled; convention="optax" is its limit at infinity.

    Reference: Dozat, ICLR workshop 2016.
    """

    lr: float = hyperparameter(2e-3, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    momentum_decay: float = hyperparameter(4e-3, "ψ, how fast the momentum schedule approaches β₁.")
    decoupled_weight_decay: bool = hyperparameter(False, "Decay the parameters, not the gradient.")
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("optax", "keras")


@dataclass(frozen=True)
class RAdam(Optimizer):
    """Adam that waits until its second moment can be trusted, as `torch.optim.RAdam`.

        m, v as in Adam;  ρ_∞ = 2/(1 − β₂) − 1,  ρ = ρ_∞ − 2tβ₂ᵗ/(1 − β₂ᵗ)
        ρ > 5:      θ ← θ − η r √(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε),  r² = (ρ − 4)(ρ − 2)ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2)ρ)
        otherwise:  θ ← θ − η m / (1 − β₁ᵗ)

    ε is that of the "ε̂" form, as torch has it; convention="optax" adds it to √v̂, as in Adam.

    Reference: Liu et al., ICLR 2020, arXiv:1908.03265.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    decoupled_weight_decay: bool = hyperparameter(False, "Decay the parameters, not the gradient.")
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("optax")


@defaults(keras={"lr": 0.001, "eps": 1e-07})
@dataclass(frozen=True)
class Adamax(Optimizer):
    """Adam with the largest gradient in the place of the root mean square, as `torch.optim.Adamax`.

        m ← β₁m + (1 − β₁)g
        u ← max(β₂u, |g| + ε)
        θ ← θ − η / (1 − β₁ᵗ) · m / u

    convention="keras" leaves ε out of the maximum and adds it to u in the quotient; its decay is decoupled.

    Reference: Kingma & Ba, arXiv:1412.6980, section 7.
    """

    lr: float = hyperparameter(2e-3, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂, per update.", below=1.0)
    eps: float = hyperparameter(1e-8, "ε, added to the gradient's magnitude so that u is never zero.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)
    convention: str = convention("keras")


@dataclass(frozen=True)
class AdaBelief(Optimizer):
    """Adam that divides by how far gradients stray from their average.

        m ← β₁m + (1 − β₁)g                          m̂ = m / (1 − β₁ᵗ)
        s ← β₂s + (1 − β₂)(g − m)² + ε_root          ŝ = s / (1 − β₂ᵗ)
        θ ← θ − η m̂ / (√ŝ + ε)

    m is the new average, as in the paper.

    Reference: Zhuang et al., NeurIPS 2020, arXiv:2010.07468; optax.adabelief.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-16, EPS)
    eps_root: float = hyperparameter(1e-16, "ε_root, added to s at every update.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    decoupled_weight_decay: bool = hyperparameter(False, "Decay the parameters, not the gradient.")
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class Yogi(Optimizer):
    """Adam whose second moment changes by a bounded amount.

        m ← β₁m + (1 − β₁)g
        v ← v − (1 − β₂) sign(v − g²) g²
        θ ← θ − η m̂ / (√v̂ + ε)                 corrected as in Adam

    m and v start at initial_accumulator_value.

    Reference: Zaheer et al., NeurIPS 2018; optax.yogi.
    """

    lr: float = hyperparameter(1e-2, LR)
    betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-3, EPS)
    initial_accumulator_value: float = hyperparameter(1e-6, "What m and v start at.", live=False)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class Adan(Optimizer):
    """Nesterov momentum in adaptive moments: averages of the gradient, of its change and of both.

        d = g − g'                          g' is the gradient before; d = 0 at a tensor's first update
        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)d,  n ← β₃n + (1 − β₃)(g + β₂d)²
        θ ← (θ − η (m̂ + β₂v̂) / (√n̂ + ε)) / (1 + ηλ)

    Weight decay is proximal, as in the authors' code. optax weighs d by 1 − β₂ in the place of β₂.

    Reference: Xie et al., TPAMI 2024, arXiv:2208.06677.
    """

    own_weight_decay: ClassVar[bool] = True

    betas: tuple[float, float, float] = hyperparameter(
        (0.98, 0.92, 0.99), "Decays β₁, β₂, β₃ of the averages, per update.", below=1.0
    )
    eps: float = hyperparameter(1e-8, EPS)
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class AdEMAMix(Optimizer):
    """Adam with a second, much slower average of gradients; weight decay is decoupled.

        m₁ ← β₁m₁ + (1 − β₁)g,  m₂ ← β₃m₂ + (1 − β₃)g,  v ← β₂v + (1 − β₂)g²
        θ ← (1 − ηλ)θ − η (m₁ / (1 − β₁ᵗ) + αm₂) / (√v̂ + ε)

    Over the first `warm_up` updates α grows in proportion to t, and β₃ from β₁ so that its half-life grows linearly.

    Reference: Pagliardini, Ablin & Grangier, ICLR 2025, arXiv:2409.03137; optax.contrib.ademamix.
    """

    decoupled_weight_decay: ClassVar[bool] = True

    betas: tuple[float, float, float] = hyperparameter(
        (0.9, 0.999, 0.9999), "Decays β₁, β₂, β₃ of the averages, per update.", below=1.0
    )
    alpha: float = hyperparameter(5.0, "Weight α of the slow average.")
    eps: float = hyperparameter(1e-8, EPS)
    warm_up: float = hyperparameter(0.0, "Updates until α and β₃ have their values.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    maximize: bool = hyperparameter(False, MAXIMIZE)


@dataclass(frozen=True)
class ADOPT(Optimizer):
    """Adam that divides by the second moment before the gradient enters it, and so converges for any β₂.

        t = 1:  v ← g², and nothing else
        u = clip(g / max(√v, ε), ±(t − 1)^¼)
        m ← β₁m + (1 − β₁)u,  θ ← θ − ηm,  v ← β₂v + (1 − β₂)g²

    Reference: Taniguchi et al., NeurIPS 2024, arXiv:2411.02853, with the clipping of its final version.
    """

    betas: tuple[float, float] = hyperparameter((0.9, 0.9999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = hyperparameter(1e-6, "ε, the least that is divided by.")
    weight_decay: float = hyperparameter(0.0, WEIGHT_DECAY)
    decoupled_weight_decay: bool = hyperparameter(False, "Decay the parameters, not the gradient.")
    maximize: bool = hyperparameter(False, MAXIMIZE)
