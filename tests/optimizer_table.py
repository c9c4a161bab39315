"""The optimizers under test, one row each: a configuration and an independent float64 or float32 implementation of it.

The oracle is torch where torch has the rule, else a transcription of the paper in NumPy that shares no code with the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optserve import optim

Array = np.ndarray[Any, Any]
Oracle = Callable[[Array, list[Array]], Array]  # initial parameters, gradients -> parameters after the last step


@dataclass(frozen=True)
class Row:
    """A configuration by name, and its oracle."""

    name: str
    optimizer: optim.Optimizer
    oracle: Oracle


def torch_oracle(name: str, **options: Any) -> Oracle:
    """`torch.optim.<name>`, for-loop path, in the dtype of the parameters."""

    def run(parameters: Array, gradients: list[Array]) -> Array:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # NAdam keeps its product of momenta in the default dtype
        try:
            tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
            optimizer = getattr(torch.optim, name)([tensor], foreach=False, **options)
            for gradient in gradients:
                tensor.grad = torch.from_numpy(gradient.copy())
                optimizer.step()
            return tensor.detach().numpy()
        finally:
            torch.set_default_dtype(default)

    return run


def velocity_momentum(p: Array, gradients: list[Array], lr: float, momentum: float, decay: float) -> Array:
    """v = momentum v - lr g; p += v."""
    p, v = p.copy(), np.zeros_like(p)
    for g in gradients:
        v = v * p.dtype.type(momentum) - (g + p * p.dtype.type(decay)) * p.dtype.type(lr)
        p = p + v
    return p


def averaged_momentum(p: Array, gradients: list[Array], lr: float, beta: float, decay: float) -> Array:
    """v = beta v + (1 - beta) g; p -= lr v."""
    p, v = p.copy(), np.zeros_like(p)
    for g in gradients:
        v = p.dtype.type(beta) * v + p.dtype.type(1 - beta) * (g + p * p.dtype.type(decay))
        p = p - v * p.dtype.type(lr)
    return p


def bias_corrected_rmsprop(p: Array, gradients: list[Array], lr: float, beta: float, eps: float, decay: float) -> Array:
    """e = beta e + (1 - beta) g^2; p -= lr g / sqrt(e / (1 - beta^t) + eps)."""
    p, e = p.copy(), np.zeros_like(p)
    kind = p.dtype.type
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + p * kind(decay)
        e = kind(beta) * e + kind(1 - beta) * np.square(g)
        p = p - kind(lr) * g / np.sqrt(e / kind(1 - beta**t) + kind(eps))
    return p


def _rows() -> list[Row]:
    rows = []

    def torch_row(name: str, optimizer: optim.Optimizer, torch_name: str | None = None) -> None:
        oracle = torch_oracle(torch_name or optimizer.rule, **optimizer.hyperparameters)
        rows.append(Row(name, optimizer, oracle))

    for decay in (0.0, 0.05):
        suffix = "-decay" if decay else ""
        wd = {"weight_decay": decay}
        torch_row(f"sgd{suffix}", optim.SGD(lr=0.05, **wd))
        torch_row(f"sgd-maximize{suffix}", optim.SGD(lr=0.05, maximize=True, **wd))
        torch_row(f"momentum{suffix}", optim.Momentum(lr=0.02, **wd), "SGD")
        torch_row(f"momentum-dampening{suffix}", optim.SGD(lr=0.02, momentum=0.8, dampening=0.3, **wd))
        torch_row(f"nesterov{suffix}", optim.Nesterov(lr=0.02, **wd), "SGD")
        torch_row(f"adagrad{suffix}", optim.Adagrad(lr=0.05, **wd))
        torch_row(
            f"adagrad-options{suffix}",
            optim.Adagrad(lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1, **wd),
        )
        for centered in (False, True):
            for momentum in (0.0, 0.9):
                label = f"rmsprop{'-centered' if centered else ''}{'-momentum' if momentum else ''}{suffix}"
                torch_row(label, optim.RMSprop(lr=0.003, centered=centered, momentum=momentum, **wd))
        torch_row(f"adam{suffix}", optim.Adam(lr=0.02, **wd))
        torch_row(f"adam-betas{suffix}", optim.Adam(lr=0.02, betas=(0.7, 0.97), eps=1e-4, maximize=True, **wd))
        torch_row(f"adamw{suffix}", optim.AdamW(lr=0.02, **wd), "Adam")
        torch_row(f"amsgrad{suffix}", optim.AMSGrad(lr=0.02, **wd), "Adam")
        torch_row(f"nadam{suffix}", optim.NAdam(lr=0.02, **wd))
        torch_row(f"nadam-decoupled{suffix}", optim.NAdam(lr=0.02, decoupled_weight_decay=True, **wd))
        rows.append(
            Row(
                f"velocity{suffix}",
                optim.VelocityMomentum(lr=0.02, **wd),
                lambda p, g, decay=decay: velocity_momentum(p, g, 0.02, 0.9, decay),  # type: ignore[misc]
            )
        )
        rows.append(
            Row(
                f"average{suffix}",
                optim.AveragedMomentum(lr=0.05, **wd),
                lambda p, g, decay=decay: averaged_momentum(p, g, 0.05, 0.9, decay),  # type: ignore[misc]
            )
        )
        rows.append(
            Row(
                f"bias-corrected-rmsprop{suffix}",
                optim.BiasCorrectedRMSprop(lr=0.01, **wd),
                lambda p, g, decay=decay: bias_corrected_rmsprop(p, g, 0.01, 0.9, 1e-8, decay),  # type: ignore[misc]
            )
        )
    return rows


ROWS = {row.name: row for row in _rows()}
