"""The outer optimizers of federated learning and of DiLoCo: what they take for a gradient is how far workers have come."""

from math import sqrt
from typing import NamedTuple

from optserve import optim
from optserve_server.engine.rules.adam import AdamScalars, adam, yogi
from optserve_server.engine.rules.adaptive import AdagradScalars, adagrad
from optserve_server.engine.rules.rule import Memory, Rule, Rules


class FedAdagradScalars(NamedTuple):
    lr: float
    alpha1: float  # 1 - beta1
    tau: float


def fed_adagrad(p: float, g: float, m: float, s: float, h: FedAdagradScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    s = s + g * g
    return p - h.lr * m / (sqrt(s) + h.tau), m, s


def fed_adagrad_scalars(o: optim.FedAdagrad, t: int, memory: Memory) -> FedAdagradScalars:
    return FedAdagradScalars(o.lr, 1.0 - o.beta1, o.tau)


def plain_fed_adagrad_scalars(o: optim.FedAdagrad, t: int, memory: Memory) -> AdagradScalars:
    return AdagradScalars(o.lr, o.tau)


def fed_adam_scalars(o: optim.FedAdam | optim.FedYogi, t: int, memory: Memory) -> AdamScalars:
    beta1, beta2 = o.betas
    corrected, root = 1.0, 1.0
    if o.bias_correction != "none":
        power = t + 1 if o.bias_correction == "flower" else t
        corrected, root = 1.0 - beta1**power, sqrt(1.0 - beta2**power)
    hat = o.bias_correction != "adam"  # tau beside the uncorrected root
    return AdamScalars(
        lr=o.lr / corrected * (root if hat else 1.0),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        correction2=1.0 if hat else 1.0 / root,
        eps=o.tau,
    )


def accumulator(o: optim.FedAdagrad | optim.FedAdam | optim.FedYogi) -> float:
    """What v starts at."""
    return o.tau * o.tau if o.initial_accumulator_value is None else o.initial_accumulator_value


class DelayedNesterovScalars(NamedTuple):
    lr_g: float  # lr / N
    lr_m: float  # lr beta c, at every N-th update lr beta (1 - cN + c)
    decay: float  # 1, there beta
    share: float  # 0, there 1 / N
    keep: float  # 1, there 0


def delayed_nesterov(
    p: float, g: float, m: float, total: float, h: DelayedNesterovScalars
) -> tuple[float, float, float]:
    total = total + g
    m = h.decay * m + h.share * total
    return p - (h.lr_g * g + h.lr_m * m), m, h.keep * total


def delayed_nesterov_scalars(o: optim.DelayedNesterov, t: int, memory: Memory) -> DelayedNesterovScalars:
    part = 1.0 / o.every
    if t % o.every:
        return DelayedNesterovScalars(o.lr * part, o.lr * o.momentum * o.c, 1.0, 0.0, 1.0)
    rest = 1.0 - o.c * (o.every - 1)
    return DelayedNesterovScalars(o.lr * part, o.lr * o.momentum * rest, o.momentum, part, 0.0)


FED_ADAGRAD = Rule(fed_adagrad, fed_adagrad_scalars, ("exp_avg", "sum"), initial=lambda o: {"sum": accumulator(o)})
PLAIN_FED_ADAGRAD = Rule(
    adagrad, plain_fed_adagrad_scalars, ("sum",), initial=lambda o: {"sum": accumulator(o)}, lazy=True
)
FED_ADAM, FED_YOGI = (
    Rule(function, fed_adam_scalars, ("exp_avg", "exp_avg_sq"), initial=lambda o: {"exp_avg_sq": accumulator(o)})
    for function in (adam, yogi)
)

RULES: Rules = {
    optim.FedAdagrad: lambda o: PLAIN_FED_ADAGRAD if o.beta1 == 0.0 else FED_ADAGRAD,
    optim.FedAdam: FED_ADAM,
    optim.FedYogi: FED_YOGI,
    optim.DelayedNesterov: Rule(delayed_nesterov, delayed_nesterov_scalars, ("momentum_buffer", "grad_sum")),
}
