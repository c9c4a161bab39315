"""A contribution: what a worker that trains by itself pushes into a set, in which parts, as the set wants it."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from optserve._errors import InvalidArgument
from optserve._fragments import Fragments, divide
from optserve._policies import Buffered, Late, Sync
from optserve._results import Description, Outcome, Parameters
from optserve._specification import Holds, Pushes
from optserve._treatments import Treatment

Array = np.ndarray[Any, Any]

WITHOUT_EFFECT = (Outcome.SKIPPED, Outcome.DISCARDED)  # these pushes had no part in an update, and never will


@dataclass(frozen=True, slots=True)
class Contribution:
    """The names of the tensors of each part; `buffers` are those of which values are pushed, `frozen` what is not pushed.

    `in_rounds` says whether workers push the parts together, and so in one order.
    """

    parts: tuple[tuple[str, ...], ...]
    pushes: Pushes
    buffers: Set[str]
    frozen: Set[str]
    in_rounds: bool

    @classmethod
    def to(cls, description: Description, fragments: Fragments) -> Self:
        """That to a set, in fragments; raises InvalidArgument where the set can't take it."""
        spec, in_rounds = description.spec, isinstance(description.policy, Sync)
        if spec.holds is not Holds.PARAMETERS or spec.tables:
            raise InvalidArgument(f"expected a set that holds parameters, and no tables; got {spec.id!r}")
        treatments = {spec.tensors[index].name: each for index, each in spec.treatments.items()}
        frozen = {name for name, each in treatments.items() if each is Treatment.FREEZE}
        parts = divide([tensor for tensor in spec.tensors if tensor.name not in frozen], fragments)
        if len(parts) > 1:
            _check_parts(description)
        return cls(tuple(parts), spec.pushes, treatments.keys() - frozen, frozen, in_rounds)

    def pushed(self, name: str, local: Array, base: Array) -> Array:
        """What is pushed of a tensor that was `base` before it was trained, in memory of its own."""
        if self.pushes is Pushes.PARAMETERS or name in self.buffers:
            return local.copy()
        first, second = (local, base) if self.pushes is Pushes.DELTAS else (base, local)
        return np.subtract(first, second, out=np.empty_like(base))

    def left_behind(self, answer: Parameters) -> bool:
        """Whether the set went on without this worker: its push had no effect, or other rounds were over before the answer."""
        assert answer.receipt is not None
        missed = self.in_rounds and len(self.parts) > 1 and answer.version != answer.receipt.version
        return missed or answer.receipt.outcome in WITHOUT_EFFECT


def _check_parts(description: Description) -> None:
    """Raises InvalidArgument for a set to which parts can't be pushed in turn."""
    policy, spec = description.policy, description.spec
    if isinstance(policy, Buffered) or spec.transforms.accumulate > 1:
        raise InvalidArgument(
            f"expected one fragment in a set that adds up pushes, which must be of the same; got {policy}"
        )
    if isinstance(policy, Sync) and policy.late is Late.CARRY:
        raise InvalidArgument(
            f"expected one fragment, or late='discard': a late push is of another fragment; got {policy}"
        )
    if not isinstance(policy, Sync) and spec.pushes is Pushes.PARAMETERS:
        raise InvalidArgument(
            "expected one fragment, or pushes='deltas': without rounds, a set does not know from which version a fragment was "
            f"trained; got {policy}"
        )
