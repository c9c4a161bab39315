"""Half precision: every bit pattern against ml_dtypes and NumPy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve._dtypes import BFLOAT16, FLOAT16, DType
from optserve_server.engine.loops import decode_loop, encode_loop

HALVES = [(BFLOAT16, np.dtype(ml_dtypes.bfloat16)), (FLOAT16, np.dtype(np.float16))]


def decode(dtype: DType, bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    arena = np.zeros(bits.size, np.float32)
    decode_loop(dtype)(np.array([[0, bits.size, bits.ctypes.data]]), arena)
    return arena


def encode(dtype: DType, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = np.zeros(values.size, np.uint16)
    encode_loop(dtype)(np.array([[0, values.size, bits.ctypes.data]]), values)
    return bits


@pytest.mark.parametrize(("dtype", "reference"), HALVES, ids=lambda each: getattr(each, "name", ""))
def test_decoding_equals_the_reference_for_every_bit_pattern(dtype: DType, reference: np.dtype[Any]) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(reference).astype(np.float32)
    np.testing.assert_array_equal(decode(dtype, bits), expected)
    np.testing.assert_array_equal(np.signbit(decode(dtype, bits)), np.signbit(expected))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "reference"), HALVES, ids=lambda each: getattr(each, "name", ""))
def test_encoding_rounds_to_nearest_even_as_the_reference_does(dtype: DType, reference: np.dtype[Any]) -> None:
    exact = decode(dtype, np.arange(1 << 16, dtype=np.uint16))
    exact = np.sort(exact[np.isfinite(exact)])
    middle = (exact[1:].astype(np.float64) + exact[:-1]) / 2  # ties, which must go to even
    anything = np.random.default_rng(0).integers(0, 1 << 32, 2_000_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([exact, middle.astype(np.float32), anything, np.float32([np.inf, -np.inf])])
    known = values[~np.isnan(values)]
    np.testing.assert_array_equal(encode(dtype, known), known.astype(reference).view(np.uint16))
    assert np.isnan(encode(dtype, values[np.isnan(values)]).view(reference).astype(np.float32)).all()
