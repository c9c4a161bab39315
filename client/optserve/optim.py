"""The optimizers, as values: `optim.Adam(lr=3e-4)` names a rule and its hyperparameters; the server runs it.

Class names, argument names, defaults and mathematics are those of `torch.optim` unless the class says otherwise.
Sorted from simple to complex.

Notation: θ parameter, g gradient, t = 1, 2, ... updates that the tensor has had, η `lr`, λ `weight_decay`.
Before every rule, in this order:

    maximize:                     g ← −g
    weight decay (L2):            g ← g + λθ          before the moments
    weight decay (decoupled):     θ ← (1 − ηλ)θ       the moments don't see it (Loshchilov & Hutter, arXiv:1711.05101)

State starts at zero. A gradient of zero is a gradient; a tensor absent from a push is left alone, its t included.
"""

import dataclasses
import difflib
import inspect
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from optserve._errors import InvalidGroup, InvalidHyperparameter, UnknownRule

__all__ = [
    "SGD",
    "AMSGrad",
    "Adagrad",
    "Adam",
    "AdamW",
    "AveragedMomentum",
    "BiasCorrectedRMSprop",
    "Group",
    "Momentum",
    "NAdam",
    "Nesterov",
    "Optimizer",
    "RMSprop",
    "VelocityMomentum",
    "catalogue",
]

T = TypeVar("T", float, bool, tuple[float, float])


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """What a hyperparameter may be: a sentence, a half-open range [minimum, below), and whether it may change live."""

    documentation: str
    minimum: float = 0.0
    below: float = math.inf
    live: bool = True

    def check(self, name: str, value: Any, default: Any) -> Any:
        """Return the value with the type of its default; raises InvalidHyperparameter."""
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise InvalidHyperparameter(f"expected {name} to be True or False; got {value!r}")
            return value
        if isinstance(default, tuple):
            if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(default):
                raise InvalidHyperparameter(f"expected {name} to be {len(default)} numbers; got {value!r}")
            pairs = enumerate(zip(value, default, strict=True))
            return tuple(self.check(f"{name}[{index}]", item, expected) for index, (item, expected) in pairs)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InvalidHyperparameter(f"expected {name} to be a number; got {value!r}")
        value = _as_float(value)
        if not (math.isfinite(value) and self.minimum <= value < self.below):
            raise InvalidHyperparameter(
                f"expected {name} to be finite, at least {self.minimum:g}"
                + (f" and below {self.below:g}" if self.below < math.inf else "")
                + f"; got {value!r}"
            )
        return value


def _hyperparameter(default: T, documentation: str, *, below: float = math.inf, live: bool = True) -> T:
    described = Hyperparameter(documentation, below=below, live=live)
    return field(default=default, metadata={"hyperparameter": described})


# What most rules have in common.
_LR = "Learning rate η."
_WEIGHT_DECAY = "Weight decay λ, per update."
_MAXIMIZE = "Ascend instead of descend."
_EPS = "ε, added to the denominator so that it is never zero."


