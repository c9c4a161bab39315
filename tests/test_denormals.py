"""Numbers below the smallest normal one: zero to updates, and what they are to everybody else."""

import platform

import numpy as np
import pytest

from direct import DirectSet
from optserve import optim

SIZE = 100_003  # several threads, and a rest
TINY = 1e-42

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors keep them")


@x86
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99])
def test_a_moment_that_decays_stays_normal_or_ends_at_zero(alpha: float) -> None:
    direct = DirectSet({"x": np.zeros(SIZE, np.float32)}, optim.RMSprop(alpha=alpha))
    direct.push({"x": np.full(SIZE, 2e-19, np.float32)})
    for _ in range(20):
        direct.push({"x": np.zeros(SIZE, np.float32)})
    moment = direct.slot("x", "square_avg")
    assert ((moment == 0) | (moment >= np.finfo(np.float32).tiny)).all()


@x86
def test_gradients_that_are_denormal_are_none() -> None:
    direct = DirectSet({"x": np.zeros(SIZE, np.float32)}, optim.SGD(lr=1e10))
    direct.push({"x": np.full(SIZE, TINY, np.float32)})
    np.testing.assert_array_equal(direct.pull()["x"], 0)


def test_others_in_the_process_still_have_them() -> None:
    direct = DirectSet({"x": np.zeros(16, np.float32)}, optim.Adam())
    direct.push({"x": np.full(16, TINY, np.float32)})
    assert np.float32(TINY) * np.float32(2) > 0
    assert (np.full(16, TINY, np.float32) + np.float32(0) > 0).all()


def test_all_of_float16_is_read() -> None:
    """Its denormal numbers are normal in float32."""
    every = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16)
    start = np.zeros(every.size, np.float16)
    direct = DirectSet({"x": start}, optim.SGD(lr=1.0, maximize=True))
    direct.push({"x": every})
    np.testing.assert_array_equal(direct.pull()["x"], every)
