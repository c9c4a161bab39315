"""Steps that are orthogonal matrices."""

import math
from dataclasses import dataclass
from typing import ClassVar

from optserve.optim._optimizer import EPS, LR, MAXIMIZE, WEIGHT_DECAY, Optimizer, hyperparameter


@dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum made orthogonal, for matrices, as `torch.optim.Muon`; other tensors follow `AdamW`.

        B ← μB + (1 − μ)g
        U = (1 − μ)g + μB                       Nesterov's look-ahead; otherwise  U = B
        X = U / max(‖U‖, ε);  ns_steps times:  A = XXᵀ,  X ← aX + (bA + cA²)X
        θ ← (1 − ηλ)θ − ηsX,  s = √max(1, rows/columns)  ("original", None)  or  0.2 √max(rows, columns)  ("match_rms_adamw")

    The iteration (Newton–Schulz) brings the singular values of X near 1. torch rounds X to bfloat16, which moves it by about
    1 %; here it is computed in the type of the update, float32 or float64.
    Tensors that don't have two dimensions take AdamW's step, by the hyperparameters that begin with `adamw_`, their learning
    rate among them. Embeddings and output layers, matrices that should not move so, belong in another set.

    Reference: Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982 (match_rms_adamw).
    """

    own_weight_decay: ClassVar[bool] = True

    lr: float = hyperparameter(1e-3, LR)
    weight_decay: float = hyperparameter(0.1, WEIGHT_DECAY)
    momentum: float = hyperparameter(0.95, "Decay μ of the average, per update.", below=1.0)
    nesterov: bool = hyperparameter(True, "Nesterov's look-ahead.", live=False)
    ns_coefficients: tuple[float, float, float] = hyperparameter(
        (3.4445, -4.775, 2.0315), "a, b, c of the iteration.", minimum=-math.inf
    )
    eps: float = hyperparameter(1e-7, "ε, the least norm that is divided by.")
    ns_steps: int = hyperparameter(5, "Iterations.", below=100)
    adjust_lr_fn: str | None = hyperparameter(
        None, "What s is; None is the original's.", live=False, choices=("original", "match_rms_adamw")
    )
    adamw_lr: float = hyperparameter(1e-3, "Learning rate of tensors that are no matrices.")
    adamw_betas: tuple[float, float] = hyperparameter((0.9, 0.999), "Their decays β₁, β₂, per update.", below=1.0)
    adamw_eps: float = hyperparameter(1e-8, EPS)
    adamw_weight_decay: float = hyperparameter(1e-2, "Their weight decay λ, per update.")
    maximize: bool = hyperparameter(False, MAXIMIZE)