@dataclass(frozen=True)
class Optimizer:
    """A rule and its hyperparameters; raises InvalidHyperparameter for a value of the wrong type or out of range."""

    lr: float = _hyperparameter(1e-3, _LR)

    def __post_init__(self) -> None:
        for name, described, default in self.described():
            object.__setattr__(self, name, described.check(name, getattr(self, name), default))

    @classmethod
    def described(cls) -> Iterator[tuple[str, Hyperparameter, Any]]:
        """Name, description and default of every hyperparameter, in the constructor's order."""
        for each in dataclasses.fields(cls):
            yield each.name, each.metadata["hyperparameter"], each.default

    @property
    def rule(self) -> str:
        """Name of the rule on the wire."""
        return type(self).__name__

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters by name."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    def replace(self, /, **changes: Any) -> Self:
        """The same rule with some values changed; raises InvalidHyperparameter."""
        _check_names(type(self), changes)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent, with momentum if asked for, as `torch.optim.SGD`.

    θ ← θ − ηg. With momentum μ and dampening τ, a buffer b accumulates gradients and η stays outside of it:

        b ← g              at the tensor's first update (no dampening)
        b ← μb + (1 − τ)g  afterwards
        θ ← θ − ηb,  or with Nesterov's look-ahead  θ ← θ − η(g + μb)

    `VelocityMomentum` keeps η inside the buffer, `AveragedMomentum` weighs g by 1 − β: the three agree while η is
    constant, up to a rescaling, and differ once it changes.

    Reference: Robbins & Monro 1951; Polyak 1964; Sutskever et al., ICML 2013 (momentum as written here).
    """

    momentum: float = _hyperparameter(0.0, "Momentum μ; zero keeps no buffer, and can't be left or reached live.")
    dampening: float = _hyperparameter(0.0, "Dampening τ of the gradient as it enters the buffer.")
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    nesterov: bool = _hyperparameter(False, "Nesterov's look-ahead.", live=False)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise InvalidHyperparameter(
                "expected a positive momentum and no dampening with nesterov=True; "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )


@dataclass(frozen=True)
class Momentum(SGD):
    """`SGD` with a momentum of 0.9: a buffer with the learning rate outside, as torch has it."""

    momentum: float = _hyperparameter(0.9, "Momentum μ.")


@dataclass(frozen=True)
class Nesterov(SGD):
    """`SGD` with Nesterov's look-ahead and a momentum of 0.9, as torch has it.

    The server stores, and workers pull, the look-ahead point θ + μv of the textbook form.

    Reference: Nesterov 1983; Sutskever et al., ICML 2013.
    """

    momentum: float = _hyperparameter(0.9, "Momentum μ.")
    nesterov: bool = _hyperparameter(True, "Nesterov's look-ahead.", live=False)


@dataclass(frozen=True)
class VelocityMomentum(Optimizer):
    """Momentum with the learning rate inside the buffer, as Keras and the first papers have it.

        v ← μv − ηg
        θ ← θ + v

    The velocity remembers the learning rates that were: after a change of η it differs from `Momentum`.

    Reference: Polyak 1964; Rumelhart et al. 1986; keras.optimizers.SGD.
    """

    lr: float = _hyperparameter(1e-2, _LR)
    momentum: float = _hyperparameter(0.9, "Momentum μ.")
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


@dataclass(frozen=True)
class AveragedMomentum(Optimizer):
    """Momentum as an exponential average of gradients, without bias correction.

        v ← βv + (1 − β)g
        θ ← θ − ηv

    `Momentum` with dampening β differs at the first update only: its buffer starts as g, this one as (1 − β)g.

    Reference: optax.ema(β, debias=False) followed by optax.sgd(η).
    """

    lr: float = _hyperparameter(1e-2, _LR)
    beta: float = _hyperparameter(0.9, "Decay β of the average, per update.", below=1.0)
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """A learning rate for every element that shrinks with its squared gradients, as `torch.optim.Adagrad`.

        s ← s + g²                              s starts at initial_accumulator_value
        θ ← θ − η / (1 + (t − 1)·lr_decay) · g / (√s + ε)

    optax and Keras start s at 0.1 and put ε inside the root.

    Reference: Duchi, Hazan & Singer, JMLR 12, 2011.
    """

    lr: float = _hyperparameter(1e-2, _LR)
    lr_decay: float = _hyperparameter(0.0, "Decay of the learning rate, per update.")
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    initial_accumulator_value: float = _hyperparameter(0.0, "What s starts at.", live=False)
    eps: float = _hyperparameter(1e-10, _EPS)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """Divide by a running root mean square of the gradient, as `torch.optim.RMSprop`.

        v ← αv + (1 − α)g²
        centered:   a ← αa + (1 − α)g,  d = √(v − a²) + ε      otherwise  d = √v + ε
        momentum:   b ← μb + g/d,       θ ← θ − ηb             otherwise  θ ← θ − ηg/d

    ε stands outside the root. `BiasCorrectedRMSprop` has it inside.

    Reference: Tieleman & Hinton, lecture 6.5 of COURSERA, 2012; centered: Graves, arXiv:1308.0850.
    """

    lr: float = _hyperparameter(1e-2, _LR)
    alpha: float = _hyperparameter(0.99, "Decay α of the averages, per update.", below=1.0)
    eps: float = _hyperparameter(1e-8, _EPS)
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    momentum: float = _hyperparameter(0.0, "Momentum μ; zero keeps no buffer, and can't be left or reached live.")
    centered: bool = _hyperparameter(False, "Subtract the squared mean: normalise by the variance.", live=False)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


@dataclass(frozen=True)
class BiasCorrectedRMSprop(Optimizer):
    """RMSprop whose average is corrected for its start at zero, with ε inside the root.

        e ← βe + (1 − β)g²
        θ ← θ − ηg / √(e / (1 − βᵗ) + ε)

    Reference: optax.rmsprop(bias_correction=True, eps_in_sqrt=True); the correction is Adam's (arXiv:1412.6980).
    """

    lr: float = _hyperparameter(1e-2, _LR)
    beta: float = _hyperparameter(0.9, "Decay β of the average, per update.", below=1.0)
    eps: float = _hyperparameter(1e-8, "ε, added under the root so that it is never zero.")
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adaptive moments, algorithm 1 of the paper, as `torch.optim.Adam`.

        m ← β₁m + (1 − β₁)g         m̂ = m / (1 − β₁ᵗ)
        v ← β₂v + (1 − β₂)g²        v̂ = v / (1 − β₂ᵗ)
        θ ← θ − η m̂ / (√v̂ + ε)

    AMSGrad keeps v_max ← max(v_max, v) over the uncorrected v and puts it in the place of v.
    Keras and TensorFlow use the "ε̂" form of the paper's section 2, which is not this one.

    Reference: Kingma & Ba, arXiv:1412.6980; AMSGrad: Reddi, Kale & Kumar, ICLR 2018, arXiv:1904.09237.
    """

    betas: tuple[float, float] = _hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = _hyperparameter(1e-8, _EPS)
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    amsgrad: bool = _hyperparameter(False, "Divide by the largest average so far.", live=False)
    maximize: bool = _hyperparameter(False, _MAXIMIZE)
    decoupled_weight_decay: bool = _hyperparameter(False, "Decay the parameters, not the gradient.")


