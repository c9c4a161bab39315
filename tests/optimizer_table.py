"""The optimizers under test, one row each: a configuration and an independent implementation of it.

The oracle is torch where torch has the rule, optax or Keras where they have it as the paper does, else a transcription of the
paper in NumPy, which shares no code with the engine and calculates in the dtype of the parameters.
"""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import jax
import keras
import numpy as np
import optax
import torch

from optserve import optim

Array = np.ndarray[Any, Any]

jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")  # what learning rates are kept in
torch.set_num_threads(1)  # several would spin in the way of ours


@dataclass(frozen=True)
class Step:
    """What is pushed: a gradient, or None where the tensor is absent; and the learning rate from then on."""

    gradient: Array | None
    lr: float


# Initial parameters, steps -> parameters after the last, or those and the ones to evaluate.
Oracle = Callable[[Array, Sequence[Step]], Array]

WIDE: Mapping[int, tuple[int, ...]] = {4097: (17, 241), 100_003: (283, 353)}
TALL: Mapping[int, tuple[int, ...]] = {4097: (241, 17), 100_003: (353, 283)}
KERNELS: Mapping[int, tuple[int, ...]] = {4097: (2, 3, 17, 40), 100_003: (3, 5, 59, 113)}


@dataclass(frozen=True)
class Row:
    """A configuration by name, and its oracle.

    `live` says whether its learning rate may change; `chaotic` why a few elements may end far from float64 in float32;
    `shapes` what tensors of about a size are, if not vectors; `evaluates` whether its parameters to evaluate are compared, too.
    """

    name: str
    optimizer: optim.Optimizer
    oracle: Oracle
    live: bool = True
    chaotic: str = ""
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    evaluates: bool = False


@contextmanager
def torch_in_float64() -> Iterator[None]:
    """Let torch keep in float64 what it knows of a tensor, such as NAdam's product of momenta: it takes the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def muon_in_full_precision() -> contextlib.AbstractContextManager[object]:
    """Let torch's Muon not round to bfloat16."""
    return mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)


def torch_oracle(name: str, optimizer: optim.Optimizer) -> Oracle:
    """`torch.optim.<name>`, for-loop path, in the dtype of the parameters."""
    options = {key: value for key, value in optimizer.hyperparameters.items() if key != "convention"}
    return lambda parameters, steps: torch_run(name, parameters, steps, foreach=False, **options)


def torch_run(
    name: str,
    parameters: Array,
    steps: Sequence[Step],
    gradient: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    **options: Any,
) -> Array:
    with torch_in_float64():  # NAdam keeps its product of momenta in the default dtype
        tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
        theirs = getattr(torch.optim, name)([tensor], **options)
        for step in steps:
            theirs.param_groups[0]["lr"] = step.lr
            tensor.grad = None if step.gradient is None else gradient(torch.from_numpy(step.gradient))
            theirs.step()
        return tensor.detach().numpy()


def sparse_adam_oracle(optimizer: optim.SparseAdam) -> Oracle:
    """`torch.optim.SparseAdam` on gradients that have all rows."""
    return lambda parameters, steps: torch_run(
        "SparseAdam", parameters, steps, lambda gradient: gradient.to_sparse(1), **optimizer.hyperparameters
    )


def muon_oracle(o: optim.Muon) -> Oracle:
    """`torch.optim.Muon` without its rounding to bfloat16, and `torch.optim.AdamW` of what is no matrix."""
    ours = ("adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay", "maximize")
    options = {key: value for key, value in o.hyperparameters.items() if key not in ours}

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        if parameters.ndim == 2:
            with muon_in_full_precision():
                return torch_run("Muon", parameters, steps, torch.neg if o.maximize else torch.clone, **options)
        own = {"betas": o.adamw_betas, "eps": o.adamw_eps, "weight_decay": o.adamw_weight_decay, "maximize": o.maximize}
        return torch_run("AdamW", parameters, [replace(step, lr=o.adamw_lr) for step in steps], foreach=False, **own)

    return run


def optax_oracle(
    build: Callable[..., Any], optimizer: optim.Optimizer, *, evaluates: bool = False, **options: Any
) -> Oracle:
    """An optax optimizer, in the dtype of the parameters. L2 decay and maximization are added in front of it."""
    decay = getattr(optimizer, "weight_decay", 0.0)
    if getattr(optimizer, "decoupled_weight_decay", False) or optimizer.own_weight_decay:
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
        if evaluates:
            return np.stack([params, optax.contrib.schedule_free_eval_params(state.inner_state, params)])
        return np.asarray(params)

    return run


