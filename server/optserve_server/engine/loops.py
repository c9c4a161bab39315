"""The compiled loops over memory: update, guard, mean, encode, decode. All release the GIL, and none allocates but a block.

Work is a table of ranges, one row for each run of consecutive elements, so that a push of a thousand small tensors is one
call. Gradients are read where they were received, through their address; x86-64 and ARM64 load unaligned elements.
Arithmetic follows IEEE 754 to the letter (no fastmath, no contraction) with two exceptions: in the sum of squares the compiler
may reassociate within a block, and updates take denormal numbers for zero (`denormals`). Blocks are fixed, so results do not
depend on chunks, threads or transport.
"""

import enum
import functools
import linecache
import typing
from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from optserve._dtypes import DType
from optserve._specification import BLOCK
from optserve_server.engine.denormals import flush, restore
from optserve_server.engine.formats import bits, decoder, encoder
from optserve_server.engine.readers import pointer, reader
from optserve_server.engine.rules import Preparation, Rule
from optserve_server.engine.slot_formats import SlotFormat, first_random, next_random

Loop = Callable[..., Any]

_compile = functools.partial(njit, nogil=True, error_model="numpy")


# Columns of an update's table of ranges: first element and count in the arena, row of `scalars`, address and skip (`readers`)
# of the gradient and, for sets that hold moments only, of the caller's parameters; whether to start from `before`; and t.
UPDATE_COLUMNS = 9

_UPDATE = """\
def update(ranges, scalars, before, parameters{slots}):
    flags = flush()
    buffer, held_buffer = new_buffer(), new_held_buffer(){blocks}
    for r in range(len(ranges)):
        start, end, row = ranges[r, 0], ranges[r, 0] + ranges[r, 1], ranges[r, 2]
        {prepared} = {prepared_values}
        h = Scalars({values})
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            gradient = read(ranges[r, 3], ranges[r, 4] + first - start, last - first, buffer)
            p = parameters[first:last]
{views}{elements}
    restore(flags)
"""

# What starts from `before` is copied a block at a time, and found in the cache: one loop serves updates in place and others.
_OF_PARAMETERS = """\
            if ranges[r, 7]:
                old = before[first:last]
                for i in range(last - first):
                    p[i] = old[i]
            for i in range(last - first):
                {state} = rule(p[i] - shrink * p[i], bounded(scale * decode(gradient[i]), bound) + l2 * p[i]{own}, h)
"""

# The caller keeps the parameters: the arena receives what to add to them.
_OF_MOMENTS = """\
            held = read_held(ranges[r, 5], ranges[r, 6] + first - start, last - first, held_buffer)
            for i in range(last - first):
                {state} = rule(zero, bounded(scale * decode(gradient[i]), bound) + l2 * decode_held(held[i]){own}, h)
                p[i] -= shrink * decode_held(held[i])
"""


class _SlotText(NamedTuple):
    """What the source of an update says of slot number `k`, which it calls `s`."""

    block: str
    view: str
    before: str
    after: str
    encode: str
    store: str


_IN_FULL = _SlotText(
    block="", view="            {s} = {s}_arena[first:last]\n", before="{s}[i]", after="{s}[i]", encode="", store=""
)
_ENCODED = _SlotText(
    block="\n    {s}_block = {s}_new_block()",
    view="""\
            {s} = {s}_load({s}_arena, first, last, {s}_block)
            {s}_random = first_random(first, ranges[r, 8], {k})
""",
    before="{s}_decode({s}[i])",
    after="{s}_after",
    encode="""\
                {s}[i] = {s}_encode({s}_after, {s}_random)
                {s}_random = next_random({s}_random)
""",
    store="            {s}_store({s}_arena, first, last, {s}_block, ranges[r, 8], {k})\n",
)


@njit(error_model="numpy")
def _unchanged(x: Any, bound: Any) -> Any:
    return x


@njit(error_model="numpy")
def _clipped(x: Any, bound: Any) -> Any:
    return min(max(x, -bound), bound)


