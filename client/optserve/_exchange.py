"""What goes over a session: a push, a pull, or both at once, and how far they have got."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from optserve._compression import CompressedPush
from optserve._copy import address
from optserve._results import Position, Receipt
from optserve._rows import Indices, encode_rows
from optserve._specification import TensorSpec
from optserve.formats import Format
from optserve.v1 import step_pb2

Arrays = dict[str, np.ndarray[Any, Any]]
Declared = list[tuple[TensorSpec, step_pb2.Role, Format | None, bytes | None]]


@dataclass(frozen=True)
class OutgoingPush:
    """What a worker pushes: C-contiguous arrays by name, and hyperparameters that change with it, by group.

    `rows` says of which rows some gradients are, `samples` of how many samples they are the mean.
    """

    gradients: Arrays
    parameters: Arrays
    changes: Mapping[str, Mapping[str, Any]]
    compressed: CompressedPush | None = None
    loss_scale: float = 1.0
    rows: Mapping[str, Indices] = field(default_factory=dict)
    samples: float = 1.0

    @functools.cached_property
    def declared(self) -> Declared:
        """Specification, role, format and rows of every array, in the order in which they are sent; raises InvalidTensor."""
        format = self.compressed.compressor.format if self.compressed is not None else None
        return [
            *(
                (
                    TensorSpec.of(name, array),
                    step_pb2.ROLE_GRADIENT,
                    format,
                    self._encoded_rows(name),
                )
                for name, array in self.gradients.items()
            ),
            *(
                (TensorSpec.of(name, array), step_pb2.ROLE_PARAMETER, None, None)
                for name, array in self.parameters.items()
            ),
        ]

    def _encoded_rows(self, name: str) -> bytes | None:
        return encode_rows(self.rows[name]) if name in self.rows else None


class Listener(Protocol):
    """Hears of a step before all of it is done, in the thread that makes the call."""

    def decided(self, receipt: Receipt) -> None:
        """The server has said what became of the push."""

    def arrived(self, name: str, array: "np.ndarray[Any, Any]") -> None:
        """All of a tensor is there, while others may not be. Not called for tensors that come together, as in shared memory."""


@dataclass(frozen=True, slots=True)
class OutgoingPull:
    """What a worker asks for: tensors in order (none: all), and from which position on (None: any).

    Without `copy`, arrays may lie in shared memory and are valid until the next push or pull. With `evaluation`, it asks for
    the parameters to evaluate; with `rows`, for some rows of tensors. A `listener` hears how far it is.
    """

    tensors: tuple[str, ...] = ()
    newer_than: Position | None = None
    copy: bool = True
    evaluation: bool = False
    rows: Mapping[str, Indices] = field(default_factory=dict)
    listener: Listener | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The identity of a push that may have got through; `repeated` if its sequence had been consumed before it was sent."""

    epoch: int
    sequence: int
    repeated: bool = False


@dataclass(slots=True)
class Ahead:
    """What a stream has carried of a push that is not complete yet: gradients by name, which may be sent again as often."""

    sequence: int
    declared: Declared
    gradients: Arrays = field(default_factory=dict)
    nbytes: int = 0

    @classmethod
    def of(cls, sequence: int, tensors: Iterable[TensorSpec]) -> "Ahead":
        """Nothing yet of a push of gradients of these tensors."""
        return cls(sequence, [(spec, step_pb2.ROLE_GRADIENT, None, None) for spec in tensors])

    @property
    def places(self) -> dict[str, int]:
        """The places of the tensors in the push."""
        return {spec.name: place for place, (spec, _, _, _) in enumerate(self.declared)}

    def has(self, name: str, gradient: np.ndarray[Any, Any]) -> bool:
        """Whether this very memory was sent; it is kept alive, so that nothing else can lie there."""
        sent = self.gradients.get(name)
        return sent is not None and address(sent) == address(gradient) and sent.dtype == gradient.dtype

    def add(self, gradients: Arrays) -> None:
        """These were sent."""
        self.gradients |= gradients
        self.nbytes += sum(each.nbytes for each in gradients.values())


@dataclass(slots=True)
class Exchange:
    """A push, a pull, or both, and how far they have got; or a barrier.

    `attempt` is None as long as no push can have got through; `kept` is the one of which the replay window has a copy.
    """

    push: OutgoingPush | None
    pull: OutgoingPull | None
    attempt: Attempt | None = None
    kept: Attempt | None = None
    receipt: Receipt | None = None
    barrier: bool = False

    @property
    def refused(self) -> bool:
        """Whether the push was refused; a pull that came with it is then not answered."""
        return self.receipt is not None and self.receipt.refused

    def decided(self, receipt: Receipt) -> None:
        """The server has said what became of the push."""
        self.receipt = receipt
        if self.push is not None and self.push.compressed is not None:
            self.push.compressed.decided(taken=receipt.refusal is None)
        if self.pull is not None and self.pull.listener is not None:
            self.pull.listener.decided(receipt)
