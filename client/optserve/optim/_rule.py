"""What a rule is: the step of one element, as a function. The server compiles it; nothing else ever runs it."""

import functools
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.optim._optimizer import Optimizer

Memory = tuple[float, ...]


def own_numbers(optimizer: Optimizer, t: int, memory: Memory) -> Any:
    """Scalars of a rule that needs no others: those of its hyperparameters that are numbers, by name."""
    numbers = {name: value for name, value in optimizer.hyperparameters.items() if isinstance(value, float)}
    return _scalars(*numbers)(**numbers)


@functools.cache
def _scalars(*names: str) -> Callable[..., Any]:
    return namedtuple("Scalars", names)


def _nothing(optimizer: Any, t: int, memory: Memory) -> Memory:
    return memory


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule: its function, its scalars, its slots (values per element) and its memory (values per tensor).

    `function(p, g, *slots, h)` gives the new parameter and slots of one element. `scalars(optimizer, t, memory)` gives `h`, a
    NamedTuple, for a tensor's update number t = 1, 2, ...; `remember(optimizer, t, memory)` gives the memory that update t
    sees. Slots start at `initial(optimizer)`, as the parameters if they are among `copies`, or at zero. The slot `evaluation`
    holds the parameters to evaluate, if they are others than those to train. A `lazy` rule leaves alone what has no gradient,
    so that it may be given some rows only. A rule that `reads_parameters` does more with them than to add a step, and needs a
    set that holds them.
    """

    function: Callable[..., Any]
    scalars: Callable[[Any, int, Memory], Any] = own_numbers
    slots: tuple[str, ...] = ()
    memory: Mapping[str, float] = field(default_factory=dict)
    remember: Callable[[Any, int, Memory], Memory] = _nothing
    initial: Callable[[Any], Mapping[str, float]] = lambda optimizer: {}
    copies: tuple[str, ...] = ()
    evaluation: str = ""
    lazy: bool = False
    reads_parameters: bool = False
