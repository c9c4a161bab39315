"""DiLoCo: many steps of a local optimizer, then one push of how far they led, and the global parameters back."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from optserve._background import Background
from optserve._contribution import WITHOUT_EFFECT, Contribution
from optserve._errors import FailedPrecondition, InvalidArgument, InvalidTensor, TensorMismatch
from optserve._fragments import Fragments
from optserve._parameter_set import ParameterSet
from optserve._results import Parameters, Receipt

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


class DiLoCo:
    """Trains locally on `parameters`, and synchronises them with a set every `every` calls of `step`.

    With H = `every`, τ = `delay`, α = `mixing`, global parameters Θ, local ones θ, and the global ones that this worker took
    over last, b: after step t, for t = H, 2H, ...,

        g = b − θₜ                  is pushed: the pseudo-gradient, for the set's optimizer to make Θ from it,

    and after step t + τ, once Θ is there, b ← Θ, and

        θ ← Θ + (θ − θₜ)            without mixing: what was trained meanwhile stays, all of it, and is pushed the next time;
        θ ← α θ + (1 − α) Θ         with mixing, 0 ≤ α ≤ 1: a part 1 − α of it is given up.

    So θ ← Θ with no delay and no mixing. With P `fragments`, this happens to fragment p after the steps t = p H / P + k H.
    A set that was created for deltas or parameters is pushed −g or θₜ instead of g. What the local optimizer keeps, such as
    its moments, is left alone.

    References: Douillard et al., "DiLoCo", 2311.08105; Douillard et al., "Streaming DiLoCo", 2501.18512 (fragments, delay
    and mixing); Shen et al., "CoCoD-SGD", 1906.12043 (without mixing).

    `weights` belongs to this object from entering to leaving: use another handle to pull or push in between. `fragments` are
    a number of parts of about the same size, or names and patterns for each part. `parameters`, if given, are the arrays to
    train in place, one for each tensor of the set. Raises InvalidArgument, InvalidTensor.
    """

    def __init__(
        self,
        weights: ParameterSet,
        *,
        every: int,
        delay: int = 0,
        mixing: float | None = None,
        fragments: Fragments = 1,
        parameters: Mapping[str, Array] | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise InvalidArgument(f"expected every as a number of local steps, at least 1; got {every!r}")
        if not isinstance(delay, int) or not 0 <= delay <= every:
            raise InvalidArgument(f"expected a delay of 0 to {every} local steps, as many as every says; got {delay!r}")
        if mixing is not None and not 0 <= mixing <= 1:
            raise InvalidArgument(f"expected mixing from 0 to 1, or None; got {mixing!r}")
        for name, array in (parameters or {}).items():
            if not isinstance(array, np.ndarray) or not array.flags.writeable:
                kind = "one that is read-only" if isinstance(array, np.ndarray) else type(array).__name__
                raise InvalidTensor(f"expected {name!r} to be a NumPy array, to be trained in place; got {kind}")
        self._weights = weights
        self._every = every
        self._delay = delay
        self._mixing = mixing
        self._wanted = fragments
        self._parameters = dict(parameters or {})
        self._names: frozenset[str] = frozenset()  # of the set's tensors
        self._contribution: Contribution  # since it was entered
        self._background: Background[Parameters] | None = None  # while it is entered
        self._fragments: list[_Fragment] = []
        self._under_way: deque[_Exchange] = deque()
        self._steps = 0
        self._slot = 1
        self._receipt: Receipt | None = None
        self._synchronisations = 0
        self._discarded = 0
        self._waited = 0.0

    @property
    def parameters(self) -> Arrays:
        """This worker's own arrays, by name, the same ones at all times: train them in place, or put others in their places."""
        return self._parameters

    @property
    def receipt(self) -> Receipt | None:
        """That of the last push whose answer was taken over; None before there is one."""
        return self._receipt

    @property
    def synchronisations(self) -> int:
        """Number of pushes whose answers were taken over, each of one fragment."""
        return self._synchronisations

    @property
    def discarded(self) -> int:
        """How many of these pushes had no part in any update, because they came too late or were skipped."""
        return self._discarded

    @property
    def waited(self) -> float:
        """Seconds for which `step`, or leaving, has waited for answers: the rest of the time was free for training."""
        return self._waited

    def __enter__(self) -> Self:
        """Take over the global parameters, also after an error; raises what a pull raises, or InvalidArgument."""
        if self._background is not None:
            raise FailedPrecondition("expected a DiLoCo that is left before it is entered again")
        contribution = Contribution.to(self._weights.describe(), self._wanted)
        if len(contribution.parts) > self._every:
            raise InvalidArgument(
                f"expected at most {self._every} fragments, one for each step; got {len(contribution.parts)}"
            )
        pulled = self._weights.pull()
        self._names = frozenset(pulled)
        if not self._parameters:
            self._parameters.update((name, np.empty_like(value)) for name, value in pulled.items())
        self._local(pulled)
        for name in contribution.frozen:
            self._assign(name, pulled[name])
        self._begin(contribution, pulled)
        return self

    def step(self, samples: float = 1.0) -> None:
        """Say that a local step is done, on so many samples or tokens; synchronises when it is time to.

        A push weighs as much as the samples since the fragment's push before. Raises, once, what a push raised, also one in
        the background, or TensorMismatch for arrays of other shapes or dtypes. That ends the synchronisation: nothing more is
        pushed. To go on, enter again, which takes over the global parameters, whatever became of that push.
        """
        if self._background is None:
            raise FailedPrecondition("expected a step inside of `with`, and after an error, to be entered again")
        if not 0 < samples < math.inf:
            raise InvalidArgument(f"expected a positive number of samples; got {samples!r}")
        self._steps += 1
        for fragment in self._fragments:
            fragment.samples += samples
        try:
            for each in self._under_way:
                if each.answer.done() and not each.answer.cancelled():
                    each.answer.result()
            self._take_over(until=self._steps)
            if self._steps == self._due(self._slot):
                self._send()
                self._take_over(until=self._steps)
        except BaseException:
            self._stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take over what is under way, push what was trained since, and end with the global parameters.

        After an exception nothing more is pushed, and nothing waited for.
        """
        if self._background is None:  # an error has ended it
            return
        try:
            if kind is None:
                self._take_over(until=math.inf)
                for _ in self._fragments:
                    self._send()
                    self._take_over(until=math.inf)
                self._adopt()
        finally:
            self._stop()

    def _begin(self, contribution: Contribution, pulled: Parameters) -> None:
        """Train from the global parameters, and contribute to them from now on."""
        self._contribution = contribution
        self._fragments = [_Fragment(names, {name: pulled[name] for name in names}) for names in contribution.parts]
        self._adopt()
        # Each update of a synchronous set is one fragment's, so its version says which is the next for all workers.
        self._slot = pulled.version % len(self._fragments) + 1
        self._steps = self._due(self._slot - 1)
        self._background = Background()

    def _due(self, slot: int) -> int:
        """After which step the fragment of a slot is sent. Slots count on, through all fragments in turn."""
        return slot * self._every // len(self._fragments)

    def _send(self) -> None:
        """Push the fragment whose turn it is, in the background, if it was trained since its last push."""
        assert self._background is not None
        fragment = self._fragments[self._slot % len(self._fragments)]
        self._slot += 1
        if not fragment.samples:
            return
        local = self._local(fragment.base)
        pushed = {name: self._contribution.pushed(name, local[name], base) for name, base in fragment.base.items()}
        push = partial(self._weights.step, pushed, samples=fragment.samples, tensors=fragment.names)
        answer = self._background.call(partial(_exchanged, self._background, self._contribution, push))
        fragment.samples = 0.0
        keeps = self._delay > 0 and self._mixing is None
        sent = {name: array.copy() for name, array in local.items()} if keeps else {}
        self._under_way.append(_Exchange(fragment, self._steps + self._delay, answer, sent))

    def _take_over(self, *, until: float) -> None:
        """Wait for the answers that are due until a step, and let the parameters have them."""
        while self._under_way and self._under_way[0].due <= until:
            exchange = self._under_way[0]
            pulled = self._wait(exchange.answer)
            assert pulled.receipt is not None
            self._receipt = pulled.receipt
            self._synchronisations += 1
            self._discarded += pulled.receipt.outcome in WITHOUT_EFFECT
            if self._contribution.left_behind(pulled):
                self._stop()
                self._begin(self._contribution, pulled if len(self._fragments) == 1 else self._weights.pull())
                return
            local = self._local(exchange.fragment.base)
            for name, value in pulled.items():
                mixes = name not in self._contribution.buffers
                self._assign(name, self._merged(local[name], value, exchange.sent.get(name)) if mixes else value)
            exchange.fragment.base = dict(pulled)
            self._under_way.popleft()

    def _merged(self, local: Array, pulled: Array, sent: Array | None) -> Array:
        """What a parameter becomes when its global value has come."""
        wide = np.result_type(local, np.float32)
        value: Any = pulled
        if self._mixing is not None:
            value = self._mixing * local.astype(wide) + (1 - self._mixing) * pulled.astype(wide)
        elif sent is not None:
            value = pulled + (local.astype(wide) - sent)
        return np.asarray(value, dtype=pulled.dtype)

    def _wait(self, answer: Future[Parameters]) -> Parameters:
        begun = time.perf_counter()
        try:
            return answer.result()
        finally:
            self._waited += time.perf_counter() - begun

    def _stop(self) -> None:
        """Push nothing more, and forget what is under way; entering begins anew."""
        if self._background is not None:
            self._background.stop()
        self._background = None
        self._under_way.clear()

    def _local(self, base: Mapping[str, Array]) -> Arrays:
        """This worker's arrays of the tensors in `base`; raises TensorMismatch if they are of other shapes or dtypes."""
        if self._parameters.keys() != self._names:
            names = sorted(self._parameters.keys() ^ self._names)
            raise TensorMismatch(
                f"expected an array for each tensor of the set, and no others; {names[:10]} are not in both"
            )
        local = {name: np.asarray(self._parameters[name]) for name in base}
        for name, array in local.items():
            if (array.dtype, array.shape) != (base[name].dtype, base[name].shape):
                raise TensorMismatch(
                    f"expected {name!r} to stay {base[name].dtype}{list(base[name].shape)}; got {array.dtype}"
                    f"{list(array.shape)}. Change the array in place, or put one of that kind in its place"
                )
        return local

    def _adopt(self) -> None:
        """Let the parameters be the global ones that were taken over last."""
        for fragment in self._fragments:
            for name, value in fragment.base.items():
                self._assign(name, value)

    def _assign(self, name: str, value: Array) -> None:
        """Give a parameter a value, in its own array if that can be written, else in a new one."""
        array = self._parameters[name]
        if isinstance(array, np.ndarray) and array.flags.writeable:
            np.copyto(array, value)
        else:
            self._parameters[name] = np.array(value)


@dataclass(eq=False)
class _Fragment:
    """Tensors that are synchronised together: the global ones that were taken over last, and samples trained on since."""

    names: tuple[str, ...]
    base: Arrays
    samples: float = 0.0


@dataclass(frozen=True, eq=False)
class _Exchange:
    """A push that is under way, after which step its answer is taken over, and copies of what was sent where that matters."""

    fragment: _Fragment
    due: int
    answer: Future[Parameters]
    sent: Arrays


def _exchanged(
    background: Background[Parameters], contribution: Contribution, push: Callable[[], Parameters]
) -> Parameters:
    """Push and pull, in the background, which ends where the set went on without this worker."""
    pulled = push()
    if contribution.left_behind(pulled):
        background.stop()  # what waits behind it was trained from parameters that are too old
    return pulled