def jax_mean(x: Any, **options: Any) -> Any:
    """Keras' own mean rounds to float32."""
    return jax.numpy.mean(jax.numpy.asarray(x), **options)


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
                with mock.patch("keras.src.ops.mean", jax_mean):
                    theirs.apply([keras.ops.convert_to_tensor(step.gradient)], [variable])
        return np.asarray(variable)

    return run


Transcription = Callable[[Any, Array, Array, dict[str, Array], int, float], Array]  # (o, p, g, state, t, lr) -> p


def paper_oracle(transcription: Transcription, optimizer: optim.Optimizer, evaluated: str = "") -> Oracle:
    """A transcription of a paper, weight decay included: its state starts at zero, and may have parameters to evaluate."""

    def run(parameters: Array, steps: Sequence[Step]) -> Array:
        p, t = parameters.copy(), 0
        state: dict[str, Array] = defaultdict(lambda: np.zeros_like(parameters))
        for step in steps:
            if step.gradient is not None:
                t += 1
                p = transcription(optimizer, p, step.gradient, state, t, step.lr)
                assert p.dtype == parameters.dtype
        return np.stack([p, state[evaluated]]) if evaluated else p

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


def row_wise_adagrad(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """As in torchrec.optim.RowWiseAdagrad."""
    g = l2(o, p, g)
    flat = g.reshape(len(g), -1)
    s["sum"] = (s["sum"] if t > 1 else np.full(len(g), o.initial_accumulator_value, p.dtype)) + np.mean(flat**2, axis=1)
    return p - lr / (1 + (t - 1) * o.lr_decay) * (flat / (np.sqrt(s["sum"])[:, None] + o.eps)).reshape(p.shape)


def swats(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 1 of the paper, of one tensor, with a positive learning rate after the switch that goes with lr."""
    beta1, beta2 = o.betas
    g = l2(o, p, g)
    if "switched" in s:
        s["b"] = beta1 * s["b"] + g
        return p - (1 - beta1) * float(s["switched"]) * lr * s["b"]
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
    step = -lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * s["m"] / (np.sqrt(s["v"]) + o.eps)
    product = math.fsum((step * g).flat)
    if product != 0:
        gamma = math.fsum((step * step).flat) / -product
        s["a"] = np.array(beta2 * (s["a"].item() if "a" in s else 0.0) + (1 - beta2) * gamma)
        settled = s["a"].item() / (1 - beta2**t)
        if t > 1 and settled > 0 and abs(settled - gamma) < o.eps:
            s["switched"] = np.array(settled / lr)
    return p + step


def prodigy(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """As in the authors' code, of one tensor."""
    (beta1, beta2), beta3 = o.betas, o.beta3 if o.beta3 is not None else math.sqrt(o.betas[1])
    start, d, numerator = (s["start"], *s["group"]) if t > 1 else (p, o.d0, 0.0)
    s["start"], rate = start, float(d) * lr
    if o.use_bias_correction:
        rate *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
    numerator = beta3 * numerator + d / o.d0 * rate * math.fsum((g * (start - p)).flat)
    s["m"] = beta1 * s["m"] + float(d) * (1 - beta1) * g
    s["v"] = beta2 * s["v"] + float(d) ** 2 * (1 - beta2) * g**2
    s["s"] = beta3 * s["s"] + float(d / o.d0) * (float(d) if o.safeguard_warmup else rate) * g
    d = max(d, o.d_coef * numerator / math.fsum(np.abs(s["s"]).flat))
    s["group"] = np.array([d, numerator])
    return p - rate * (s["m"] / (np.sqrt(s["v"]) + float(d) * o.eps) + o.weight_decay * p)


def schedule_free(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """As in the paper, with the warm-up of the authors' code."""
    x, z = (s["x"], s["z"]) if t > 1 else (p, p)
    beta = o.betas[0] if isinstance(o, optim.ScheduleFreeAdamW) else o.momentum
    lr *= min(1.0, t / o.warmup_steps) if o.warmup_steps else 1.0
    s["largest"] = np.maximum(s["largest"].flat[0], np.array(lr))
    weight = s["largest"].item() ** o.weight_lr_power
    s["sum"] = np.array(s["sum"].flat[0] + weight)
    if isinstance(o, optim.ScheduleFreeAdamW):
        s["v"] = o.betas[1] * s["v"] + (1 - o.betas[1]) * g**2
        g = g / (np.sqrt(s["v"] / (1 - o.betas[1] ** t)) + o.eps)
    s["z"] = z - lr * (g + o.weight_decay * p)
    s["x"] = (1 - weight / s["sum"].item()) * x + weight / s["sum"].item() * s["z"]
    return beta * s["x"] + (1 - beta) * s["z"]


def federated(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """Algorithm 2 of the paper, with what Flower, TensorFlow Federated and torch have in the place of its last line."""
    delta = -g
    beta1, beta2 = (o.beta1, 0.0) if isinstance(o, optim.FedAdagrad) else o.betas
    initial = o.tau**2 if o.initial_accumulator_value is None else o.initial_accumulator_value
    v = s["v"] if t > 1 else np.full_like(p, initial)
    s["m"] = beta1 * s["m"] + (1 - beta1) * delta
    match o.rule:
        case "FedAdagrad":
            s["v"] = v + delta**2
        case "FedAdam":
            s["v"] = beta2 * v + (1 - beta2) * delta**2
        case "FedYogi":
            s["v"] = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
    match getattr(o, "bias_correction", "none"):
        case "flower":
            lr *= math.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1))
        case "tff":
            lr *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        case "adam":
            return p + lr * (s["m"] / (1 - beta1**t)) / (np.sqrt(s["v"] / (1 - beta2**t)) + o.tau)
    return p + lr * s["m"] / (np.sqrt(s["v"]) + o.tau)


def delayed_nesterov(o: Any, p: Array, g: Array, s: dict[str, Array], t: int, lr: float) -> Array:
    """As in the paper, whose t begins at 0."""
    n, beta, c = o.every, o.momentum, o.c
    s["delta"] = s["delta"] + g
    if t % n != 0:
        return p - lr * (c * beta * s["m"] + g / n)
    s["m"] = beta * s["m"] + s["delta"] / n
    s["delta"] = np.zeros_like(p)
    return p - lr * ((1 - c * n + c) * beta * s["m"] + g / n)


ROOTS = "where gradients are small, it takes the difference of nearly equal roots, and forgets what parameters were"
VARIANCE = "where a gradient hardly changes, its variance is the difference of nearly equal numbers"
SIGN = "it takes the sign of what may be nearly zero"


def _of_torch(name: str, optimizer: optim.Optimizer, torch_name: str | None = None, *, live: bool = True) -> Row:
    return Row(name, optimizer, torch_oracle(torch_name or optimizer.rule, optimizer), live)


def _of_optax(
    name: str, optimizer: optim.Optimizer, build: Callable[..., Any], *, chaotic: str = "", **options: Any
) -> Row:
    return Row(name, optimizer, optax_oracle(build, optimizer, **options), chaotic=chaotic)


def _of_whole(row: Row, shapes: Mapping[int, tuple[int, ...]] = WIDE) -> Row:
    return replace(row, shapes=shapes)


def _schedule_free(name: str, optimizer: optim.Optimizer, build: Callable[..., Any] | None = None) -> Row:
    if build is None:
        return Row(name, optimizer, paper_oracle(schedule_free, optimizer, "x"), evaluates=True)
    return Row(name, optimizer, optax_oracle(build, optimizer, evaluates=True), evaluates=True)


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
    yield Row("sparse-adam", optim.SparseAdam(lr=0.02), sparse_adam_oracle(optim.SparseAdam(lr=0.02)), shapes=WIDE)
    yield _schedule_free(
        "schedule-free-sgd-warm-up", optim.ScheduleFreeSGD(lr=0.1, warmup_steps=20.5, weight_lr_power=1.0)
    )
    yield _schedule_free(
        "schedule-free-adamw-warm-up", optim.ScheduleFreeAdamW(lr=0.02, betas=(0.8, 0.99), warmup_steps=60.0)
    )
    yield from _rows_of_outer_optimizers()
    for decay in (0.0, 0.05):
        for row in itertools.chain(
            _rows_with(decay), _rows_of_optax(decay), _rows_of_keras(decay), _rows_of_whole_tensors(decay)
        ):
            yield replace(row, name=f"{row.name}-decay") if decay else row


def _rows_of_outer_optimizers() -> Iterator[Row]:
    yield _of_paper("fed-adagrad", optim.FedAdagrad(), federated)
    options = {"tau": 1e-2, "initial_accumulator_value": 0.0}
    yield _of_paper("fed-adagrad-momentum", optim.FedAdagrad(lr=0.05, beta1=0.9, **options), federated)
    yield _of_paper("fed-adam", optim.FedAdam(lr=0.02), federated)
    zero = {"lr": 0.02, "initial_accumulator_value": 0.0}
    for correction in ("adam", "tff", "flower"):
        corrected = optim.FedAdam(betas=(0.8, 0.97), bias_correction=correction, **zero)
        yield _of_paper(f"fed-adam-{correction}", corrected, federated)
    yield _of_paper("fed-yogi", optim.FedYogi(lr=0.02), federated)
    yield _of_paper("fed-yogi-adam", optim.FedYogi(bias_correction="adam", **zero), federated)
    of_tff = optim.FedYogi(lr=0.02, betas=(0.9, 0.999), bias_correction="tff", initial_accumulator_value=1e-5)
    yield _of_paper("fed-yogi-tff", of_tff, federated)
    yield _of_paper("delayed-nesterov", optim.DelayedNesterov(lr=0.05), delayed_nesterov)
    spread = optim.DelayedNesterov(lr=0.05, momentum=0.8, every=7, c=0.1)
    yield _of_paper("delayed-nesterov-spread", spread, delayed_nesterov)


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
    yield _of_whole(_of_keras("keras-lamb", optim.LAMB(lr=0.02, **wd), "Lamb"))
    yield _of_whole(_of_keras("keras-adafactor", optim.Adafactor(lr=0.05, **wd), "Adafactor"))


def _rows_of_whole_tensors(decay: float) -> Iterator[Row]:
    wd = {"weight_decay": decay}
    free = optax.contrib
    yield _schedule_free("schedule-free-sgd", optim.ScheduleFreeSGD(lr=0.1, **wd), free.schedule_free_sgd)
    yield _schedule_free("schedule-free-adamw", optim.ScheduleFreeAdamW(lr=0.02, **wd), free.schedule_free_adamw)
    options = {"lr_decay": 0.01, "initial_accumulator_value": 0.1}
    yield _of_whole(_of_paper("row-wise-adagrad", optim.RowWiseAdagrad(lr=0.05, **options, **wd), row_wise_adagrad))
    yield _of_whole(_of_optax("lars", optim.LARS(lr=1.0, **wd), optax.lars))
    nesterov = {"momentum": 0.8, "trust_coefficient": 0.01, "eps": 1e-3, "nesterov": True}
    yield _of_whole(_of_optax("lars-nesterov", optim.LARS(lr=0.3, **nesterov, **wd), optax.lars, **nesterov))
    yield _of_whole(_of_optax("novograd", optim.NovoGrad(lr=0.01, **wd), optax.novograd))
    yield _of_whole(_of_optax("lamb", optim.LAMB(lr=0.02, **wd), optax.lamb))
    yield _of_whole(_of_torch("adafactor", optim.Adafactor(lr=0.05, eps=(1e-8, 1e-3), **wd)))
    options = {"beta2_decay": -0.5, "eps": (1e-6, 1e-2), "d": 1.5, "maximize": True}
    yield _of_whole(_of_torch("adafactor-kernels", optim.Adafactor(lr=0.3, **options, **wd)), KERNELS)
    yield _of_whole(_of_paper("swats", optim.SWATS(lr=0.01, eps=1e-4, **wd), swats))
    yield _of_whole(_of_paper("prodigy", optim.Prodigy(lr=0.3, d0=0.03, d_coef=0.1, **wd), prodigy))
    options = {"beta3": 0.9, "safeguard_warmup": True}
    safeguard = optim.Prodigy(lr=0.3, d0=0.01, d_coef=0.3, **options, **wd)
    yield _of_whole(_of_paper("prodigy-safeguard", safeguard, prodigy))
    corrected = optim.Prodigy(lr=0.3, d0=0.03, d_coef=0.5, use_bias_correction=True, **wd)
    options = {"estim_lr0": corrected.d0, "estim_lr_coef": corrected.d_coef}
    yield _of_whole(_of_optax("prodigy-corrected", corrected, free.prodigy, **options))
    for name, shapes, muon in (
        ("muon", WIDE, optim.Muon(lr=0.001, **wd)),
        ("muon-tall", TALL, optim.Muon(lr=0.001, nesterov=False, adamw_lr=0.01, maximize=True, **wd)),
        (
            "muon-like-adamw",
            {17: (3, 6), **TALL},
            optim.Muon(lr=0.0005, ns_steps=3, adjust_lr_fn="match_rms_adamw", **wd),
        ),
    ):
        yield Row(name, muon, muon_oracle(muon), shapes=shapes)


ROWS = {row.name: row for row in _rows()}
