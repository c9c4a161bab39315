"""The optimizers under test, one row each: a configuration and an independent implementation of it.

The oracle is torch where torch has the rule, optax or Keras where they have it as the paper does, else a transcription of the
paper in NumPy, which shares no code with the engine and calculates in the dtype of the parameters.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import keras
import numpy as np
import optax
import torch

from optserve import optim

Array = np.ndarray[Any, Any]

jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")  # what learning rates are kept in


@dataclass(frozen=True)
class Step:
    """What is pushed: a gradient, or None where the tensor is absent; and the learning rate from then on."""

    gradient: Array | None
    lr: float


Oracle = Callable[[Array, Sequence[Step]], Array]  # initial parameters, steps -> parameters after the last


@dataclass(frozen=True)
class Row:
    """A configuration by name, and its oracle.

    `live` says whether its learning rate may change; `chaotic` why a few elements may end far from float64 in float32.
    """

    name: str
    optimizer: optim.Optimizer
    oracle: Oracle
    live: bool = True
    chaotic: str = ""


@contextmanager
def torch_in_float64() -> Iterator[None]:
    """Let torch keep in float64 what it knows of a tensor, such as NAdam's product of momenta: it takes the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def torch_oracle(name: str, optimizer: optim.Optimizer) -> Oracle:
    """`torch.optim.<name>`, for-loop path, in the dtype of the parameters."""

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        with torch_in_float64():
            tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
            options = {key: value for key, value in optimizer.hyperparameters.items() if key != "convention"}
            theirs = getattr(torch.optim, name)([tensor], foreach=False, **options)
            for step in steps:
                theirs.param_groups[0]["lr"] = step.lr
                tensor.grad = None if step.gradient is None else torch.from_numpy(step.gradient.copy())
                theirs.step()
            return tensor.detach().numpy()

    return run


def optax_oracle(build: Callable[..., Any], optimizer: optim.Optimizer, **options: Any) -> Oracle:
    """An optax optimizer, in the dtype of the parameters. L2 decay and maximization are added in front of it."""
    decay = getattr(optimizer, "weight_decay", 0.0)
    if getattr(optimizer, "decoupled_weight_decay", False):
        options["weight_decay"], decay = decay, 0.0

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        theirs = optax.inject_hyperparams(lambda learning_rate: build(learning_rate, **options))(steps[0].lr)
        params = jax.numpy.asarray(parameters)
        state = theirs.init(params)
        update = jax.jit(theirs.update)
        for step in steps:
            if step.gradient is None:
                continue
            state.hyperparams["learning_rate"] = jax.numpy.asarray(step.lr, parameters.dtype)
            gradient = (-step.gradient if optimizer.maximize else step.gradient) + decay * params  # type: ignore[attr-defined]
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params)

    return run


def keras_oracle(name: str, optimizer: optim.Optimizer, **options: Any) -> Oracle:
    """`keras.optimizers.<name>`, on JAX, in the dtype of the parameters; its decay is decoupled."""
    options["weight_decay"] = getattr(optimizer, "weight_decay", 0.0) or None

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        theirs = getattr(keras.optimizers, name)(learning_rate=steps[0].lr, **options)
        variable = keras.Variable(parameters, dtype=parameters.dtype.name)
        theirs.build([variable])
        for step in steps:
            if step.gradient is not None:
                theirs.learning_rate = step.lr
                theirs.apply([keras.ops.convert_to_tensor(step.gradient)], [variable])
        return np.asarray(variable)

    return run


Transcription = Callable[[Any, Array, Array, dict[str, Array], int, float], Array]  # (o, p, g, state, t, lr) -> p


def paper_oracle(transcription: Transcription, optimizer: optim.Optimizer) -> Oracle:
    """A transcription of a paper, weight decay included: its state starts at zero."""

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        p, t = parameters.copy(), 0
        state: dict[str, Array] = defaultdict(lambda: np.zeros_like(parameters))
        for step in steps:
            if step.gradient is not None:
                t += 1
                p = transcription(optimizer, p, step.gradient, state, t, step.lr)
                assert p.dtype == parameters.dtype
        return p

    return run


def l2(o: Any, p: Array, g: Array) -> Array:
    """The gradient with weight decay."""
    return g + o.weight_decay * p


def decayed(o: Any, p: Array, g: Array, lr: float) -> tuple[Array, Array]:
    """Parameters and gradient with weight decay, decoupled or L2."""
    return (p * (1 - lr * o.weight_decay), g) if o.decoupled_weight_decay else (p, l2(o, p, g))