@functools.cache
def update_loop(
    rule: Rule,
    scalars: type[Any],
    dtype: DType,
    held: DType | None = None,
    *,
    clips: bool,
    formats: tuple[SlotFormat | None, ...],
) -> Loop:
    """`update(ranges, scalars, before, parameters, *slots)`: one step of a rule on gradients of a dtype.

    In a set that holds moments only, `held` is the dtype of the caller's parameters, and the arena receives updates. With
    `clips`, gradients are kept within `Preparation.bound`.

    `ranges` is int64 [n, UPDATE_COLUMNS]. A row of the array `scalars` holds the Preparation, then the rule's own, of the given
    NamedTuple, in the compute dtype. Slots are updated in place; so are parameters, except for ranges that start from those in
    `before`. All are arrays of the compute dtype, but for slots that are kept in one of `formats`. The source is written out
    for the rule's number of slots, since Numba has no loop over arrays of a tuple that vectorises.
    """
    prepared = len(Preparation._fields)
    slots = [
        _SlotText(*(part.format(s=f"s{k}", k=k) for part in (_ENCODED if format else _IN_FULL)))
        for k, format in enumerate(formats)
    ]
    body = _OF_PARAMETERS if held is None else _OF_MOMENTS
    (read, new_buffer), (read_held, new_held_buffer) = reader(dtype), reader(held or dtype)
    elements = body.format(
        state=", ".join(["p[i]", *(slot.after for slot in slots)]), own="".join(f", {slot.before}" for slot in slots)
    )
    text = _UPDATE.format(
        slots="".join(f", s{k}_arena" for k in range(len(slots))),
        blocks="".join(slot.block for slot in slots),
        prepared=", ".join(Preparation._fields),
        prepared_values=", ".join(f"scalars[row, {k}]" for k in range(prepared)),
        values=", ".join(f"scalars[row, {prepared + k}]" for k in range(len(scalars._fields))),
        views="".join(slot.view for slot in slots),
        elements=elements + "".join(slot.encode for slot in slots) + "".join(slot.store for slot in slots),
    )
    compute = dtype.compute.type
    namespace = {
        "BLOCK": BLOCK,
        "bounded": _clipped if clips else _unchanged,
        "decode": decoder(dtype),
        "decode_held": decoder(held or dtype),
        "flush": flush,
        "restore": restore,
        "new_buffer": new_buffer,
        "new_held_buffer": new_held_buffer,
        "first_random": first_random,
        "next_random": next_random,
        "read": read,
        "read_held": read_held,
        "rule": njit(error_model="numpy")(rule.function),
        "Scalars": scalars,
        "zero": compute(0),
    }
    for k, format in enumerate(formats):
        if format is not None:
            namespace |= {f"s{k}_{name}": function for name, function in format.functions.items()}
    filename = f"<update loop of {rule.function.__name__} on {dtype.name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(text, filename, "exec"), namespace)  # noqa: S102 - our own template, no input
    return typing.cast(Loop, _compile(namespace["update"]))


@functools.cache
def guard_loop(dtype: DType) -> Loop:
    """`guard(table, sums, digests)`: the sum of squares and the digest of each block of gradients.

    A row of `table`, int64 [n, 4], is the first element, a multiple of BLOCK, the number of elements, address and skip.
    `sums` is float64 [blocks], `digests` uint32 [blocks]; elements 0 to BLOCK make the first block. A sum is finite exactly
    if every element is, except that float64 squares may overflow. Of a word w, rotated so that its sign is the lowest bit, and
    its place i the digest has w(w + 2i + 1): what a flipped sign or another change adds depends on all of the word, so that
    those of several don't cancel, but by chance or among a few round numbers. One loop does both, so that the arithmetic of one
    part hides behind the other and the whole behind the memory.
    """
    decode, (read, new_buffer) = decoder(dtype), reader(dtype)
    itemsize = bits(dtype).itemsize
    word = np.dtype(f"u{itemsize}").type
    left = np.uint32(33 - min(32, 8 * itemsize))  # by which the sign becomes the lowest bit
    right = np.uint32(32 - left)

    @njit(error_model="numpy")
    def folded(bits: Any) -> Any:
        return np.uint32(np.uint32(bits) + np.uint32(np.uint32(bits >> 32) * np.uint32(0x9E3779B1)))

    @njit(error_model="numpy")
    def widened(bits: Any) -> Any:
        return np.uint32(bits)

    fold = folded if itemsize == 8 else widened

    @njit(error_model="numpy", fastmath={"reassoc"})
    def guarded(elements: Any, words: Any) -> Any:
        total, digest = 0.0, np.uint32(0)
        for i in range(elements.size):
            value = np.float64(decode(elements[i]))
            total += value * value
            mixed = fold(words[i])
            mixed = np.uint32(np.uint32(mixed << left) | np.uint32(mixed >> right))
            digest = np.uint32(digest + np.uint32(mixed * np.uint32(mixed + np.uint32(2 * i + 1))))
        return total, digest

    def guard(table: Any, sums: Any, digests: Any) -> None:
        buffer = new_buffer()
        for r in range(len(table)):
            block, count = table[r, 0] // BLOCK, table[r, 1]
            for start in range(0, count, BLOCK):
                elements = read(table[r, 2], table[r, 3] + start, min(BLOCK, count - start), buffer)
                sums[block], digests[block] = guarded(elements, elements.view(word))
                block += 1

    return typing.cast(Loop, _compile(guard))


