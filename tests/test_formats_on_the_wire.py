"""Wire formats: both implementations against the definitions, against each other, and against other people's rounding."""

import math
import struct
import subprocess
import sys
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optserve import InvalidFormat, _codecs, _codecs_compiled
from optserve._codecs import Bytes, Codec, Floats, codec
from optserve._specification import BLOCK
from optserve.formats import BFloat16, Float16, Format, Int8, TopK

FORMATS = [BFloat16(), Float16(), Int8(), TopK(1e-9), TopK(0.01), TopK(0.3), TopK(1)]
WITH_FEEDBACK = [format for format in FORMATS if format.error_feedback]
IMPLEMENTATIONS = {"numpy": _codecs.CODECS, "compiled": _codecs_compiled.CODECS}
LARGEST = float(np.finfo(np.float32).max)

each_format = pytest.mark.parametrize("format", FORMATS, ids=str)
each_with_feedback = pytest.mark.parametrize("format", WITH_FEEDBACK, ids=str)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def values_of(kind: str, count: int, seed: int, palette: list[float]) -> Floats:
    """float32 [count]: any bits, bits of finite numbers, numbers of one size, or a few numbers again and again."""
    random = np.random.default_rng(seed)
    match kind:
        case "bits":
            return random.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
        case "finite bits":
            bits = random.integers(0, 1 << 32, count, dtype=np.uint32)
            return (bits & ~np.uint32(0x00800000)).view(np.float32)  # no exponent of ones only
        case "normal":
            with np.errstate(over="ignore", under="ignore"):
                return (random.standard_normal(count) * palette[0]).astype(np.float32)
        case _:
            return random.choice(np.array(palette, np.float32), count)


floats = st.floats(width=32)
some_values = st.builds(
    values_of,
    st.sampled_from(["bits", "finite bits", "normal", "palette"]),
    st.integers(0, 10_000),
    st.integers(0, 1 << 32),
    st.lists(floats, min_size=1, max_size=6),
)


def finite_values(count: int, seed: int = 0) -> Floats:
    return values_of("finite bits", count, seed, [])


def encoded(codec: Codec, values: Floats, residual: Floats | None = None) -> tuple[Bytes, Floats]:
    """The bytes and the new residual; there is a byte too many on either side, which must stay as it is."""
    size = codec.format.encoded_size(values.size)
    room = np.full(size + 2, 0xA5, np.uint8)
    lost = np.full(values.size, 7, np.float32)
    codec.encode(values, residual, lost, room[1:-1])
    assert room[0] == room[-1] == 0xA5
    return room[1:-1], lost


def decoded(codec: Codec, data: Bytes, count: int) -> Floats:
    out = np.full(count, 7, np.float32)
    codec.decode(data, out)
    return out


def bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(f"u{values.itemsize}")


def blocks(format: Format, values: Floats) -> list[Floats]:
    return [values[start : start + format.block] for start in range(0, values.size, format.block)]


# -- both implementations


@each_format
@given(values=some_values, other=some_values, corrected=st.booleans())
def test_implementations_write_the_same_bits(format: Format, values: Floats, other: Floats, corrected: bool) -> None:
    residual = np.resize(other, values.size) if corrected and other.size else None
    results = [encoded(codecs[type(format)](format), values, residual) for codecs in IMPLEMENTATIONS.values()]
    (data, lost), (compiled_data, compiled_lost) = results
    np.testing.assert_array_equal(compiled_data, data)
    np.testing.assert_array_equal(bits(compiled_lost), bits(lost))


@pytest.mark.parametrize("format", [BFloat16(), Float16()], ids=str)
def test_implementations_read_every_half_as_the_same_bits(format: Format) -> None:
    data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    results = [decoded(codecs[type(format)](format), data, 1 << 16) for codecs in IMPLEMENTATIONS.values()]
    np.testing.assert_array_equal(*map(bits, results))


@each_implementation
@each_format
def test_pieces_write_what_the_whole_writes(format: Format, implementation: str) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    values, residual = finite_values(3 * BLOCK + 300), finite_values(3 * BLOCK + 300, seed=1)
    data, lost = encoded(codec, values, residual)
    pieces = [slice(0, BLOCK), slice(BLOCK, 3 * BLOCK), slice(3 * BLOCK, None)]
    results = [encoded(codec, values[piece], residual[piece]) for piece in pieces]
    np.testing.assert_array_equal(np.concatenate([data for data, _ in results]), data)
    np.testing.assert_array_equal(
        decoded(codec, data, values.size)[pieces[1]], decoded(codec, results[1][0], 2 * BLOCK)
    )
    if format.error_feedback:
        np.testing.assert_array_equal(np.concatenate([lost for _, lost in results]), lost)


