from dataclasses import dataclass

from optserve.optim import Optimizer, Rule, hyperparameter


@dataclass(frozen=True)
class SoftSign(Optimizer):
    """θ ← θ − η m / (|m| + ε) with m ← m + α(g − m): a sign, but in proportion to m where m is small."""

    alpha: float = hyperparameter(0.1, "Weight α of a new gradient in the average m.")
    eps: float = hyperparameter(1e-3, "ε, the size below which m is small.")


def soft_sign(p, g, m, h):
    m = m + h.alpha * (g - m)
    return p - h.lr * m / (abs(m) + h.eps), m


RULES = {SoftSign: Rule(soft_sign, slots=("exp_avg",))}
