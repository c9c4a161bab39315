"""The update rules, one scalar function each, in order of complexity.

A rule sees one element: parameter `p`, gradient `g`, its slots, and `h`, the scalars of this update. It returns the
new parameter and the new slots. `loops` compiles it into a loop over arenas. What depends on the step count is computed
once per update, in float64, by the rule's `scalars` function; so are complements such as 1 - beta. A number written
inside a rule would promote a float32 loop to float64. The mathematics, variants and references are in `optserve.optim`.

Averages are written as `m + (1 - beta) * (g - m)`: in float32 that loses less than `beta * m + (1 - beta) * g`,
because 1 - beta is small and its rounding only touches the increment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, NamedTuple

from optserve import optim

Memory = tuple[float, ...]


def _nothing(optimizer: Any, t: int, memory: Memory) -> Memory:
    return memory


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule: its function, its slots (values per element), its memory (values per tensor) and its scalars.

    `scalars(optimizer, t, memory)` gives `h` for a tensor's update number t = 1, 2, ...; `remember(optimizer, t,
    memory)` gives the memory that update t sees. Slots start at `initial(optimizer)`, or at zero.
    """

    function: Callable[..., Any]
    scalars: Callable[[Any, int, Memory], NamedTuple]
    slots: tuple[str, ...] = ()
    memory: Mapping[str, float] = field(default_factory=dict)
    remember: Callable[[Any, int, Memory], Memory] = _nothing
    initial: Callable[[Any], Mapping[str, float]] = lambda optimizer: {}


class Preparation(NamedTuple):
    """What happens before every rule: `g = scale * g + l2 * p`, then `p = decay * p`."""

    scale: float
    l2: float
    decay: float


def preparation(optimizer: Any) -> Preparation:
    """Sign and weight decay of an optimizer; the learning rate enters decoupled decay."""
    decoupled = getattr(optimizer, "decoupled_weight_decay", False)
    return Preparation(
        scale=-1.0 if optimizer.maximize else 1.0,
        l2=0.0 if decoupled else optimizer.weight_decay,
        decay=1.0 - optimizer.lr * optimizer.weight_decay if decoupled else 1.0,
    )


# Gradient descent and its momenta


class GradientDescentScalars(NamedTuple):
    lr: float


def gradient_descent(p: float, g: float, h: GradientDescentScalars) -> float:
    return p - h.lr * g


def gradient_descent_scalars(o: optim.SGD, t: int, memory: Memory) -> GradientDescentScalars:
    return GradientDescentScalars(o.lr)


class MomentumScalars(NamedTuple):
    lr: float
    momentum: float
    keep: float  # 1 - dampening


def momentum(p: float, g: float, b: float, h: MomentumScalars) -> tuple[float, float]:
    b = h.momentum * b + h.keep * g
    return p - h.lr * b, b


def nesterov(p: float, g: float, b: float, h: MomentumScalars) -> tuple[float, float]:
    b = h.momentum * b + h.keep * g
    return p - h.lr * (g + h.momentum * b), b


def momentum_scalars(o: optim.SGD, t: int, memory: Memory) -> MomentumScalars:
    return MomentumScalars(o.lr, o.momentum, 1.0 - o.dampening if t > 1 else 1.0)


class VelocityScalars(NamedTuple):
    lr: float
    momentum: float


def velocity_momentum(p: float, g: float, v: float, h: VelocityScalars) -> tuple[float, float]:
    v = h.momentum * v - h.lr * g
    return p + v, v


def velocity_scalars(o: optim.VelocityMomentum, t: int, memory: Memory) -> VelocityScalars:
    return VelocityScalars(o.lr, o.momentum)


class AverageScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - beta


def averaged_momentum(p: float, g: float, v: float, h: AverageScalars) -> tuple[float, float]:
    v = v + h.alpha * (g - v)
    return p - h.lr * v, v


def average_scalars(o: optim.AveragedMomentum, t: int, memory: Memory) -> AverageScalars:
    return AverageScalars(o.lr, 1.0 - o.beta)


# A learning rate for every element


class AdagradScalars(NamedTuple):
    lr: float
    eps: float


def adagrad(p: float, g: float, s: float, h: AdagradScalars) -> tuple[float, float]:
    s = s + g * g
    return p - h.lr * g / (sqrt(s) + h.eps), s


def adagrad_scalars(o: optim.Adagrad, t: int, memory: Memory) -> AdagradScalars:
    return AdagradScalars(o.lr / (1.0 + (t - 1) * o.lr_decay), o.eps)


class RMSpropScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - alpha of the paper
    eps: float
    momentum: float


def rmsprop(p: float, g: float, v: float, h: RMSpropScalars) -> tuple[float, float]:
    v = v + h.alpha * (g * g - v)
    return p - h.lr * g / (sqrt(v) + h.eps), v


