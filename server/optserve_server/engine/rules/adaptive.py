"""A learning rate for every element, from the gradients that it has seen."""

from math import copysign, sqrt
from typing import NamedTuple

from optserve import optim
from optserve_server.engine.rules.rule import Memory, Rule, Rules


class AdagradScalars(NamedTuple):
    lr: float
    eps: float


def adagrad(p: float, g: float, s: float, h: AdagradScalars) -> tuple[float, float]:
    s = s + g * g
    return p - h.lr * g / (sqrt(s) + h.eps), s


def adagrad_inside(p: float, g: float, s: float, h: AdagradScalars) -> tuple[float, float]:
    s = s + g * g
    return p - h.lr * g / sqrt(s + h.eps), s


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


def rmsprop_inside(p: float, g: float, v: float, h: RMSpropScalars) -> tuple[float, float]:
    v = v + h.alpha * (g * g - v)
    return p - h.lr * g / sqrt(v + h.eps), v


def rmsprop_inside_centered(p: float, g: float, v: float, a: float, h: RMSpropScalars) -> tuple[float, float, float]:
    v = v + h.alpha * (g * g - v)
    a = a + h.alpha * (g - a)
    return p - h.lr * g / sqrt(v - a * a + h.eps), v, a


def rmsprop_inside_momentum(p: float, g: float, v: float, b: float, h: RMSpropScalars) -> tuple[float, float, float]:
    v = v + h.alpha * (g * g - v)
    b = h.momentum * b + h.lr * g / sqrt(v + h.eps)
    return p - b, v, b


def rmsprop_inside_centered_momentum(
    p: float, g: float, v: float, a: float, b: float, h: RMSpropScalars
) -> tuple[float, float, float, float]:
    v = v + h.alpha * (g * g - v)
    a = a + h.alpha * (g - a)
    b = h.momentum * b + h.lr * g / sqrt(v - a * a + h.eps)
    return p - b, v, a, b


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


class AdadeltaScalars(NamedTuple):
    lr: float
    alpha: float  # 1 - rho
    eps: float


def adadelta(p: float, g: float, v: float, u: float, h: AdadeltaScalars) -> tuple[float, float, float]:
    v = v + h.alpha * (g * g - v)
    d = sqrt(u + h.eps) / sqrt(v + h.eps) * g
    return p - h.lr * d, v, u + h.alpha * (d * d - u)


def adadelta_scalars(o: optim.Adadelta, t: int, memory: Memory) -> AdadeltaScalars:
    return AdadeltaScalars(o.lr, 1.0 - o.rho, o.eps)


class RpropScalars(NamedTuple):
    shrink: float
    same: float  # 1
    grow: float
    smallest: float
    largest: float
    nothing: float  # 0


def rprop(p: float, g: float, before: float, step: float, h: RpropScalars) -> tuple[float, float, float]:
    agreement = g * before
    factor = h.grow if agreement > 0 else (h.shrink if agreement < 0 else h.same)
    step = min(max(step * factor, h.smallest), h.largest)
    g = h.nothing if agreement < 0 else g
    return (p if g == 0 else p - copysign(step, g)), g, step


def rprop_scalars(o: optim.Rprop, t: int, memory: Memory) -> RpropScalars:
    return RpropScalars(o.etas[0], 1.0, o.etas[1], *o.step_sizes, 0.0)


class FtrlScalars(NamedTuple):
    inverse_lr: float  # 1 / lr
    l1: float
    l2: float  # 2 l2 + beta / lr
    shrinkage: float  # 2 l2 of the gradient
    nothing: float  # 0


def ftrl(p: float, g: float, n: float, z: float, h: FtrlScalars) -> tuple[float, float, float]:
    root = sqrt(n)
    n = n + g * g
    after = sqrt(n)
    z = z + (g + h.shrinkage * p) - (after - root) * h.inverse_lr * p
    excess = h.nothing if abs(z) <= h.l1 else z - copysign(h.l1, z)
    return -excess / (after * h.inverse_lr + h.l2), n, z


def ftrl_scalars(o: optim.FTRL, t: int, memory: Memory) -> FtrlScalars:
    return FtrlScalars(
        inverse_lr=1.0 / o.lr,
        l1=o.l1_regularization_strength,
        l2=2.0 * o.l2_regularization_strength + o.beta / o.lr,
        shrinkage=2.0 * o.l2_shrinkage_regularization_strength,
        nothing=0.0,
    )


ADAGRAD, ADAGRAD_INSIDE = (
    Rule(function, adagrad_scalars, ("sum",), initial=lambda o: {"sum": o.initial_accumulator_value}, lazy=True)
    for function in (adagrad, adagrad_inside)
)

# By whether epsilon is inside the root, centring and momentum.
RMSPROPS = {
    (False, False, False): Rule(rmsprop, rmsprop_scalars, ("square_avg",)),
    (False, False, True): Rule(rmsprop_momentum, rmsprop_scalars, ("square_avg", "momentum_buffer")),
    (False, True, False): Rule(rmsprop_centered, rmsprop_scalars, ("square_avg", "grad_avg")),
    (False, True, True): Rule(
        rmsprop_centered_momentum, rmsprop_scalars, ("square_avg", "grad_avg", "momentum_buffer")
    ),
    (True, False, False): Rule(rmsprop_inside, rmsprop_scalars, ("square_avg",)),
    (True, False, True): Rule(rmsprop_inside_momentum, rmsprop_scalars, ("square_avg", "momentum_buffer")),
    (True, True, False): Rule(rmsprop_inside_centered, rmsprop_scalars, ("square_avg", "grad_avg")),
    (True, True, True): Rule(
        rmsprop_inside_centered_momentum, rmsprop_scalars, ("square_avg", "grad_avg", "momentum_buffer")
    ),
}

RULES: Rules = {
    optim.Adagrad: lambda o: ADAGRAD if o.convention == "torch" else ADAGRAD_INSIDE,
    optim.Adadelta: Rule(adadelta, adadelta_scalars, ("square_avg", "acc_delta")),
    optim.RMSprop: lambda o: RMSPROPS[o.convention != "torch", o.centered, o.momentum > 0.0],
    optim.BiasCorrectedRMSprop: Rule(bias_corrected_rmsprop, bias_corrected_rmsprop_scalars, ("square_avg",)),
    optim.Rprop: Rule(rprop, rprop_scalars, ("prev", "step_size"), initial=lambda o: {"step_size": o.lr}),
    optim.FTRL: Rule(
        ftrl,
        ftrl_scalars,
        ("accumulator", "linear"),
        initial=lambda o: {"accumulator": o.initial_accumulator_value},
        lazy=True,
        reads_parameters=True,
    ),
}
