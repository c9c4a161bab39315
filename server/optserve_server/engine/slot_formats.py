"""Slot formats: optimizer state in fewer bits, decoded before a rule sees it and encoded after it.

What is encoded is rounded stochastically, up or down with the odds that leave its mean as it is: an average moves by a
thousandth of itself in an update, less than half of what either format can tell apart, and rounded to nearest would stand
still (Gupta et al., arXiv:1502.02551). The random bits are a hash of the element's place in the arena, the slot and t, so that
they depend on no thread, chunk or transport, and are the same after a restart.

bfloat16: the upper half of a float32, to which 16 random bits were added.

int8: blocks of 256 elements, each with its largest magnitude s as float32 and then a byte for each element, that of the
dynamic tree data type (Dettmers et al., arXiv:2110.02861) for x/s. Code j of the 127 for either sign, 254 where there is none,
is the middle of the j-th cell: seven decades from 1e-7 to 1 have 1, 2, ..., 64 cells, or twice as many, of equal width. One
more is 1 and one is 0, which no square that is not 0 becomes: the step is divided by its root. The mean stays as it is between
codes of one decade; between two decades and next to 1 it may be off by half a step.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from optserve._dtypes import BFLOAT16, FLOAT32
from optserve._errors import InvalidHyperparameter, InvalidTensor
from optserve._specification import BLOCK, ParameterSetSpec, StateFormat
from optserve_server.engine.arena import ALIGNMENT, Arena, Layout
from optserve_server.engine.formats import decoder
from optserve_server.engine.rules import AVERAGE_SQUARES, AVERAGES, Rule, rule_for

GRAIN = 256  # elements of an 8-bit block, which belongs to one tensor
DECADES = 7

_SCALE = 4  # bytes
_RECORD = _SCALE + GRAIN
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_QUIET_NAN = np.uint32(0x7FC00000)
_LEAST_SCALE = np.float32(2.0**-126)  # of which the inverse is finite
_WEYL = np.uint32(0x9E3779B1)  # 2^32 by the golden ratio, to the nearest prime
_UNIT = np.float32(2.0**-24)  # 24 random bits are this many of 1

_compile = functools.partial(njit, error_model="numpy")


@dataclass(frozen=True, eq=False)
class SlotFormat:
    """How a slot of float32 is kept: every `grain` elements are `items` values of `dtype`.

    `load(arena, first, last, block)` gives elements of an arena; each is decoded by `decode(x)`, and what the rule makes of it
    is put in its place as `encode(value, random)`; then `store(arena, first, last, block, t, slot)` puts all of them back.
    What can't be encoded element by element is left to `load` and `store`, through the block that `new_block()` gave.
    """

    dtype: np.dtype[Any]
    grain: int
    items: int
    functions: Mapping[str, Callable[..., Any]]

    def length(self, size: int) -> int:
        """Values of `dtype` that keep `size` elements."""
        return -(-size // self.grain) * self.items


class EncodedLayout(Layout):
    """The places of another layout, in arenas of a slot format; such arenas begin as zeros."""

    def __init__(self, layout: Layout, format: SlotFormat) -> None:
        self.sizes, self.places = layout.sizes, layout.places
        self._format = format

    @property
    def nbytes(self) -> int:
        """Size of one arena in bytes."""
        return sum(self._format.length(size) * self._format.dtype.itemsize for size in self.sizes.values())

    def view(self, memory: NDArray[np.uint8]) -> Arena:
        """An arena in memory that is there already; all of it is computed in float32."""
        return {compute: memory.view(self._format.dtype) for compute in self.sizes}


def layout(spec: ParameterSetSpec) -> Layout:
    """Where a set's tensors lie, so that no block of its slots has elements of two."""
    alignment = GRAIN * FLOAT32.itemsize if spec.state is StateFormat.INT8 else ALIGNMENT
    return Layout(spec.tensors, alignment)