def rmsprop_centered(p: float, g: float, v: float, a: float, h: RMSpropScalars) -> tuple[float, float, float]:
    v = v + h.alpha * (g * g - v)
    a = a + h.alpha * (g - a)
    return p - h.lr * g / (sqrt(v - a * a) + h.eps), v, a


def rmsprop_momentum(p: float, g: float, v: float, b: float, h: RMSpropScalars) -> tuple[float, float, float]:
    v = v + h.alpha * (g * g - v)
    b = h.momentum * b + g / (sqrt(v) + h.eps)
    return p - h.lr * b, v, b


def rmsprop_centered_momentum(
    p: float, g: float, v: float, a: float, b: float, h: RMSpropScalars
) -> tuple[float, float, float, float]:
    v = v + h.alpha * (g * g - v)
    a = a + h.alpha * (g - a)
    b = h.momentum * b + g / (sqrt(v - a * a) + h.eps)
    return p - h.lr * b, v, a, b


def rmsprop_scalars(o: optim.RMSprop, t: int, memory: Memory) -> RMSpropScalars:
    return RMSpropScalars(o.lr, 1.0 - o.alpha, o.eps, o.momentum)


class BiasCorrectedRMSpropScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - beta
    correction: float  # 1 / (1 - beta^t)
    eps: float


def bias_corrected_rmsprop(p: float, g: float, e: float, h: BiasCorrectedRMSpropScalars) -> tuple[float, float]:
    e = e + h.alpha * (g * g - e)
    return p - h.lr * g / sqrt(e * h.correction + h.eps), e


def bias_corrected_rmsprop_scalars(
    o: optim.BiasCorrectedRMSprop, t: int, memory: Memory
) -> BiasCorrectedRMSpropScalars:
    return BiasCorrectedRMSpropScalars(o.lr, 1.0 - o.beta, 1.0 / (1.0 - o.beta**t), o.eps)


# Adaptive moments


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


def adam_scalars(o: optim.Adam, t: int, memory: Memory) -> AdamScalars:
    beta1, beta2 = o.betas
    return AdamScalars(
        lr=o.lr / (1.0 - beta1**t),
        alpha1=1.0 - beta1,
        alpha2=1.0 - beta2,
        correction2=1.0 / sqrt(1.0 - beta2**t),
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


GRADIENT_DESCENT = Rule(gradient_descent, gradient_descent_scalars)
MOMENTUM = Rule(momentum, momentum_scalars, ("momentum_buffer",))
NESTEROV = Rule(nesterov, momentum_scalars, ("momentum_buffer",))
VELOCITY_MOMENTUM = Rule(velocity_momentum, velocity_scalars, ("velocity",))
AVERAGED_MOMENTUM = Rule(averaged_momentum, average_scalars, ("exp_avg",))
ADAGRAD = Rule(adagrad, adagrad_scalars, ("sum",), initial=lambda o: {"sum": o.initial_accumulator_value})
RMSPROP = Rule(rmsprop, rmsprop_scalars, ("square_avg",))
RMSPROP_CENTERED = Rule(rmsprop_centered, rmsprop_scalars, ("square_avg", "grad_avg"))
RMSPROP_MOMENTUM = Rule(rmsprop_momentum, rmsprop_scalars, ("square_avg", "momentum_buffer"))
RMSPROP_CENTERED_MOMENTUM = Rule(
    rmsprop_centered_momentum, rmsprop_scalars, ("square_avg", "grad_avg", "momentum_buffer")
)
BIAS_CORRECTED_RMSPROP = Rule(bias_corrected_rmsprop, bias_corrected_rmsprop_scalars, ("square_avg",))
ADAM = Rule(adam, adam_scalars, ("exp_avg", "exp_avg_sq"))
AMSGRAD = Rule(amsgrad, adam_scalars, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
NADAM = Rule(nadam, nadam_scalars, ("exp_avg", "exp_avg_sq"), memory={"mu_product": 1.0}, remember=nadam_product)


def rule_for(optimizer: optim.Optimizer) -> Rule:
    """The rule that an optimizer's flags choose; every optimizer of the catalogue has one."""
    match optimizer:
        case optim.SGD():
            if optimizer.momentum == 0.0:
                return GRADIENT_DESCENT
            return NESTEROV if optimizer.nesterov else MOMENTUM
        case optim.VelocityMomentum():
            return VELOCITY_MOMENTUM
        case optim.AveragedMomentum():
            return AVERAGED_MOMENTUM
        case optim.Adagrad():
            return ADAGRAD
        case optim.RMSprop():
            if optimizer.centered:
                return RMSPROP_CENTERED_MOMENTUM if optimizer.momentum else RMSPROP_CENTERED
            return RMSPROP_MOMENTUM if optimizer.momentum else RMSPROP
        case optim.BiasCorrectedRMSprop():
            return BIAS_CORRECTED_RMSPROP
        case optim.Adam():
            return AMSGRAD if optimizer.amsgrad else ADAM
        case optim.NAdam():
            return NADAM
    raise TypeError(f"no rule for {type(optimizer).__name__}")