@each_implementation
@each_with_feedback
def test_a_residual_may_be_replaced_in_place_or_not_be_kept(format: Format, implementation: str) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    values, residual = finite_values(BLOCK + 300), finite_values(BLOCK + 300, seed=1)
    expected, lost = encoded(codec, values, residual)
    out = np.zeros_like(expected)
    codec.encode(values, residual, None, out)
    np.testing.assert_array_equal(out, expected)
    codec.encode(values, residual, residual, out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(residual, lost)


@each_implementation
@each_format
def test_arguments_may_be_read_only(format: Format, implementation: str) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    values = finite_values(300)
    values.flags.writeable = False
    data, _ = encoded(codec, values)
    read_only = np.frombuffer(data.tobytes(), np.uint8)
    np.testing.assert_array_equal(decoded(codec, read_only, 300), decoded(codec, data, 300))


@each_implementation
@each_format
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_arrives_as_such(format: Format, implementation: str, value: float) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    values = finite_values(BLOCK + 300)
    values[BLOCK + 17] = value
    data, _ = encoded(codec, values)
    assert not np.isfinite(decoded(codec, data, values.size)[BLOCK + 17])


# -- half precision


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@each_implementation
@pytest.mark.parametrize(
    ("format", "reference"), [(BFloat16(), ml_dtypes.bfloat16), (Float16(), np.float16)], ids=lambda each: str(each)
)
def test_halves_round_as_the_reference_does(format: Format, implementation: str, reference: Any) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    exact = np.arange(1 << 16, dtype=np.uint16).view(reference).astype(np.float32)
    ordered = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    middle = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)  # ties, which must go to even
    anything = values_of("bits", 1_000_000, 0, [])
    values = np.concatenate([exact, middle, anything, np.float32([np.inf, -np.inf, 65519.99, 65520])])
    known = values[~np.isnan(values)]
    data, _ = encoded(codec, known)
    np.testing.assert_array_equal(data.view(np.uint16), known.astype(reference).view(np.uint16))
    unknown = values[np.isnan(values)]
    data, _ = encoded(codec, unknown)
    assert np.isnan(decoded(codec, data, unknown.size)).all()
    np.testing.assert_array_equal(decoded(codec, encoded(codec, exact)[0], exact.size), exact)


# -- int8


@each_implementation
@given(values=some_values)
@example(values=np.zeros(300, np.float32))
@example(values=np.float32([-0.0]))
@example(values=np.float32([LARGEST, -LARGEST]))
@example(values=np.float32([1e-45, -3e-45, 0]))
@example(values=np.float32([1.4e-36, 1.5e-36]))
def test_int8_is_its_definition(implementation: str, values: Floats) -> None:
    codec = IMPLEMENTATIONS[implementation][Int8](Int8())
    data, lost = encoded(codec, values)
    results, remains = decoded(codec, data, values.size), blocks(Int8(), lost)
    for index, (x, result, rest) in enumerate(
        zip(blocks(Int8(), values), blocks(Int8(), results), remains, strict=True)
    ):
        record = data[index * 260 : index * 260 + 4 + x.size].tobytes()
        (scale,), quantized = struct.unpack("<f", record[:4]), np.frombuffer(record, np.int8, offset=4)
        if not np.isfinite(x).all():
            assert math.isnan(scale)
            assert not quantized.any()
            assert np.isnan(result).all()
            assert np.isnan(rest).all()
            continue
        largest = float(np.abs(x).max())
        assert scale == (0 if largest == 0 else pytest.approx(max(largest / 127, 2.0**-126), rel=4e-7, abs=0))
        assert largest / 127 < 2.0**-126 or np.abs(quantized.astype(int)).max() == 127
        assert (np.abs(result - x.astype(np.float64)) <= scale * 0.5001).all()
        np.testing.assert_array_equal(bits(result), bits(quantized.astype(np.float32) * np.float32(scale)))
        np.testing.assert_array_equal(bits(rest), bits(x - result))


@each_implementation
def test_int8_is_symmetric_and_rounds_ties_to_even(implementation: str) -> None:
    codec = IMPLEMENTATIONS[implementation][Int8](Int8())
    values = np.float32([127, 0.5, 1.5, 2.5, 126.5, 125.5, 0.49, 0.51])
    data, _ = encoded(codec, values)
    assert data[4:].view(np.int8).tolist() == [127, 0, 2, 2, 126, 126, 0, 1]
    opposite, _ = encoded(codec, -values)
    assert opposite[4:].view(np.int8).tolist() == [-127, 0, -2, -2, -126, -126, 0, -1]