def chosen(spec: ParameterSetSpec) -> dict[str, SlotFormat]:
    """The formats of those slots of a set that are kept in fewer bits, by name."""
    rule = rule_for(spec.optimizer)
    if spec.state is StateFormat.FULL or not isinstance(rule, Rule):
        return {}
    exact = {*rule.exact, *rule.copies, *rule.initial(spec.optimizer.at(0))}  # arenas of a format begin as zeros
    formats = dict.fromkeys(AVERAGES, _AVERAGES[spec.state]) | dict.fromkeys(AVERAGE_SQUARES, _SQUARES[spec.state])
    return {name: formats[name] for name in rule.slots if name in formats and name not in exact}


def check(spec: ParameterSetSpec) -> None:
    """Raises InvalidTensor or InvalidHyperparameter for a set whose state can't be kept in fewer bits."""
    for tensor in spec.tensors:
        if tensor.dtype.compute != FLOAT32.compute:
            raise InvalidTensor(
                f"parameter set {spec.id!r}: expected tensors of float32, bfloat16 or float16 with state={spec.state.value!r}; "
                f"got {tensor}. Keep the state in full, or put these into a set of their own"
            )
    if not chosen(spec):
        raise InvalidHyperparameter(
            f"parameter set {spec.id!r}: expected an optimizer with averages that can be kept as {spec.state.value}; "
            f"{spec.optimizer.rule} with these flags has none. Keep the state in full, or choose another"
        )


@_compile
def first_random(element: Any, t: Any, slot: Any) -> Any:
    """32 random bits for an element of an arena, of which the upper ones count: a Weyl sequence, even over neighbours, shifted
    by a hash of update and slot, and so even over updates (MurmurHash3's finalizer, A. Appleby)."""
    x = np.uint32(np.uint32(t) * _WEYL + np.uint32(slot))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> 16)) * np.uint32(0x85EBCA6B))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> 13)) * np.uint32(0xC2B2AE35))
    return np.uint32(np.uint32(np.uint32(element) * _WEYL) + np.uint32(x ^ np.uint32(x >> 16)))


@_compile
def next_random(random: Any) -> Any:
    """Those for the next element."""
    return np.uint32(random + _WEYL)


@_compile
def _encode_bfloat16(value: Any, random: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(random >> 16))
    if np.uint32(bits & _MAGNITUDE) > _INFINITY:
        rounded = np.uint32(bits | _QUIET_NAN)
    return np.uint16(rounded >> 16)


@_compile
def _no_block() -> Any:
    return None


@_compile
def _in_place(arena: Any, first: Any, last: Any, block: Any) -> Any:
    return arena[first:last]


@_compile
def _stored(arena: Any, first: Any, last: Any, block: Any, t: Any, slot: Any) -> None:
    pass


@_compile
def _decoded(x: Any) -> Any:
    return x


@_compile
def _encoded(value: Any, random: Any) -> Any:
    return value


@_compile
def _block() -> Any:
    """Room for BLOCK elements that may begin and end inside of an 8-bit block."""
    return np.empty(BLOCK + 2 * GRAIN, np.float32)


def code_book(*, signed: bool) -> NDArray[np.float32]:
    """What each byte of int8 stands for; with a sign, the byte 256 - j for what is minus that of j, and 128 for 1."""
    edges = [np.linspace(0.1, 1.0, _cells(decade, signed=signed) + 1) for decade in range(DECADES)]
    middles = [10.0 ** (k + 1 - DECADES) * (each[1:] + each[:-1]) / 2 for k, each in enumerate(edges)]
    positive = np.concatenate([[0.0], *middles, [1.0]])
    return np.concatenate([positive, -positive[-2:0:-1]] if signed else [positive]).astype(np.float32)


def lines(*, signed: bool) -> list[tuple[np.float32, np.float32]]:
    """Offset and slope of lines: where code j is at j, the place of a magnitude among the codes is the least of all of them.

    One line for each decade, in which codes are evenly spaced, and one for what lies below the first code.
    """
    below = code_book(signed=signed)[1]
    first = np.cumsum([0.5, *(_cells(decade, signed=signed) for decade in range(DECADES))])
    slopes = [_cells(k, signed=signed) * 10.0 ** (DECADES - 1 - k) / 0.9 for k in range(DECADES)]
    decades = [
        (np.float32(first[k] - slope * 10.0 ** (k - DECADES)), np.float32(slope)) for k, slope in enumerate(slopes)
    ]
    return [*decades, (np.float32(0), np.float32(1 / below))]


