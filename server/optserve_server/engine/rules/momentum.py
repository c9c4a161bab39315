"""Gradient descent, its momenta, and rules that take a sign only."""

from math import copysign
from typing import NamedTuple

from optserve import optim
from optserve_server.engine.rules.rule import Memory, Rule, Rules


class GradientDescentScalars(NamedTuple):
    lr: float


def gradient_descent(p: float, g: float, h: GradientDescentScalars) -> float:
    return p - h.lr * g


def gradient_descent_scalars(o: optim.Optimizer, t: int, memory: Memory) -> GradientDescentScalars:
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


def velocity_nesterov(p: float, g: float, v: float, h: VelocityScalars) -> tuple[float, float]:
    v = h.momentum * v - h.lr * g
    return p + h.momentum * v - h.lr * g, v


def velocity_scalars(o: optim.VelocityMomentum | optim.SGD, t: int, memory: Memory) -> VelocityScalars:
    return VelocityScalars(o.lr, o.momentum)


class AverageScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - beta


def averaged_momentum(p: float, g: float, v: float, h: AverageScalars) -> tuple[float, float]:
    v = v + h.alpha * (g - v)
    return p - h.lr * v, v


def average_scalars(o: optim.AveragedMomentum, t: int, memory: Memory) -> AverageScalars:
    return AverageScalars(o.lr, 1.0 - o.beta)


class AveragedScalars(NamedTuple):
    decay: float  # 1 - lambd eta
    eta: float
    mu: float


def averaged_descent(p: float, g: float, average: float, h: AveragedScalars) -> tuple[float, float]:
    p = h.decay * p - h.eta * g
    return p, average + h.mu * (p - average)


def averaged_descent_memory(o: optim.ASGD, t: int, memory: Memory) -> Memory:
    """eta and mu of this update, then those of the next, which come from this one's learning rate, as in torch."""
    eta, mu = memory[2:] if t > 1 else (o.lr, 1.0)
    return eta, mu, o.lr / (1.0 + o.lambd * o.lr * t) ** o.alpha, 1.0 / max(1.0, t - o.t0)


def averaged_descent_scalars(o: optim.ASGD, t: int, memory: Memory) -> AveragedScalars:
    eta, mu, _, _ = memory
    return AveragedScalars(1.0 - o.lambd * eta, eta, mu)


def sign_descent(p: float, g: float, h: GradientDescentScalars) -> float:
    return p if g == 0 else p - copysign(h.lr, g)


class SignumScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - beta


def signum(p: float, g: float, m: float, h: SignumScalars) -> tuple[float, float]:
    m = m + h.alpha * (g - m)
    return (p if m == 0 else p - copysign(h.lr, m)), m


def signum_scalars(o: optim.Signum, t: int, memory: Memory) -> SignumScalars:
    return SignumScalars(o.lr, 1.0 - o.beta)


class LionScalars(NamedTuple):
    lr: float
    alpha1: float  # 1 - beta1
    alpha2: float  # 1 - beta2


def lion(p: float, g: float, m: float, h: LionScalars) -> tuple[float, float]:
    u = m + h.alpha1 * (g - m)
    return (p if u == 0 else p - copysign(h.lr, u)), m + h.alpha2 * (g - m)


def lion_scalars(o: optim.Lion, t: int, memory: Memory) -> LionScalars:
    return LionScalars(o.lr, 1.0 - o.betas[0], 1.0 - o.betas[1])


GRADIENT_DESCENT = Rule(gradient_descent, gradient_descent_scalars, lazy=True)
MOMENTUM = Rule(momentum, momentum_scalars, ("momentum_buffer",))
NESTEROV = Rule(nesterov, momentum_scalars, ("momentum_buffer",))
VELOCITY_MOMENTUM = Rule(velocity_momentum, velocity_scalars, ("velocity",))
VELOCITY_NESTEROV = Rule(velocity_nesterov, velocity_scalars, ("velocity",))


def sgd(o: optim.SGD) -> Rule:
    """By momentum, look-ahead and convention."""
    if o.momentum == 0.0:
        return GRADIENT_DESCENT
    if o.convention == "keras":
        return VELOCITY_NESTEROV if o.nesterov else VELOCITY_MOMENTUM
    return NESTEROV if o.nesterov else MOMENTUM


RULES: Rules = {
    optim.SGD: sgd,
    optim.VelocityMomentum: VELOCITY_MOMENTUM,
    optim.AveragedMomentum: Rule(averaged_momentum, average_scalars, ("exp_avg",)),
    optim.ASGD: Rule(
        averaged_descent,
        averaged_descent_scalars,
        ("ax",),
        memory={"eta": 0.0, "mu": 0.0, "next_eta": 0.0, "next_mu": 0.0},
        remember=averaged_descent_memory,
        copies=("ax",),
        evaluation="ax",
        reads_parameters=True,
    ),
    optim.SignSGD: Rule(sign_descent, gradient_descent_scalars, lazy=True),
    optim.Signum: Rule(signum, signum_scalars, ("exp_avg",)),
    optim.Lion: Rule(lion, lion_scalars, ("exp_avg",)),
}
