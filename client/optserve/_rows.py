"""Rows: parts of a tensor by index or key, as embeddings need them."""

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optserve._dtypes import DType, dtype_named
from optserve._errors import InvalidTensor

MOST_ROWS = 1 << 20  # of a push or a pull: their indices travel in one message
LARGEST_CAPACITY = 1 << 31  # rows of a table
LARGEST_KEY = 2**63 - 1
LARGEST = 1e300  # of what initial rows are drawn with

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowSparse:
    """Some rows of a tensor, along its first dimension: `rows`, int64 [k], and `values` [k, ...].

    Of a table, `rows` are keys. As a gradient, rows that come more than once are added up. Raises InvalidTensor.
    """

    rows: Indices
    values: "np.ndarray[Any, Any]"

    def __init__(self, rows: ArrayLike, values: ArrayLike) -> None:
        object.__setattr__(self, "rows", as_indices(rows))
        try:
            object.__setattr__(self, "values", np.asarray(values))
        except ValueError as error:
            raise InvalidTensor(f"expected values as an array; {error}") from None
        if self.values.ndim < 1 or len(self.values) != len(self.rows):
            raise InvalidTensor(
                f"expected a row of values for each of {len(self.rows)} rows; got values of shape {list(self.values.shape)}"
            )


def _check_number(what: str, value: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and -LARGEST < value < LARGEST):
        raise InvalidTensor(f"expected {what} of a table's initial rows to be a finite number; got {value!r}")


def _check_seed(value: Any) -> None:
    if not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise InvalidTensor(f"expected a seed of 64 bits; got {value!r}")


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element of a new row is `value`; raises InvalidTensor if it is not finite."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _check_number("value", self.value)

    @property
    def largest(self) -> float:
        """A magnitude that no element exceeds."""
        return abs(self.value)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Elements of a new row are drawn uniformly from [low, high), from `seed`, the row's key and their places alone.

    Raises InvalidTensor.
    """

    low: float
    high: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("low", self.low)
        _check_number("high", self.high)
        _check_seed(self.seed)
        if not self.low <= self.high:
            raise InvalidTensor(f"expected low to be at most high; got {self.low} and {self.high}")

    @property
    def largest(self) -> float:
        """A magnitude that no element exceeds."""
        return max(abs(self.low), abs(self.high), self.high - self.low)


@dataclass(frozen=True, slots=True)
class Normal:
    """Elements of a new row are drawn normally around 0, from `seed`, the row's key and their places alone.

    Raises InvalidTensor.
    """

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("std", self.std)
        _check_seed(self.seed)
        if self.std < 0:
            raise InvalidTensor(f"expected std to be at least 0; got {self.std}")

    @property
    def largest(self) -> float:
        """A magnitude that no element exceeds: 53 random bits give no logarithm below -37."""
        return 9.0 * self.std


Initial = Constant | Uniform | Normal


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor whose rows are not known in advance: one comes into being when a gradient for its key, any int64, first comes.

    `shape` is that of a row, `capacity` the most rows there will be, for whose address space there must be room. Until then a
    row has its initial value. Raises InvalidTensor.
    """

    shape: tuple[int, ...]
    capacity: int
    dtype: DType = field(default=dtype_named("float32"))
    initial: Initial = Constant()

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, DType):
            name = (
                self.dtype if isinstance(self.dtype, str) else getattr(np.dtype(self.dtype), "name", repr(self.dtype))
            )
            object.__setattr__(self, "dtype", dtype_named(name))
        if not (isinstance(self.shape, tuple) and all(isinstance(size, int) for size in self.shape)):
            raise InvalidTensor(f"expected the shape of a table's row as a tuple of whole numbers; got {self.shape!r}")
        whole = isinstance(self.capacity, int) and not isinstance(self.capacity, bool)
        if not whole or not 1 <= self.capacity <= LARGEST_CAPACITY:
            raise InvalidTensor(f"expected a table of 1 to {LARGEST_CAPACITY} rows; got {self.capacity!r}")
        if not isinstance(self.initial, Initial):
            raise InvalidTensor(f"expected a table's initial rows as Constant, Uniform or Normal; got {self.initial!r}")


def as_mapping(tensors: Any) -> Mapping[str, Any]:
    """Tensors by name; raises InvalidTensor for anything else."""
    if not isinstance(tensors, Mapping):
        raise InvalidTensor(f"expected a mapping from tensor names to arrays; got {type(tensors).__name__}")
    return tensors


def as_indices(rows: ArrayLike) -> Indices:
    """Indices or keys of rows, int64 [k]; raises InvalidTensor."""
    array = np.asarray(rows)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidTensor(f"expected rows as whole numbers in one dimension; got {array.dtype}{list(array.shape)}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > LARGEST_KEY:
        raise InvalidTensor(f"expected rows of at most 2**63 - 1; got {array.max()}. View unsigned keys as int64")
    return np.ascontiguousarray(array, np.int64)


def encode_rows(rows: Indices) -> bytes:
    """Indices as little-endian bytes."""
    return rows.astype("<i8", copy=False).tobytes()


def decode_rows(data: bytes) -> Indices:
    """The reverse of `encode_rows`; raises InvalidTensor."""
    if len(data) % 8:
        raise InvalidTensor(f"expected rows as 8 bytes each; got {len(data)} bytes")
    return np.frombuffer(data, "<i8").astype(np.int64, copy=False)


def check_count(rows: Iterable[Indices]) -> None:
    """Raises InvalidTensor for more rows than one message takes."""
    count = sum(map(len, rows))
    if count > MOST_ROWS:
        raise InvalidTensor(f"expected at most {MOST_ROWS} rows at a time; got {count}. Take them in several calls")


def split(gradients: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Indices]]:
    """Gradients with the values of those that are row-sparse in their place, and the rows of these; raises InvalidTensor."""
    rows = {name: each.rows for name, each in as_mapping(gradients).items() if isinstance(each, RowSparse)}
    check_count(rows.values())
    values = {name: each.values if isinstance(each, RowSparse) else each for name, each in gradients.items()}
    return values, rows
