"""What a parameter set is made of: tensors, groups, ids. Plain values, checked where they are built."""

import enum
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from optserve._dtypes import DType, dtype_named
from optserve._errors import InvalidArgument, InvalidGroup, InvalidName, InvalidTensor
from optserve._policies import ASYNC, Policy
from optserve._rows import LARGEST_CAPACITY, Initial, as_mapping
from optserve._transforms import PLAIN, Transforms
from optserve._treatments import Treatment, resolved
from optserve.optim import Group, Optimizer

BLOCK = 4096  # elements: the unit of reductions on the server; chunks that end at multiples of it are read in place
MOST_BUFFERS = 3  # of parameters that the server has of one set at a time, and a worker on its host maps
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48
MAX_TENSORS = 100_000

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Holds(enum.Enum):
    """What the server keeps: parameters and moments, or moments only (it then returns updates)."""

    PARAMETERS = "parameters"
    MOMENTS = "moments"


class StateFormat(enum.Enum):
    """How averages of gradients and of their squares are kept: in full, in 2 bytes an element, or in 1 and a scale for 256."""

    FULL = "full"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InvalidArgument(f"expected state to be {', '.join(repr(each.value) for each in cls)}; got {value!r}")


class Journal(enum.Enum):
    """What makes pushes durable between checkpoints: nothing, a journal synced every second, or before each receipt."""

    OFF = "off"
    EVERYSEC = "everysec"
    ALWAYS = "always"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InvalidArgument(f"expected journal to be {', '.join(repr(each.value) for each in cls)}; got {value!r}")


class Pushes(enum.Enum):
    """What workers push: gradients, deltas to be added to the parameters, or the parameters that they trained."""

    GRADIENTS = "gradients"
    DELTAS = "deltas"
    PARAMETERS = "parameters"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise InvalidArgument(f"expected pushes to be {', '.join(repr(each.value) for each in cls)}; got {value!r}")


def check_set_id(value: str) -> str:
    """Return a parameter set's id such as `digits/mlp`; raises InvalidName if it is ill-formed."""
    if len(value) > 512 or not all(_COMPONENT.fullmatch(component) for component in value.split("/")):
        raise InvalidName(
            "expected an id of components joined by '/', each of letters, digits, '.', '_', '-' and starting with a "
            f"letter or digit, at most 128 characters a component and 512 in all, such as 'digits/mlp'; got {value!r}"
        )
    return value


def check_client_id(value: str) -> str:
    """Return a client id; raises InvalidName if it is ill-formed."""
    if not _COMPONENT.fullmatch(value):
        raise InvalidName(
            "expected a client id of at most 128 letters, digits, '.', '_', '-', starting with a letter or digit; "
            f"got {value!r}"
        )
    return value


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor; raises InvalidName or InvalidTensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidName(f"expected a tensor name of type str; got {type(self.name).__name__}: {self.name!r}")
        if not 0 < len(self.name) <= 512 or _CONTROL.search(self.name):
            raise InvalidName(f"expected a tensor name of 1 to 512 printable characters; got {self.name!r}")
        if len(self.shape) > MAX_DIMENSIONS:
            raise InvalidTensor(f"expected at most {MAX_DIMENSIONS} dimensions; {self.name!r} has {len(self.shape)}")
        if any(not 0 <= size <= MAX_ELEMENTS for size in self.shape) or self.size > MAX_ELEMENTS:
            raise InvalidTensor(f"expected 0 to 2**48 elements; {self.name!r} has shape {list(self.shape)}")

    @classmethod
    def of(cls, name: str, array: np.ndarray[Any, Any]) -> Self:
        """The specification of an array; raises InvalidTensor if its dtype is not one that travels."""
        return cls._made(name, array.dtype, array.shape)

    @classmethod
    @functools.lru_cache(maxsize=10_000)  # a worker pushes the same tensors again and again
    def _made(cls, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Self:
        try:
            return cls(name, dtype_named(dtype.name), shape)
        except InvalidTensor as error:
            raise InvalidTensor(f"tensor {name!r}: {error}") from None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on the wire in bytes."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name!r}: {self.dtype.name}{list(self.shape)}"


class Run(NamedTuple):
    """Consecutive elements of one tensor: the tensor's index in a list agreed before, first element, number of elements."""

    tensor: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ParameterSetSpec:
    """All that a parameter set is created from; raises InvalidName, InvalidTensor or InvalidGroup."""

    id: str
    tensors: tuple[TensorSpec, ...]
    optimizer: Optimizer
    groups: tuple[Group, ...] = ()
    holds: Holds = field(default=Holds.PARAMETERS)
    guard: bool = True
    policy: Policy = ASYNC
    transforms: Transforms = PLAIN
    state: StateFormat = StateFormat.FULL
    tables: Mapping[str, Initial] = field(default_factory=dict)
    journal: Journal = Journal.OFF
    pushes: Pushes = Pushes.GRADIENTS
    buffers: Mapping[str, Treatment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_set_id(self.id)
        if not 1 <= len(self.tensors) <= MAX_TENSORS:
            raise InvalidTensor(f"expected 1 to {MAX_TENSORS} tensors; {self.id!r} has {len(self.tensors)}")
        for kind, error, names in (
            ("tensor", InvalidTensor, [tensor.name for tensor in self.tensors]),
            ("group", InvalidGroup, [group.name for group in self.groups]),
        ):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)[:10]
            if repeated:
                raise error(f"expected unique {kind} names; {', '.join(map(repr, repeated))} came more than once")
        _ = self.treatments
        tensors = {tensor.name: tensor for tensor in self.tensors} if self.tables else {}
        for name, initial in self.tables.items():
            if name not in tensors or not tensors[name].shape or not 1 <= tensors[name].shape[0] <= LARGEST_CAPACITY:
                raise InvalidTensor(
                    f"expected a table to be a tensor of 1 to {LARGEST_CAPACITY} rows; got {tensors.get(name, name)}"
                )
            if initial.largest > tensors[name].dtype.largest:
                raise InvalidTensor(f"expected initial rows that {tensors[name]} can hold; got {initial}")

    @property
    def treatments(self) -> dict[int, Treatment]:
        """What becomes of the tensors that no rule touches, by index."""
        return resolved([tensor.name for tensor in self.tensors], self.buffers)

    @property
    def sent(self) -> tuple[TensorSpec, ...]:
        """The tensors as their initial values come: of tables, no row."""
        return tuple(
            replace(tensor, shape=(0, *tensor.shape[1:])) if tensor.name in self.tables else tensor
            for tensor in self.tensors
        )


def as_arrays(tensors: Mapping[str, ArrayLike]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors as C-contiguous little-endian arrays, copied only where they are not that already.

    Raises InvalidTensor.
    """
    arrays = {}
    for name, value in as_mapping(tensors).items():
        try:
            array = np.asarray(value)
        # Of tensors that are tracked, sparse tensors, and ragged lists.
        except (RuntimeError, TypeError, ValueError) as error:
            raise InvalidTensor(f"expected {name!r} to be an array, or to convert to one; {error}") from error
        little = array.dtype if array.dtype.byteorder != ">" else array.dtype.newbyteorder("<")
        arrays[name] = np.ascontiguousarray(array, dtype=little).reshape(array.shape)
    return arrays
