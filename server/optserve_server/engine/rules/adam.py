"""Adaptive moments: Adam, and what has been made of it."""

from math import copysign, exp, log, sqrt
from typing import NamedTuple

from optserve import optim
from optserve_server.engine.rules.rule import Memory, Rule, Rules


class AdamScalars(NamedTuple):
    lr: float  # lr / (1 - beta1^t): the first moment's correction
    alpha1: float  # 1 - beta1
    alpha2: float  # 1 - beta2
    correction2: float  # 1 / sqrt(1 - beta2^t)
    eps: float


def adam(p: float, g: float, m: float, v: float, h: AdamScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    v = v + h.alpha2 * (g * g - v)
    return p - h.lr * m / (sqrt(v) * h.correction2 + h.eps), m, v


def amsgrad(
    p: float, g: float, m: float, v: float, largest: float, h: AdamScalars
) -> tuple[float, float, float, float]:
    m = m + h.alpha1 * (g - m)
    v = v + h.alpha2 * (g * g - v)
    largest = max(largest, v)
    return p - h.lr * m / (sqrt(largest) * h.correction2 + h.eps), m, v, largest


def amsgrad_corrected(
    p: float, g: float, m: float, v: float, largest: float, h: AdamScalars
) -> tuple[float, float, float, float]:
    m = m + h.alpha1 * (g - m)
    v = v + h.alpha2 * (g * g - v)
    largest = max(largest, v * h.correction2 * h.correction2)
    return p - h.lr * m / (sqrt(largest) + h.eps), m, v, largest


def adam_scalars(o: optim.Adam | optim.SparseAdam | optim.Yogi, t: int, memory: Memory) -> AdamScalars:
    beta1, beta2 = o.betas
    root = sqrt(1.0 - beta2**t)
    # epsilon beside the uncorrected root
    hat = isinstance(o, optim.SparseAdam) or (isinstance(o, optim.Adam) and o.convention == "keras")
    return AdamScalars(
        lr=o.lr / (1.0 - beta1**t) * (root if hat else 1.0),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        correction2=1.0 if hat else 1.0 / root,
        eps=o.eps,
    )


class NAdamScalars(NamedTuple):
    lr_m: float  # lr mu_(t+1) / (1 - Pi_t mu_(t+1))
    lr_g: float  # lr (1 - mu_t) / (1 - Pi_t)
    alpha1: float
    alpha2: float
    correction2: float
    eps: float


def nadam(p: float, g: float, m: float, v: float, h: NAdamScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    v = v + h.alpha2 * (g * g - v)
    return p - (h.lr_m * m + h.lr_g * g) / (sqrt(v) * h.correction2 + h.eps), m, v


def nadam_momentum(o: optim.NAdam, t: int) -> float:
    """mu_t of the momentum schedule."""
    if o.convention == "optax":
        return o.betas[0]
    return o.betas[0] * (1.0 - 0.5 * float(0.96 ** (t * o.momentum_decay)))


def nadam_product(o: optim.NAdam, t: int, memory: Memory) -> Memory:
    """The product of mu_1 ... mu_t."""
    return (memory[0] * nadam_momentum(o, t),)


def nadam_scalars(o: optim.NAdam, t: int, memory: Memory) -> NAdamScalars:
    (product,) = memory
    beta1, beta2 = o.betas
    mu, mu_next = nadam_momentum(o, t), nadam_momentum(o, t + 1)
    return NAdamScalars(
        lr_m=o.lr * mu_next / (1.0 - product * mu_next),
        lr_g=o.lr * (1.0 - mu) / (1.0 - product),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        correction2=1.0 / sqrt(1.0 - beta2**t),
        eps=o.eps,
    )


class RAdamScalars(NamedTuple):
    adaptive: float  # lr r / (1 - beta1^t), or 0 where the variance is intractable
    plain: float  # lr / (1 - beta1^t) there, else 0
    correction2: float  # 1 / sqrt(1 - beta2^t), or in torch's form 1 and its inverse in `adaptive`
    alpha1: float
    alpha2: float
    eps: float


def radam(p: float, g: float, m: float, v: float, h: RAdamScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    v = v + h.alpha2 * (g * g - v)
    return p - m * (h.adaptive / (sqrt(v) * h.correction2 + h.eps) + h.plain), m, v


def radam_scalars(o: optim.RAdam, t: int, memory: Memory) -> RAdamScalars:
    beta1, beta2 = o.betas
    lr, correction2 = o.lr / (1.0 - beta1**t), 1.0 - beta2**t
    limit = 2.0 / (1.0 - beta2) - 1.0
    length = limit - 2.0 * t * beta2**t / correction2
    if length <= 5.0:
        return RAdamScalars(0.0, lr, 1.0, 1.0 - beta1, 1.0 - beta2, 1.0)
    variance = (length - 4.0) * (length - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * length)
    if o.convention == "optax":
        return RAdamScalars(lr * sqrt(variance), 0.0, 1.0 / sqrt(correction2), 1.0 - beta1, 1.0 - beta2, o.eps)
    return RAdamScalars(lr * sqrt(variance * correction2), 0.0, 1.0, 1.0 - beta1, 1.0 - beta2, o.eps)


class AdamaxScalars(NamedTuple):
    lr: float  # lr / (1 - beta1^t)
    alpha1: float
    beta2: float
    eps: float


def adamax(p: float, g: float, m: float, u: float, h: AdamaxScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    u = max(h.beta2 * u, abs(g) + h.eps)
    return p - h.lr * m / u, m, u


def adamax_outside(p: float, g: float, m: float, u: float, h: AdamaxScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    u = max(h.beta2 * u, abs(g))
    return p - h.lr * m / (u + h.eps), m, u


def adamax_scalars(o: optim.Adamax, t: int, memory: Memory) -> AdamaxScalars:
    beta1, beta2 = o.betas
    return AdamaxScalars(o.lr / (1.0 - beta1**t), 1.0 - beta1, beta2, o.eps)


class AdaBeliefScalars(NamedTuple):
    lr: float
    alpha1: float
    alpha2: float
    correction2: float
    eps: float
    eps_root: float


def adabelief(p: float, g: float, m: float, s: float, h: AdaBeliefScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    surprise = g - m
    s = s + h.alpha2 * (surprise * surprise - s) + h.eps_root
    return p - h.lr * m / (sqrt(s) * h.correction2 + h.eps), m, s


def adabelief_scalars(o: optim.AdaBelief, t: int, memory: Memory) -> AdaBeliefScalars:
    beta1, beta2 = o.betas
    return AdaBeliefScalars(
        o.lr / (1.0 - beta1**t), 1.0 - beta1, 1.0 - beta2, 1.0 / sqrt(1.0 - beta2**t), o.eps, o.eps_root
    )


def yogi(p: float, g: float, m: float, v: float, h: AdamScalars) -> tuple[float, float, float]:
    m = m + h.alpha1 * (g - m)
    square = g * g
    v = v - copysign(h.alpha2, v - square) * square if v != square else v
    return p - h.lr * m / (sqrt(v) * h.correction2 + h.eps), m, v


class AdanScalars(NamedTuple):
    lr_m: float  # lr / (1 - beta1^t)
    lr_d: float  # lr beta2 / (1 - beta2^t)
    alpha1: float
    alpha2: float
    alpha3: float
    beta2: float
    correction3: float  # 1 / sqrt(1 - beta3^t)
    eps: float
    known: float  # whether there is a gradient before: 0 at the first update, then 1
    shrink: float  # 1 / (1 + lr weight_decay)


def adan(
    p: float, g: float, m: float, d: float, n: float, before: float, h: AdanScalars
) -> tuple[float, float, float, float, float]:
    change = h.known * (g - before)
    ahead = g + h.beta2 * change
    m = m + h.alpha1 * (g - m)
    d = d + h.alpha2 * (change - d)
    n = n + h.alpha3 * (ahead * ahead - n)
    return (p - (h.lr_m * m + h.lr_d * d) / (sqrt(n) * h.correction3 + h.eps)) * h.shrink, m, d, n, g


def adan_scalars(o: optim.Adan, t: int, memory: Memory) -> AdanScalars:
    beta1, beta2, beta3 = o.betas
    return AdanScalars(
        lr_m=o.lr / (1.0 - beta1**t),
        lr_d=o.lr * beta2 / (1.0 - beta2**t),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        alpha3=1.0 - beta3,
        beta2=beta2,
        correction3=1.0 / sqrt(1.0 - beta3**t),
        eps=o.eps,
        known=float(t > 1),
        shrink=1.0 / (1.0 + o.lr * o.weight_decay),
    )


class AdEMAMixScalars(NamedTuple):
    lr: float
    correction1: float  # 1 / (1 - beta1^t)
    alpha1: float
    alpha2: float
    alpha3: float
    slow: float  # alpha
    correction2: float
    eps: float


def ademamix(
    p: float, g: float, fast: float, slow: float, v: float, h: AdEMAMixScalars
) -> tuple[float, float, float, float]:
    fast = fast + h.alpha1 * (g - fast)
    slow = slow + h.alpha3 * (g - slow)
    v = v + h.alpha2 * (g * g - v)
    return p - h.lr * (fast * h.correction1 + h.slow * slow) / (sqrt(v) * h.correction2 + h.eps), fast, slow, v


def ademamix_scalars(o: optim.AdEMAMix, t: int, memory: Memory) -> AdEMAMixScalars:
    beta1, beta2, beta3 = o.betas
    alpha = o.alpha
    if t < o.warm_up:
        part = t / o.warm_up
        alpha *= part
        if 0.0 < beta1 < beta3:
            first, last = log(beta1), log(beta3)
            beta3 = min(exp(first * last / ((1.0 - part) * last + part * first)), beta3)
    return AdEMAMixScalars(
        lr=o.lr,
        correction1=1.0 / (1.0 - beta1**t),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        alpha3=1.0 - beta3,
        slow=alpha,
        correction2=1.0 / sqrt(1.0 - beta2**t),
        eps=o.eps,
    )


class AdoptScalars(NamedTuple):
    lr: float  # 0 at the first update
    alpha1: float  # 0 there
    alpha2: float  # 1 there
    eps: float
    largest: float  # (t - 1)^(1/4)


def adopt(p: float, g: float, m: float, v: float, h: AdoptScalars) -> tuple[float, float, float]:
    u = g / max(sqrt(v), h.eps)
    m = m + h.alpha1 * (min(max(u, -h.largest), h.largest) - m)
    return p - h.lr * m, m, v + h.alpha2 * (g * g - v)


def adopt_scalars(o: optim.ADOPT, t: int, memory: Memory) -> AdoptScalars:
    if t == 1:
        return AdoptScalars(0.0, 0.0, 1.0, 1.0, 0.0)
    return AdoptScalars(o.lr, 1.0 - o.betas[0], 1.0 - o.betas[1], o.eps, (t - 1) ** 0.25)


ADAM = Rule(adam, adam_scalars, ("exp_avg", "exp_avg_sq"))
SPARSE_ADAM = Rule(adam, adam_scalars, ("exp_avg", "exp_avg_sq"), lazy=True)
AMSGRAD = Rule(amsgrad, adam_scalars, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
AMSGRAD_CORRECTED = Rule(amsgrad_corrected, adam_scalars, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
ADAMAX = Rule(adamax, adamax_scalars, ("exp_avg", "exp_inf"))
ADAMAX_OUTSIDE = Rule(adamax_outside, adamax_scalars, ("exp_avg", "exp_inf"))


def adams(o: optim.Adam) -> Rule:
    """By whether the largest average counts, and of what."""
    if not o.amsgrad:
        return ADAM
    return AMSGRAD_CORRECTED if o.convention == "optax" else AMSGRAD


RULES: Rules = {
    optim.Adam: adams,
    optim.SparseAdam: SPARSE_ADAM,
    optim.NAdam: Rule(
        nadam, nadam_scalars, ("exp_avg", "exp_avg_sq"), memory={"mu_product": 1.0}, remember=nadam_product
    ),
    optim.RAdam: Rule(radam, radam_scalars, ("exp_avg", "exp_avg_sq")),
    optim.Adamax: lambda o: ADAMAX_OUTSIDE if o.convention == "keras" else ADAMAX,
    optim.AdaBelief: Rule(adabelief, adabelief_scalars, ("exp_avg", "exp_avg_var")),
    optim.Yogi: Rule(
        yogi,
        adam_scalars,
        ("exp_avg", "exp_avg_sq"),
        initial=lambda o: dict.fromkeys(("exp_avg", "exp_avg_sq"), o.initial_accumulator_value),
    ),
    optim.Adan: Rule(
        adan, adan_scalars, ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"), reads_parameters=True
    ),
    optim.AdEMAMix: Rule(ademamix, ademamix_scalars, ("exp_avg", "exp_avg_slow", "exp_avg_sq")),
    optim.ADOPT: Rule(adopt, adopt_scalars, ("exp_avg", "exp_avg_sq")),
}