@dataclass(frozen=True)
class AdamW(Adam):
    """`Adam` with decoupled weight decay of 0.01, as `torch.optim.AdamW`.

    Reference: Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101.
    """

    weight_decay: float = _hyperparameter(1e-2, _WEIGHT_DECAY)
    decoupled_weight_decay: bool = _hyperparameter(True, "Decay the parameters, not the gradient.")


@dataclass(frozen=True)
class AMSGrad(Adam):
    """`Adam` that divides by the largest average so far, as `torch.optim.Adam(amsgrad=True)`.

    The maximum is taken over the uncorrected v and corrected afterwards; the paper corrects neither moment.

    Reference: Reddi, Kale & Kumar, ICLR 2018, arXiv:1904.09237.
    """

    amsgrad: bool = _hyperparameter(True, "Divide by the largest average so far.", live=False)


@dataclass(frozen=True)
class NAdam(Optimizer):
    """Adam with Nesterov's look-ahead and a momentum schedule, as `torch.optim.NAdam`; also called Nadam.

        μₜ = β₁(1 − ½·0.96^(tψ)),  Πₜ = μ₁μ₂…μₜ
        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
        θ ← θ − η [μₜ₊₁ m / (1 − Πₜμₜ₊₁) + (1 − μₜ) g / (1 − Πₜ)] / (√(v / (1 − β₂ᵗ)) + ε)

    ψ is `momentum_decay`: 0.004 in torch, 1 in Keras, and optax's nadam is its limit at infinity.

    Reference: Dozat, ICLR workshop 2016.
    """

    lr: float = _hyperparameter(2e-3, _LR)
    betas: tuple[float, float] = _hyperparameter((0.9, 0.999), "Decays β₁, β₂ of the averages, per update.", below=1.0)
    eps: float = _hyperparameter(1e-8, _EPS)
    weight_decay: float = _hyperparameter(0.0, _WEIGHT_DECAY)
    momentum_decay: float = _hyperparameter(4e-3, "ψ, how fast the momentum schedule approaches β₁.")
    decoupled_weight_decay: bool = _hyperparameter(False, "Decay the parameters, not the gradient.")
    maximize: bool = _hyperparameter(False, _MAXIMIZE)


_CATALOGUE: tuple[type[Optimizer], ...] = (
    SGD,
    Momentum,
    Nesterov,
    VelocityMomentum,
    AveragedMomentum,
    Adagrad,
    RMSprop,
    BiasCorrectedRMSprop,
    Adam,
    AdamW,
    AMSGrad,
    NAdam,
)


def catalogue() -> dict[str, type[Optimizer]]:
    """All optimizers by the name of their rule, simplest first."""
    return {optimizer.__name__: optimizer for optimizer in _CATALOGUE}


def from_hyperparameters(rule: str, values: Mapping[str, Any]) -> Optimizer:
    """The optimizer of that name with those values; raises UnknownRule or InvalidHyperparameter."""
    known = catalogue()
    if rule not in known:
        raise UnknownRule(f"expected a rule among {', '.join(known)}; got {rule!r}{_suggest(rule, list(known))}")
    _check_names(known[rule], values)
    return known[rule](**values)


def documentation(optimizer: type[Optimizer]) -> tuple[str, str]:
    """The first sentence and the whole of an optimizer's documentation."""
    text = inspect.getdoc(optimizer) or ""
    return text.split("\n\n")[0], text


class Group:
    """Tensors with hyperparameters of their own: `Group("no_decay", "*.bias", weight_decay=0.0)`.

    `tensors` are names or shell patterns (`*`, `?`, `[...]`); the first group that matches a tensor claims it, and what
    no group claims belongs to the group `default`. Raises InvalidGroup.
    """

    DEFAULT: ClassVar[str] = "default"

    def __init__(self, name: str, /, *tensors: str, **hyperparameters: Any) -> None:
        allowed = name.replace(".", "").replace("_", "").replace("-", "")
        if not (0 < len(name) <= 128 and allowed.isalnum() and allowed.isascii()) or name == self.DEFAULT:
            raise InvalidGroup(
                f"expected a group name of 1 to 128 letters, digits, '.', '_', '-', other than 'default'; got {name!r}"
            )
        if not tensors:
            raise InvalidGroup(f"expected at least one tensor name or pattern for group {name!r}; got none")
        self.name = name
        self.tensors = tensors
        self.hyperparameters = hyperparameters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.name, self.tensors))

    def __repr__(self) -> str:
        arguments = [repr(self.name), *map(repr, self.tensors)]
        return f"Group({', '.join(arguments + [f'{name}={value!r}' for name, value in self.hyperparameters.items()])})"


def _as_float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_names(optimizer: type[Optimizer], values: Mapping[str, Any]) -> None:
    known = [name for name, _, _ in optimizer.described()]
    for name in values:
        if name not in known:
            raise InvalidHyperparameter(
                f"expected a hyperparameter of {optimizer.__name__} among {', '.join(known)}; "
                f"got {name!r}{_suggest(name, known)}"
            )


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
