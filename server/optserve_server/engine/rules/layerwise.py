"""A step for every tensor whose length follows the tensor's own, for large batches."""

from collections.abc import Sequence
from math import sqrt

from optserve import optim
from optserve_server.engine.rules.arrays import Array, adam_direction, dot, norm
from optserve_server.engine.rules.rule import Rules, Tensor, TensorRule, elements, single


def trust_ratio(p: Array, step: Array, coefficient: float = 1.0, eps: float = 0.0) -> float:
    """What makes a step as long as its tensor; 1 if that is no length."""
    ours, theirs = norm(p), norm(step)
    return coefficient * ours / (theirs + eps) if ours > 0.0 and theirs > 0.0 else 1.0


def lars(o: optim.LARS, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p, b = tensor.parameter, tensor.slots["momentum_buffer"]
        step = o.lr * trust_ratio(p, tensor.gradient, o.trust_coefficient, o.eps) * tensor.gradient
        b *= o.momentum
        b += step
        p -= step + o.momentum * b if o.nesterov else b


def novograd(o: optim.NovoGrad, tensors: Sequence[Tensor], memory: Array) -> None:
    beta1, beta2 = o.betas
    for tensor in tensors:
        p, g, m, v = tensor.parameter, tensor.gradient, tensor.slots["exp_avg"], tensor.slots["exp_avg_sq"]
        square = dot(g, g)
        v[...] = square if tensor.t == 1 else v + (1.0 - beta2) * (square - v)
        m *= beta1
        m += g / (sqrt(v) + o.eps) + o.weight_decay * p
        p -= o.lr * m


def lamb(o: optim.LAMB, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p = tensor.parameter
        step = adam_direction(tensor, o.betas, o.eps) + o.weight_decay * p
        p -= o.lr * trust_ratio(p, step) * step


def lamb_without_decay(o: optim.LAMB, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p = tensor.parameter
        step = adam_direction(tensor, o.betas, o.eps)
        p -= o.lr * trust_ratio(p, step) * step


LAMB, LAMB_WITHOUT_DECAY = (
    TensorRule(update, {"exp_avg": elements, "exp_avg_sq": elements}) for update in (lamb, lamb_without_decay)
)

RULES: Rules = {
    optim.LARS: TensorRule(lars, {"momentum_buffer": elements}),
    optim.NovoGrad: TensorRule(novograd, {"exp_avg": elements, "exp_avg_sq": single}),
    optim.LAMB: lambda o: LAMB_WITHOUT_DECAY if o.convention == "keras" else LAMB,
}
