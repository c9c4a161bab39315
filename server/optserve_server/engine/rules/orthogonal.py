"""Steps that are orthogonal matrices."""

from collections.abc import Sequence
from math import sqrt

from optserve import optim
from optserve._specification import TensorSpec
from optserve_server.engine.rules.arrays import Array, adam_direction, blend, norm
from optserve_server.engine.rules.rule import NOTHING, Rules, Tensor, TensorRule


def of_matrices(tensor: TensorSpec) -> tuple[int, ...]:
    return tensor.shape if len(tensor.shape) == 2 else NOTHING


def of_others(tensor: TensorSpec) -> tuple[int, ...]:
    return NOTHING if len(tensor.shape) == 2 else tensor.shape


def muon(o: optim.Muon, tensors: Sequence[Tensor], memory: Array) -> None:
    for tensor in tensors:
        p, g = tensor.parameter, tensor.gradient
        if p.ndim != 2:
            p -= o.adamw_lr * (adam_direction(tensor, o.adamw_betas, o.adamw_eps) + o.adamw_weight_decay * p)
            continue
        b = tensor.slots["momentum_buffer"]
        blend(b, 1.0 - o.momentum, g)
        ahead = b + (1.0 - o.momentum) * (g - b) if o.nesterov else b
        p -= o.lr * (scale(o, *p.shape) * orthogonalized(o, ahead) + o.weight_decay * p)


def orthogonalized(o: optim.Muon, u: Array) -> Array:
    """The matrix with its singular values brought near 1, by the iteration of Newton and Schulz."""
    a, b, c = o.ns_coefficients
    tall = u.shape[0] > u.shape[1]
    x = (u.T if tall else u) / max(norm(u), o.eps)
    for _ in range(o.ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def scale(o: optim.Muon, rows: int, columns: int) -> float:
    """What makes steps of matrices of all shapes alike."""
    return 0.2 * sqrt(max(rows, columns)) if o.adjust_lr_fn == "match_rms_adamw" else sqrt(max(1.0, rows / columns))


RULES: Rules = {
    optim.Muon: TensorRule(muon, {"momentum_buffer": of_matrices, "exp_avg": of_others, "exp_avg_sq": of_others})
}
