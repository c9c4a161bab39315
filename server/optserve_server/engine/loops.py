"""The compiled loops over memory: update, guard, mean, encode, decode. All release the GIL and none allocates.

Work is a table of ranges, one row for each run of consecutive elements, so that a push of a thousand small tensors is one
call. Gradients are read where they were received, through their address; x86-64 and ARM64 load unaligned elements.
Arithmetic follows IEEE 754 to the letter (no fastmath, no contraction) except for the sum of squares, where the compiler may
reassociate within a block; blocks are fixed, so results do not depend on chunks, threads or transport.
"""

import functools
import linecache
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from optserve._dtypes import DType
from optserve._specification import BLOCK
from optserve_server.engine.formats import bits, decoder, encoder
from optserve_server.engine.rules import Preparation, Rule

Loop = Callable[..., Any]

_compile = functools.partial(njit, nogil=True, error_model="numpy")


@intrinsic
def pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """An integer address as a typed pointer, inside compiled code."""
    target = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(target))

    return target(address, dtype), generate


# Columns of an update's table of ranges: first element and count in the arena, row of `scalars`, the addresses of the
# gradient and, for sets that hold moments only, of the caller's parameters; and whether to start from `before`.
UPDATE_COLUMNS = 6

# What starts from `before` is copied a block at a time, and found in the cache: one loop serves updates in place and others.
_UPDATE = """\
def update(ranges, scalars, before, parameters{slots}):
    for r in range(len(ranges)):
        start, end, row = ranges[r, 0], ranges[r, 0] + ranges[r, 1], ranges[r, 2]
        gradients = carray(pointer(ranges[r, 3], bits), ranges[r, 1])
        {prepared} = {prepared_values}
        h = Scalars({values})
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            gradient, p, old = gradients[first - start : last - start], parameters[first:last], before[first:last]
{views}
            if ranges[r, 5]:
                for i in range(last - first):
                    p[i] = old[i]
            for i in range(last - first):
                {state} = rule(decay * p[i], scale * decode(gradient[i]) + l2 * p[i]{elements}, h)
"""

# The caller keeps the parameters: the arena receives what to add to them.
_UPDATE_OF_MOMENTS = """\
def update(ranges, scalars, before, updates{slots}):
    for r in range(len(ranges)):
        start, count, row = ranges[r, 0], ranges[r, 1], ranges[r, 2]
        gradient = carray(pointer(ranges[r, 3], bits), count)
        held = carray(pointer(ranges[r, 4], bits), count)
        {prepared} = {prepared_values}
        h = Scalars({values})
        p, first, last = updates[start : start + count], start, start + count
{views}
        for i in range(count):
            {state} = rule(zero, scale * decode(gradient[i]) + l2 * decode(held[i]){elements}, h)
            p[i] += (decay - one) * decode(held[i])
"""


@functools.cache
def update_loop(rule: Rule, dtype: DType, *, moments_only: bool) -> Loop:
    """`update(ranges, scalars, before, parameters, *slots)`: one step of a rule on gradients of a dtype.

    `ranges` is int64 [n, UPDATE_COLUMNS]. A row of `scalars` holds the Preparation, then the rule's scalars, in the compute
    dtype. Slots are updated in place; so are parameters, except for ranges that start from those in `before`. All are arrays
    of the compute dtype. The source is written out for the rule's number of slots, since Numba has no loop over arrays of a
    tuple that vectorises.
    """
    scalars = typing.get_type_hints(rule.scalars)["return"]
    prepared = len(Preparation._fields)
    names = [f"s{k}" for k in range(len(rule.slots))]
    template = _UPDATE_OF_MOMENTS if moments_only else _UPDATE
    indent = " " * (8 if moments_only else 12)
    text = template.format(
        slots="".join(f", {name}_arena" for name in names),
        prepared=", ".join(Preparation._fields),
        prepared_values=", ".join(f"scalars[row, {k}]" for k in range(prepared)),
        values=", ".join(f"scalars[row, {prepared + k}]" for k in range(len(scalars._fields))),
        views="\n".join(f"{indent}{name} = {name}_arena[first:last]" for name in names),
        state=", ".join(f"{name}[i]" for name in ["p", *names]),
        elements="".join(f", {name}[i]" for name in names),
    )
    compute = dtype.compute.type
    namespace = {
        "BLOCK": BLOCK,
        "bits": bits(dtype).type,
        "carray": carray,
        "decode": decoder(dtype),
        "one": compute(1),
        "pointer": pointer,
        "rule": njit(error_model="numpy")(rule.function),
        "Scalars": scalars,
        "zero": compute(0),
    }
    filename = f"<update loop of {rule.function.__name__} on {dtype.name}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(text, filename, "exec"), namespace)  # noqa: S102 - our own template, no input
    return typing.cast(Loop, _compile(namespace["update"]))