def velocity_momentum(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    s["v"] = o.momentum * s["v"] - lr * l2(o, p, g)
    return p + s["v"]


def averaged_momentum(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    s["v"] = o.beta * s["v"] + (1 - o.beta) * l2(o, p, g)
    return p - lr * s["v"]


def bias_corrected_rmsprop(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    g = l2(o, p, g)
    s["e"] = o.beta * s["e"] + (1 - o.beta) * g**2
    return p - lr * g / np.sqrt(s["e"] / (1 - o.beta**t) + o.eps)


def ftrl(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """As in keras.optimizers.Ftrl, with its learning_rate_power of -0.5."""
    n = s["n"] if t > 1 else np.full_like(p, o.initial_accumulator_value)
    shrunk = g + 2 * o.l2_shrinkage_regularization_strength * p
    s["n"] = n + g**2
    s["z"] = s["z"] + shrunk - (np.sqrt(s["n"]) - np.sqrt(n)) / lr * p
    quadratic = np.sqrt(s["n"]) / lr + 2 * (o.l2_regularization_strength + o.beta / (2 * lr))
    return (np.clip(s["z"], -o.l1_regularization_strength, o.l1_regularization_strength) - s["z"]) / quadratic


def adabelief(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 2 of the paper, whose epsilon is added to s."""
    beta1, beta2 = o.betas
    p, g = decayed(o, p, g, lr)
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["s"] = beta2 * s["s"] + (1 - beta2) * (g - s["m"]) ** 2 + o.eps_root
    return p - lr * (s["m"] / (1 - beta1**t)) / (np.sqrt(s["s"] / (1 - beta2**t)) + o.eps)


def adan(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 1 of the paper, its betas as decays, with bias correction as in the authors' code."""
    beta1, beta2, beta3 = o.betas
    change = g - s["g"] if t > 1 else np.zeros_like(g)
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["d"] = beta2 * s["d"] + (1 - beta2) * change
    s["n"] = beta3 * s["n"] + (1 - beta3) * (g + beta2 * change) ** 2
    s["g"] = g
    ahead = s["m"] / (1 - beta1**t) + beta2 * s["d"] / (1 - beta2**t)
    return (p - lr * ahead / (np.sqrt(s["n"] / (1 - beta3**t)) + o.eps)) / (1 + lr * o.weight_decay)


def ademamix(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 1 of the paper with its schedules of alpha and beta3."""
    beta1, beta2, beta3 = o.betas
    part = min(1.0, t / o.warm_up) if o.warm_up else 1.0
    if part < 1 and beta1 > 0:  # which has a half-life
        beta3 = min(
            beta3, math.exp(math.log(beta1) * math.log(beta3) / ((1 - part) * math.log(beta3) + part * math.log(beta1)))
        )
    s["m1"] = beta1 * s["m1"] + (1 - beta1) * g
    s["m2"] = beta3 * s["m2"] + (1 - beta3) * g
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
    mixed = s["m1"] / (1 - beta1**t) + part * o.alpha * s["m2"]
    return p - lr * (mixed / (np.sqrt(s["v"] / (1 - beta2**t)) + o.eps) + o.weight_decay * p)


def adopt(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 2 of the paper, with the clipping of its section on stability."""
    beta1, beta2 = o.betas
    p, g = decayed(o, p, g, lr)
    if t == 1:
        s["v"] = g**2
        return p
    normalized = g / np.maximum(np.sqrt(s["v"]), o.eps)
    s["m"] = beta1 * s["m"] + (1 - beta1) * np.clip(normalized, -((t - 1) ** 0.25), (t - 1) ** 0.25)
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
    return p - lr * s["m"]


ROOTS = "where gradients are small, it takes the difference of nearly equal roots, and forgets what parameters were"
VARIANCE = "where a gradient hardly changes, its variance is the difference of nearly equal numbers"
SIGN = "it takes the sign of what may be nearly zero"


def _of_torch(name: str, optimizer: optim.Optimizer, torch_name: str | None = None, *, live: bool = True) -> Row:
    return Row(name, optimizer, torch_oracle(torch_name or optimizer.rule, optimizer), live)


def _of_optax(
    name: str, optimizer: optim.Optimizer, build: Callable[..., Any], *, chaotic: str = "", **options: Any
) -> Row:
    return Row(name, optimizer, optax_oracle(build, optimizer, **options), chaotic=chaotic)


def _of_keras(name: str, optimizer: optim.Optimizer, keras_name: str, **options: Any) -> Row:
    return Row(name, optimizer, keras_oracle(keras_name, optimizer, **options))


def _of_paper(name: str, optimizer: optim.Optimizer, transcription: Transcription, *, chaotic: str = "") -> Row:
    return Row(name, optimizer, paper_oracle(transcription, optimizer), chaotic=chaotic)


def _rows() -> Iterator[Row]:
    yield _of_torch("rprop", optim.Rprop(lr=0.01), live=False)
    yield _of_torch(
        "rprop-options", optim.Rprop(lr=0.02, etas=(0.4, 1.3), step_sizes=(1e-3, 0.05), maximize=True), live=False
    )
    yield _of_paper("ftrl", optim.FTRL(lr=0.05), ftrl, chaotic=ROOTS)
    options = {"beta": 0.3, "initial_accumulator_value": 0.2, "l2_regularization_strength": 0.02}
    yield _of_paper(
        "ftrl-options",
        optim.FTRL(lr=0.05, l1_regularization_strength=0.01, l2_shrinkage_regularization_strength=0.03, **options),
        ftrl,
    )
    yield _of_paper("ademamix-warm-up", optim.AdEMAMix(lr=0.02, warm_up=60.5, alpha=3.0), ademamix)
    yield _of_paper("ademamix-no-momentum", optim.AdEMAMix(lr=0.02, betas=(0.0, 0.99, 0.999), warm_up=60.5), ademamix)
    for decay in (0.0, 0.05):
        for row in itertools.chain(_rows_with(decay), _rows_of_optax(decay), _rows_of_keras(decay)):
            yield replace(row, name=f"{row.name}-decay") if decay else row


def _rows_with(decay: float) -> Iterator[Row]:
    wd = {"weight_decay": decay}
    yield _of_torch("sgd", optim.SGD(lr=0.05, **wd))
    yield _of_torch("sgd-maximize", optim.SGD(lr=0.05, maximize=True, **wd))
    yield _of_torch("momentum", optim.Momentum(lr=0.02, **wd), "SGD")
    yield _of_torch("momentum-dampening", optim.SGD(lr=0.02, momentum=0.8, dampening=0.3, **wd))
    yield _of_torch("nesterov", optim.Nesterov(lr=0.02, **wd), "SGD")
    yield _of_paper("velocity", optim.VelocityMomentum(lr=0.02, **wd), velocity_momentum)
    yield _of_paper("average", optim.AveragedMomentum(lr=0.05, **wd), averaged_momentum)
    yield _of_torch("asgd", optim.ASGD(lr=0.05, **wd))
    yield _of_torch("asgd-options", optim.ASGD(lr=0.05, lambd=0.01, alpha=0.6, t0=20.0, **wd))
    yield _of_optax("sign", optim.SignSGD(lr=0.01, **wd), optax.sign_sgd, chaotic=SIGN)
    yield _of_optax("signum", optim.Signum(lr=0.01, maximize=True, **wd), optax.signum, chaotic=SIGN)
    yield _of_optax("lion", optim.Lion(lr=0.01, **wd), optax.lion, chaotic=SIGN, b1=0.9, b2=0.99)
    yield _of_torch("adagrad", optim.Adagrad(lr=0.05, **wd))
    yield _of_torch("adagrad-options", optim.Adagrad(lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1, **wd))
    yield _of_torch("adadelta", optim.Adadelta(lr=0.5, **wd))
    for centered in (False, True):
        for momentum in (0.0, 0.9):
            name = f"rmsprop{'-centered' if centered else ''}{'-momentum' if momentum else ''}"
            yield _of_torch(name, optim.RMSprop(lr=0.003, centered=centered, momentum=momentum, **wd))
    yield _of_paper("bias-corrected-rmsprop", optim.BiasCorrectedRMSprop(lr=0.01, **wd), bias_corrected_rmsprop)
    yield _of_torch("adam", optim.Adam(lr=0.02, **wd))
    yield _of_torch("adam-betas", optim.Adam(lr=0.02, betas=(0.7, 0.97), eps=1e-4, maximize=True, **wd))
    yield _of_torch("adamw", optim.AdamW(lr=0.02, **wd), "Adam")
    yield _of_torch("amsgrad", optim.AMSGrad(lr=0.02, **wd), "Adam")
    yield _of_torch("nadam", optim.NAdam(lr=0.02, **wd))
    yield _of_torch("nadam-decoupled", optim.NAdam(lr=0.02, decoupled_weight_decay=True, **wd))
    yield _of_torch("radam", optim.RAdam(lr=0.02, **wd))
    limit = (0.8, 0.8397685748659791)  # with which the sixth average has a length of exactly 5
    yield _of_torch("radam-decoupled", optim.RAdam(lr=0.02, betas=limit, decoupled_weight_decay=True, **wd))
    yield _of_torch("adamax", optim.Adamax(lr=0.02, **wd))
    yield _of_optax("adabelief", optim.AdaBelief(lr=0.02, **wd), optax.adabelief)
    yield _of_paper(
        "adabelief-options",
        optim.AdaBelief(lr=0.02, eps=1e-4, eps_root=1e-8, decoupled_weight_decay=True, **wd),
        adabelief,
    )
    yield _of_optax("yogi", optim.Yogi(lr=0.02, **wd), optax.yogi)
    yield _of_paper("adan", optim.Adan(lr=0.02, **wd), adan)
    yield _of_optax("ademamix", optim.AdEMAMix(lr=0.02, **wd), optax.contrib.ademamix)
    yield _of_optax("adopt", optim.ADOPT(lr=0.02, eps=1e-2, **wd), optax.contrib.adopt, eps=1e-2)
    yield _of_paper(
        "adopt-decoupled", optim.ADOPT(lr=0.02, betas=(0.8, 0.99), decoupled_weight_decay=True, **wd), adopt
    )


def _rows_of_optax(decay: float) -> Iterator[Row]:
    wd = {"weight_decay": decay, "convention": "optax"}
    yield _of_optax("optax-adagrad", optim.Adagrad(lr=0.05, **wd), optax.adagrad)
    for centered in (False, True):
        for momentum in (0.0, 0.9):
            name = f"optax-rmsprop{'-centered' if centered else ''}{'-momentum' if momentum else ''}"
            optimizer = optim.RMSprop(lr=0.003, centered=centered, momentum=momentum, **wd)
            chaotic = VARIANCE if centered else ""
            yield _of_optax(
                name, optimizer, optax.rmsprop, chaotic=chaotic, centered=centered, momentum=momentum or None
            )
    yield _of_optax("optax-adam", optim.Adam(lr=0.02, **wd), optax.adam)
    yield _of_optax("optax-adamw", optim.AdamW(lr=0.02, **wd), optax.adamw)
    yield _of_optax("optax-amsgrad", optim.AMSGrad(lr=0.02, **wd), optax.amsgrad)
    yield _of_optax("optax-nadam", optim.NAdam(lr=0.02, **wd), optax.nadam)
    yield _of_optax("optax-radam", optim.RAdam(lr=0.02, **wd), optax.radam)


def _rows_of_keras(decay: float) -> Iterator[Row]:
    wd = {"weight_decay": decay, "convention": "keras"}
    yield _of_keras("keras-sgd", optim.SGD(lr=0.05, **wd), "SGD")
    yield _of_keras("keras-momentum", optim.Momentum(lr=0.02, **wd), "SGD", momentum=0.9)
    yield _of_keras("keras-nesterov", optim.Nesterov(lr=0.02, **wd), "SGD", momentum=0.9, nesterov=True)
    yield _of_keras("keras-adagrad", optim.Adagrad(lr=0.05, **wd), "Adagrad")
    yield _of_keras("keras-adadelta", optim.Adadelta(lr=0.5, **wd), "Adadelta")
    for centered in (False, True):
        for momentum in (0.0, 0.9):
            name = f"keras-rmsprop{'-centered' if centered else ''}{'-momentum' if momentum else ''}"
            optimizer = optim.RMSprop(lr=0.003, centered=centered, momentum=momentum, **wd)
            yield _of_keras(name, optimizer, "RMSprop", centered=centered, momentum=momentum)
    yield _of_keras("keras-adam", optim.Adam(lr=0.02, **wd), "Adam")
    yield _of_keras("keras-amsgrad", optim.AMSGrad(lr=0.02, **wd), "Adam", amsgrad=True)
    yield _of_keras("keras-nadam", optim.NAdam(lr=0.02, **wd), "Nadam")
    yield _of_keras("keras-adamax", optim.Adamax(lr=0.02, **wd), "Adamax")


ROWS = {row.name: row for row in _rows()}
