"""Copies by several threads are copies."""

import numpy as np
import pytest

from optserve._copy import PART, WORTHWHILE, copy_array


@pytest.mark.parametrize("count", [0, 1, WORTHWHILE // 4 - 1, WORTHWHILE // 4, WORTHWHILE // 4 + 1, 9 * PART // 4 + 3])
def test_every_element_is_copied_and_nothing_else(count: int) -> None:
    source = np.random.default_rng(0).normal(size=count).astype(np.float32)
    target = np.zeros(count + 2, np.float32)
    copy_array(target[1:-1], source)
    assert target[1:-1].tobytes() == source.tobytes()
    assert target[0] == target[-1] == 0


def test_shapes_are_kept() -> None:
    source = np.arange(WORTHWHILE, dtype=np.float64).reshape(8, -1)
    target = np.zeros_like(source)
    copy_array(target, source)
    np.testing.assert_array_equal(target, source)
    scalar = np.zeros(())
    copy_array(scalar, np.float64(3).reshape(()))
    assert scalar == 3
