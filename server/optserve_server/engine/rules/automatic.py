"""Rules that find a learning rate, its schedule, or the time to change rules by themselves."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

from optserve import optim
from optserve_server.engine.rules.arrays import Array, adam_direction, blend, dot
from optserve_server.engine.rules.rule import Memory, Rule, Rules, Tensor, TensorRule, elements


class ScheduleFreeSGDScalars(NamedTuple):
    lr: float
    weight: float  # of z in the average
    beta: float


def schedule_free_sgd(p: float, g: float, z: float, x: float, h: ScheduleFreeSGDScalars) -> tuple[float, float, float]:
    z = z - h.lr * g
    x = x + h.weight * (z - x)
    return z + h.beta * (x - z), z, x


def schedule_free_sgd_scalars(o: optim.ScheduleFreeSGD, t: int, memory: Memory) -> ScheduleFreeSGDScalars:
    return ScheduleFreeSGDScalars(warmed_up(o, t), average_weight(memory), o.momentum)


class ScheduleFreeAdamWScalars(NamedTuple):
    lr: float
    weight: float
    beta: float
    alpha2: float
    correction2: float
    eps: float
    decay: float  # lr weight_decay


def schedule_free_adamw(
    p: float, g: float, z: float, x: float, v: float, h: ScheduleFreeAdamWScalars
) -> tuple[float, float, float, float]:
    v = v + h.alpha2 * (g * g - v)
    z = z - h.lr * g / (sqrt(v) * h.correction2 + h.eps) - h.decay * p
    x = x + h.weight * (z - x)
    return z + h.beta * (x - z), z, x, v


def schedule_free_adamw_scalars(o: optim.ScheduleFreeAdamW, t: int, memory: Memory) -> ScheduleFreeAdamWScalars:
    (beta1, beta2), lr = o.betas, warmed_up(o, t)
    return ScheduleFreeAdamWScalars(
        lr=lr,
        weight=average_weight(memory),
        beta=beta1,
        alpha2=1.0 - beta2,
        correction2=1.0 / sqrt(1.0 - beta2**t),
        eps=o.eps,
        decay=lr * o.weight_decay,
    )


def schedule_free_weights(o: optim.ScheduleFreeSGD | optim.ScheduleFreeAdamW, t: int, memory: Memory) -> Memory:
    """The largest learning rate so far, the weight of this update, and the sum of weights."""
    largest, _, total = memory
    largest = max(largest, warmed_up(o, t))
    weight = largest**o.weight_lr_power
    return largest, weight, total + weight


def warmed_up(o: optim.ScheduleFreeSGD | optim.ScheduleFreeAdamW, t: int) -> float:
    return o.lr * t / o.warmup_steps if t < o.warmup_steps else o.lr


def average_weight(memory: Memory) -> float:
    """0 as long as the learning rate is."""
    _, weight, total = memory
    return weight / total if total > 0.0 else 0.0


def swats(o: optim.SWATS, tensors: Sequence[Tensor], memory: Array) -> None:
    """`memory` has the number of updates, the average of learning rates, and what `lr` is multiplied by: 0 in Adam's phase."""
    beta1, beta2 = o.betas
    updates, average, factor = memory.tolist()
    if factor > 0.0:
        for tensor in tensors:
            p, b = tensor.parameter, tensor.slots["momentum_buffer"]
            b *= beta1
            b += tensor.gradient
            p -= (1.0 - beta1) * factor * o.lr * b
        return
    updates += 1
    square = product = 0.0
    for tensor in tensors:
        p = tensor.parameter
        correction = sqrt(1.0 - beta2**tensor.t)  # epsilon is beside the uncorrected root
        step = -o.lr * adam_direction(tensor, o.betas, o.eps / correction)
        square += dot(step, step)
        product += dot(step, tensor.gradient)
        p += step
    if product != 0.0:
        implied = square / -product
        average += (1.0 - beta2) * (implied - average)
        settled = average / (1.0 - beta2**updates)
        if updates > 1 and settled > 0.0 and abs(settled - implied) < o.eps:
            factor = settled / o.lr
    memory[:] = updates, average, factor


def prodigy(o: optim.Prodigy, tensors: Sequence[Tensor], memory: Array) -> None:
    """`memory` has the number of updates, the learning rate d, and the numerator of its estimate."""
    (beta1, beta2), beta3 = o.betas, sqrt(o.betas[1]) if o.beta3 is None else o.beta3
    updates, d, numerator = memory.tolist()
    updates += 1
    if updates == 1:
        d = o.d0
    correction = sqrt(1.0 - beta2**updates) / (1.0 - beta1**updates) if o.use_bias_correction else 1.0
    lr = d * o.lr * correction
    numerator *= beta3
    denominator = 0.0
    for tensor in tensors:
        p, g = tensor.parameter, tensor.gradient
        m, v, s = tensor.slots["exp_avg"], tensor.slots["exp_avg_sq"], tensor.slots["s"]
        numerator += d / o.d0 * lr * dot(g, np.subtract(tensor.slots["p0"], p, dtype=np.float64))
        scaled = d * g
        blend(m, 1.0 - beta1, scaled)
        blend(v, 1.0 - beta2, scaled * scaled)
        s *= beta3
        s += d / o.d0 * (d if o.safeguard_warmup else lr) * g
        denominator += float(np.abs(s).sum(dtype=np.float64))
    if denominator > 0.0:
        d = max(d, o.d_coef * numerator / denominator)
    for tensor in tensors:
        p, m, v = tensor.parameter, tensor.slots["exp_avg"], tensor.slots["exp_avg_sq"]
        p -= lr * (m / (np.sqrt(v) + d * o.eps) + o.weight_decay * p)
    memory[:] = updates, d, numerator


SCHEDULE_FREE_MEMORY = {"lr_max": 0.0, "weight": 0.0, "weight_sum": 0.0}

RULES: Rules = {
    optim.ScheduleFreeSGD: Rule(
        schedule_free_sgd,
        schedule_free_sgd_scalars,
        ("z", "x"),
        memory=SCHEDULE_FREE_MEMORY,
        remember=schedule_free_weights,
        copies=("z", "x"),
        evaluation="x",
        reads_parameters=True,
    ),
    optim.ScheduleFreeAdamW: Rule(
        schedule_free_adamw,
        schedule_free_adamw_scalars,
        ("z", "x", "exp_avg_sq"),
        memory=SCHEDULE_FREE_MEMORY,
        remember=schedule_free_weights,
        copies=("z", "x"),
        evaluation="x",
        reads_parameters=True,
    ),
    optim.SWATS: TensorRule(
        swats,
        {"exp_avg": elements, "exp_avg_sq": elements, "momentum_buffer": elements},
        memory={"updates": 0.0, "average": 0.0, "factor": 0.0},
    ),
    optim.Prodigy: TensorRule(
        prodigy,
        {"exp_avg": elements, "exp_avg_sq": elements, "s": elements, "p0": elements},
        memory={"updates": 0.0, "d": 0.0, "numerator": 0.0},
        copies=("p0",),
    ),
}