def _cells(decade: int, *, signed: bool) -> int:
    return (1 if signed else 2) << decade


def _int8(*, signed: bool) -> SlotFormat:
    book = code_book(signed=signed)
    last_code = np.int32(127 if signed else 254)  # before that for 1
    (a0, b0), (a1, b1), (a2, b2), (a3, b3), (a4, b4), (a5, b5), (a6, b6), (a7, b7) = lines(signed=signed)

    @_compile
    def least(y: Any, z: Any) -> Any:
        return z if z < y else y

    @_compile
    def place(x: Any) -> Any:
        y = least(least(a0 + b0 * x, a1 + b1 * x), least(a2 + b2 * x, a3 + b3 * x))
        z = least(least(a4 + b4 * x, a5 + b5 * x), least(a6 + b6 * x, a7 + b7 * x))
        return least(y, z)

    @_compile
    def load(arena: Any, first: Any, last: Any, block: Any) -> Any:
        begin = first // GRAIN
        for k in range(-(-last // GRAIN) - begin):
            record = arena[(begin + k) * _RECORD : (begin + k + 1) * _RECORD]
            codes, values = record[_SCALE:], block[k * GRAIN : (k + 1) * GRAIN]
            scale = record[:_SCALE].view(np.float32)[0]
            for i in range(GRAIN):
                values[i] = book[codes[i]] * scale
        return block[first - begin * GRAIN : last - begin * GRAIN]

    @_compile
    def encode(values: Any, scale: Any, random: Any, codes: Any) -> None:
        inverse = np.float32(1) / scale
        for i in range(GRAIN):
            value = values[i]
            code = np.int32(place(abs(value) * inverse) + np.float32(np.int32(random >> 8)) * _UNIT)
            random = next_random(random)
            code = code if code < last_code else last_code
            if signed:
                code = code if value >= 0 else np.int32(-code)
            elif code == 0 and value != 0:
                code = np.int32(1)
            code = np.int32(last_code + 1) if value == scale else code
            codes[i] = np.uint8(code)

    @_compile
    def store(arena: Any, first: Any, last: Any, block: Any, t: Any, slot: Any) -> None:
        begin = first // GRAIN
        for k in range(-(-last // GRAIN) - begin):
            record = arena[(begin + k) * _RECORD : (begin + k + 1) * _RECORD]
            codes, values = record[_SCALE:], block[k * GRAIN : (k + 1) * GRAIN]
            words, largest = values.view(np.uint32), np.uint32(0)
            for i in range(GRAIN):  # as integers, among which NaN and infinity are largest: what is not finite stays so
                magnitude = np.uint32(words[i] & _MAGNITUDE)
                largest = magnitude if magnitude > largest else largest
            scale = np.uint32(largest).view(np.float32)
            if scale < _LEAST_SCALE:
                scale = _LEAST_SCALE
            record[:_SCALE].view(np.float32)[0] = scale
            encode(values, scale, first_random((begin + k) * GRAIN, t, slot), codes)

    return SlotFormat(
        np.dtype(np.uint8),
        GRAIN,
        _RECORD,
        {"new_block": _block, "load": load, "decode": _decoded, "encode": _encoded, "store": store},
    )


_BFLOAT16 = SlotFormat(
    np.dtype(np.uint16),
    1,
    1,
    {
        "new_block": _no_block,
        "load": _in_place,
        "decode": decoder(BFLOAT16),
        "encode": _encode_bfloat16,
        "store": _stored,
    },
)
_AVERAGES = {StateFormat.BFLOAT16: _BFLOAT16, StateFormat.INT8: _int8(signed=True)}
_SQUARES = {StateFormat.BFLOAT16: _BFLOAT16, StateFormat.INT8: _int8(signed=False)}