# -- top k


@each_implementation
@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.3, 1])
@given(values=some_values)
@example(values=np.zeros(5000, np.float32))
@example(values=np.float32([1, -1, 1, -1] * 25))
@example(values=np.float32([0, np.nan, np.inf, -np.inf, LARGEST, -np.nan] * 20))
def test_top_k_sends_the_largest_and_keeps_the_others(implementation: str, fraction: float, values: Floats) -> None:
    format = TopK(fraction)
    codec = IMPLEMENTATIONS[implementation][TopK](format)
    data, lost = encoded(codec, values)
    results, begin = decoded(codec, data, values.size), 0
    for x, result, rest in zip(blocks(format, values), blocks(format, results), blocks(format, lost), strict=True):
        kept = math.ceil(fraction * x.size)
        magnitudes = np.where(np.isnan(x), np.uint32(1 << 31), bits(np.abs(x))).tolist()
        chosen = sorted(sorted(range(x.size), key=lambda i: (-magnitudes[i], i))[:kept])
        record = data[begin : begin + 6 * kept].tobytes()
        begin += len(record)
        assert list(struct.unpack(f"<{kept}H", record[: 2 * kept])) == chosen
        np.testing.assert_array_equal(np.frombuffer(record, "<f4", offset=2 * kept), x[chosen])
        np.testing.assert_array_equal(result[chosen], x[chosen])
        np.testing.assert_array_equal(np.delete(rest, chosen), np.delete(x, chosen))
        assert not np.delete(result, chosen).any()
        assert not rest[chosen].any()
    assert begin == data.size


# -- error feedback


@each_implementation
@each_with_feedback
def test_error_feedback_says_in_the_end_what_was_to_be_said(format: Format, implementation: str) -> None:
    codec = IMPLEMENTATIONS[implementation][type(format)](format)
    random = np.random.default_rng(0)
    residual, said, meant = np.zeros(5000, np.float32), np.zeros(5000), np.zeros(5000)
    for _ in range(50):
        gradient = random.standard_normal(5000).astype(np.float32)
        data, residual = encoded(codec, gradient, residual)
        said += decoded(codec, data, 5000)
        meant += gradient
    np.testing.assert_allclose(said + residual, meant, atol=1e-4)


# -- formats as values


@each_format
def test_sizes_are_those_of_the_records(format: Format) -> None:
    assert format.encoded_size(0) == 0
    for count in (1, 255, 256, 257, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK + 1000):
        lengths = [len(block) for block in blocks(format, np.empty(count, np.float32))]
        assert format.encoded_size(count) == sum(map(format.record_size, lengths))
    assert BLOCK % format.block == 0


def test_bytes_of_an_element() -> None:
    assert [format.encoded_size(2 * BLOCK + 100) for format in (BFloat16(), Float16())] == [2 * (2 * BLOCK + 100)] * 2
    assert Int8().encoded_size(2 * BLOCK + 100) == 2 * (BLOCK + 4 * 16) + 104
    assert TopK(0.01).encoded_size(2 * BLOCK + 100) == 6 * (41 + 41 + 1)


@pytest.mark.parametrize(
    "fraction", [0, -0.1, 1.001, math.nan, math.inf, 10**400, Fraction(1, 10**400), True, "0.1", None, 1j]
)
def test_a_fraction_is_above_zero_and_at_most_one(fraction: Any) -> None:
    with pytest.raises(InvalidFormat, match="expected fraction to be a number above 0 and at most 1.*got"):
        TopK(fraction)


def test_equal_formats_are_equal() -> None:
    assert TopK(np.float64(0.25)) == TopK(0.25) != TopK(0.5)
    assert hash(TopK(1)) == hash(TopK(1.0))
    assert type(TopK(1).fraction) is float
    assert Int8() == Int8() != BFloat16()


def test_numba_is_used_if_it_is_there_and_not_needed() -> None:
    assert type(codec(Int8())) is _codecs_compiled.Int8Codec
    script = """
import sys
sys.modules["numba"] = None
from optserve import formats
from optserve._codecs import Int8Codec, codec
assert type(codec(formats.Int8())) is Int8Codec
"""
    subprocess.run([sys.executable, "-c", script], check=True)