BLEND_COLUMNS = 3


@functools.cache
def blend_loop() -> Loop:
    """`blend(table, scalars, parameters, slot)`: move a slot towards the parameters.

    A row of `table`, int64 [n, BLEND_COLUMNS], is the first element and the count in the arena, and a row of `scalars`, of the
    arena's dtype: how far, from 0 to 1, and whether the parameters then become what the slot is.
    """

    def blend(table: Any, scalars: Any, parameters: Any, slot: Any) -> None:
        for r in range(len(table)):
            start, end = table[r, 0], table[r, 0] + table[r, 1]
            weight, back = scalars[table[r, 2], 0], scalars[table[r, 2], 1]
            p, s = parameters[start:end], slot[start:end]
            if weight == 1:
                for i in range(end - start):
                    s[i] = p[i]
            else:
                for i in range(end - start):
                    s[i] += weight * (p[i] - s[i])
            if back != 0:
                for i in range(end - start):
                    p[i] = s[i]

    return typing.cast(Loop, _compile(blend))


MEAN_COLUMNS = 6


@functools.cache
def mean_loop(dtype: DType) -> Loop:
    """`mean(table, weights, arena)`: add up gradients of several pushes, each times a weight of the arena's dtype.

    A row of `table`, int64 [n, MEAN_COLUMNS], is the first element and the count in the arena, address and skip of a
    gradient, the place of its weight, and whether it is the first there, which replaces what the arena has.
    """
    decode, (read, new_buffer) = decoder(dtype), reader(dtype)

    def mean(table: Any, weights: Any, arena: Any) -> None:
        buffer = new_buffer()
        for r in range(len(table)):
            start, end, weight = table[r, 0], table[r, 0] + table[r, 1], weights[table[r, 4]]
            for first in range(start, end, BLOCK):
                count = min(BLOCK, end - first)
                target = arena[first : first + count]
                gradient = read(table[r, 2], table[r, 3] + first - start, count, buffer)
                if table[r, 5]:
                    for i in range(count):
                        target[i] = weight * decode(gradient[i])
                else:
                    for i in range(count):
                        target[i] += weight * decode(gradient[i])

    return typing.cast(Loop, _compile(mean))


class Compensation(enum.Enum):
    """What is done about the distance between the parameters of now and those that a gradient was computed at."""

    NONE = "none"
    DELAY = "delay"
    GAP = "gap"