@functools.cache
def guard_loop(dtype: DType) -> Loop:
    """`guard(table, sums, digests)`: the sum of squares and the digest of each block of gradients.

    A row of `table`, int64 [n, 3], is the first element, a multiple of BLOCK, the number of elements, and the address.
    `sums` is float64 [blocks], `digests` uint32 [blocks]; elements 0 to BLOCK make the first block. A sum is finite exactly
    if every element is, except that float64 squares may overflow. One loop does both, so that the arithmetic of one part
    hides behind the other and the whole behind the memory.
    """
    element, decode = bits(dtype).type, decoder(dtype)
    word = np.dtype(f"u{dtype.itemsize}").type

    @njit(error_model="numpy")
    def folded(bits: Any) -> Any:
        return np.uint32(np.uint32(bits) + np.uint32(np.uint32(bits >> 32) * np.uint32(0x9E3779B1)))

    @njit(error_model="numpy")
    def widened(bits: Any) -> Any:
        return np.uint32(bits)

    fold = folded if dtype.itemsize == 8 else widened

    @njit(error_model="numpy", fastmath={"reassoc"})
    def guarded(elements: Any, words: Any) -> Any:
        total, digest = 0.0, np.uint32(0)
        for i in range(elements.size):
            value = np.float64(decode(elements[i]))
            total += value * value
            mixed = fold(words[i])  # rotated, lest flipped signs, the uppermost bits, cancel in the sum
            mixed = np.uint32(np.uint32(mixed << np.uint32(7)) | np.uint32(mixed >> np.uint32(25)))
            digest = np.uint32(digest + np.uint32(mixed * np.uint32(2 * i + 1)))
        return total, digest

    def guard(table: Any, sums: Any, digests: Any) -> None:
        for r in range(len(table)):
            block, count, address = table[r, 0] // BLOCK, table[r, 1], table[r, 2]
            elements = carray(pointer(address, element), count)
            words = carray(pointer(address, word), count)
            for start in range(0, count, BLOCK):
                stop = min(start + BLOCK, count)
                sums[block], digests[block] = guarded(elements[start:stop], words[start:stop])
                block += 1

    return typing.cast(Loop, _compile(guard))


MEAN_COLUMNS = 4


@functools.cache
def mean_loop(dtype: DType) -> Loop:
    """`mean(table, weight, arena)`: add up gradients of several workers, each times a weight of the arena's dtype.

    A row of `table`, int64 [n, MEAN_COLUMNS], is the first element and the count in the arena, the address of a gradient,
    and whether it is the first there, which replaces what the arena has.
    """
    element, decode = bits(dtype).type, decoder(dtype)

    def mean(table: Any, weight: Any, arena: Any) -> None:
        for r in range(len(table)):
            start, count = table[r, 0], table[r, 1]
            target = arena[start : start + count]
            gradient = carray(pointer(table[r, 2], element), count)
            if table[r, 3]:
                for i in range(count):
                    target[i] = weight * decode(gradient[i])
            else:
                for i in range(count):
                    target[i] += weight * decode(gradient[i])

    return typing.cast(Loop, _compile(mean))


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
