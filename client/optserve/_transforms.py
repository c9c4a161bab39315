"""Transforms: what happens to gradients before the rule, and to parameters after it, in this order.

unscale            g ← g / loss scale                       of a push
non-finite values  refused, or the push is skipped
accumulation       g ← mean over the workers of a round and over `accumulate` pushes
clipping           g ← clipped g                            one of the Clip classes
maximize, decay    g ← −g,  g ← g + λθ  or  θ ← (1 − ηλ)θ   hyperparameters (`optim`), by group
the rule
lookahead          every k updates: φ ← φ + α(θ − φ), θ ← φ
average            θ̄ of the parameters, beside them
"""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from optserve._errors import InvalidTransform

MOST_PUSHES = 1 << 20  # that make one update
MOST_UPDATES = (1 << 31) - 1


def _check(what: str, value: Any, *, below: float = math.inf, most: float = math.inf) -> None:
    """Raises InvalidTransform unless a value is a finite number above 0, and below one bound or at most another."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0 < float(value) < below and float(value) <= most):
        bounds = "".join(
            f" and {word} {bound:g}" for word, bound in (("below", below), ("at most", most)) if bound < math.inf
        )
        raise InvalidTransform(f"expected {what} to be a finite number above 0{bounds}; got {value!r}")


def check_loss_scale(value: Any) -> float:
    """What a loss was multiplied by; raises InvalidTransform."""
    _check("loss_scale", value)
    return float(value)


def _check_count(what: str, value: Any, most: int = MOST_UPDATES) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidTransform(f"expected {what} to be a whole number from 1 to {most}; got {value!r}")


def _check_convention(value: Any) -> None:
    if value not in ("torch", "optax", "keras"):
        raise InvalidTransform(f"expected convention to be 'torch', 'optax' or 'keras'; got {value!r}")


@dataclass(frozen=True, slots=True)
class ClipGlobalNorm:
    """Scale all gradients of an update down until their Euclidean norm N together is at most `max_norm`.

    g ← g · min(1, max_norm / (N + ε))        ε = 1e-6 as in torch's `clip_grad_norm_`; 0 by convention of optax or keras
    """

    max_norm: float
    convention: str = "torch"

    def __post_init__(self) -> None:
        _check("max_norm", self.max_norm)
        _check_convention(self.convention)


@dataclass(frozen=True, slots=True)
class ClipNorm:
    """Scale each tensor's gradient down until its own norm is at most `max_norm`, as `ClipGlobalNorm` does for one tensor."""

    max_norm: float
    convention: str = "torch"

    def __post_init__(self) -> None:
        _check("max_norm", self.max_norm)
        _check_convention(self.convention)


@dataclass(frozen=True, slots=True)
class ClipValue:
    """g ← min(max(g, −max_value), max_value), as torch's `clip_grad_value_`."""

    max_value: float

    def __post_init__(self) -> None:
        _check("max_value", self.max_value)


@dataclass(frozen=True, slots=True)
class ClipAdaptive:
    """Scale the gradient of each unit down until its norm is at most `clipping` times that of the unit's parameters.

        g ← g · c / max(‖g‖, 1e-6)  where ‖g‖ ≥ c = clipping · max(‖θ‖, eps)

    A unit is all of a vector; in torch's convention a row (first dimension) of a matrix or a kernel; in optax's and Keras's,
    whose kernels are (in, out), a column: norms go over the first dimension, or with four and more over all but the last.

    Reference: Brock et al., ICML 2021, arXiv:2102.06171; timm's `adaptive_clip_grad`, `optax.adaptive_grad_clip`.
    """

    clipping: float
    eps: float = 1e-3
    convention: str = "torch"

    def __post_init__(self) -> None:
        _check("clipping", self.clipping)
        _check("eps", self.eps)
        _check_convention(self.convention)


Clip = ClipGlobalNorm | ClipNorm | ClipValue | ClipAdaptive


@dataclass(frozen=True, slots=True)
class RefuseNonFinite:
    """A push with NaN or infinity is refused: it raises NonFiniteValue in the worker that sent it."""


@dataclass(frozen=True, slots=True)
class SkipNonFinite:
    """A push with NaN or infinity is skipped, as mixed-precision training wants: its receipt says so, and nothing is raised.

    After `at_most` in a row (None: any number) it is refused. In a synchronous set all of its round is skipped.
    """

    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.at_most is not None:
            _check_count("at_most", self.at_most)


NonFinite = RefuseNonFinite | SkipNonFinite
REFUSE = RefuseNonFinite()


@dataclass(frozen=True, slots=True)
class EMA:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after every update of a tensor; θ̄ = θ after the first, as in torch and Keras."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        _check("decay", self.decay, below=1.0)


@dataclass(frozen=True, slots=True)
class SWA:
    """θ̄ is the mean of θ after the updates start, start + every, ... of a tensor, as torch's `AveragedModel`; θ before.

    Reference: Izmailov et al., UAI 2018, arXiv:1803.05407.
    """

    start: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        _check_count("start", self.start)
        _check_count("every", self.every)


Average = EMA | SWA


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Every `every` updates of a tensor: φ ← φ + alpha · (θ − φ), then θ ← φ; φ begins as θ.

    Reference: Zhang et al., NeurIPS 2019, arXiv:1907.08610; `optax.lookahead`.
    """

    every: int = 6
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_count("every", self.every)
        _check("alpha", self.alpha, most=1.0)


@dataclass(frozen=True, slots=True)
class Transforms:
    """What a parameter set does around its rule; raises InvalidTransform."""

    nonfinite: NonFinite = REFUSE
    accumulate: int = 1
    clip: Clip | None = None
    lookahead: Lookahead | None = None
    average: Average | None = None

    def __post_init__(self) -> None:
        _check_count("accumulate", self.accumulate, MOST_PUSHES)
        for name, value, kinds in (
            ("nonfinite", self.nonfinite, NonFinite),
            ("clip", self.clip, Clip | None),
            ("lookahead", self.lookahead, Lookahead | None),
            ("average", self.average, Average | None),
        ):
            if not isinstance(value, kinds):
                raise InvalidTransform(f"expected {name} to be one of {kinds}; got {value!r}")

    @property
    def reads_parameters(self) -> bool:
        """Whether parameters are read beside the rule, all of them."""
        return self.average is not None or self.lookahead is not None or isinstance(self.clip, ClipAdaptive)


PLAIN = Transforms()