@functools.cache
def compensated_mean_loop(dtype: DType, kind: Compensation, *, differences: bool) -> Loop:
    """`mean(table, scalars, arena, now, base, squares)`: as `mean_loop`, of gradients that are compensated first.

    A row of `scalars`, of the arena's dtype, is a weight, what is multiplied with the elements, and the compensation's scale.
    With `differences`, the elements are parameters, and their gradient is `base`, rounded as they are, less those. For gaps,
    `squares` are mean squares of each element's steps, and the scale is what they are to be multiplied by.
    """
    decode, (read, new_buffer) = decoder(dtype), reader(dtype)
    encode = encoder(dtype) if differences else decode

    @njit(error_model="numpy")
    def delayed(g: Any, now: Any, base: Any, square: Any, scale: Any) -> Any:
        return g + g * (scale * g * (now - base))  # so that no square overflows where nothing has moved

    @njit(error_model="numpy")
    def gapped(g: Any, now: Any, base: Any, square: Any, scale: Any) -> Any:
        gap, step = abs(now - base), sqrt(square * scale)
        return g if gap == 0 else g * (step / (step + gap))

    @njit(error_model="numpy")
    def plain(g: Any, now: Any, base: Any, square: Any, scale: Any) -> Any:
        return g

    @njit(error_model="numpy")
    def difference(value: Any, factor: Any, base: Any) -> Any:
        return decode(encode(base)) - value

    @njit(error_model="numpy")
    def scaled(value: Any, factor: Any, base: Any) -> Any:
        return factor * value

    compensate = {Compensation.NONE: plain, Compensation.DELAY: delayed, Compensation.GAP: gapped}[kind]
    gradient_of = difference if differences else scaled

    def mean(table: Any, scalars: Any, arena: Any, now: Any, base: Any, squares: Any) -> None:
        buffer = new_buffer()
        for r in range(len(table)):
            start, end = table[r, 0], table[r, 0] + table[r, 1]
            weight, factor, scale = scalars[table[r, 4], 0], scalars[table[r, 4], 1], scalars[table[r, 4], 2]
            for first in range(start, end, BLOCK):
                count = min(BLOCK, end - first)
                target, here, there = (
                    arena[first : first + count],
                    now[first : first + count],
                    base[first : first + count],
                )
                square = squares[first : first + count]
                pushed = read(table[r, 2], table[r, 3] + first - start, count, buffer)
                for i in range(count):
                    gradient = gradient_of(decode(pushed[i]), factor, there[i])
                    gradient = weight * compensate(gradient, here[i], there[i], square[i], scale)
                    target[i] = gradient if table[r, 5] else target[i] + gradient

    return typing.cast(Loop, _compile(mean))


@functools.cache
def scale_loop() -> Loop:
    """`scale(table, factor, arena)`: multiply elements by a number.

    A row of `table`, int64 [n, 2], is the first element and the count in the arena; `factor`, of the arena's dtype, has one.
    """

    def scale(table: Any, factor: Any, arena: Any) -> None:
        for r in range(len(table)):
            elements = arena[table[r, 0] : table[r, 0] + table[r, 1]]
            for i in range(elements.size):
                elements[i] *= factor[0]

    return typing.cast(Loop, _compile(scale))


@functools.cache
def step_loop() -> Loop:
    """`step(table, decay, before, squares, now)`: take note of how far elements have moved since `before`.

    A row of `table` is as in `scale_loop`; `squares` are running means of the squares, `decay` what is kept of them.
    """

    def step(table: Any, decay: Any, before: Any, squares: Any, now: Any) -> None:
        for r in range(len(table)):
            start, end = table[r, 0], table[r, 0] + table[r, 1]
            b, s, p = before[start:end], squares[start:end], now[start:end]
            for i in range(end - start):
                moved = p[i] - b[i]
                s[i] = moved * moved + decay[0] * (s[i] - moved * moved)
                b[i] = p[i]

    return typing.cast(Loop, _compile(step))


@functools.cache
def encode_loop(dtype: DType) -> Loop:
    """`encode(table, arena)`: round elements of an arena into bytes of a dtype.

    A row of `table`, int64 [n, 3], is the first element and the count in the arena, and the address to write to.
    """
    element, encode_element = bits(dtype).type, encoder(dtype)

    def encode(table: Any, arena: Any) -> None:
        for r in range(len(table)):
            start, count = table[r, 0], table[r, 1]
            source = arena[start : start + count]
            target = carray(pointer(table[r, 2], element), count)
            for i in range(count):
                target[i] = encode_element(source[i])

    return typing.cast(Loop, _compile(encode))


@functools.cache
def decode_loop(dtype: DType) -> Loop:
    """`decode(table, arena)`: the reverse of `encode_loop`, with the address to read from in the third column."""
    element, decode_element = bits(dtype).type, decoder(dtype)

    def decode(table: Any, arena: Any) -> None:
        for r in range(len(table)):
            start, count = table[r, 0], table[r, 1]
            target = arena[start : start + count]
            source = carray(pointer(table[r, 2], element), count)
            for i in range(count):
                target[i] = decode_element(source[i])

    return typing.cast(Loop, _compile(decode))
