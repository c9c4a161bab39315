"""Equality of values with arrays in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve import Accumulation, State


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal, arrays in them bit for bit."""
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    if isinstance(ours, State | Accumulation):
        return all(same(getattr(ours, name), getattr(theirs, name)) for name in ours.__slots__)
    return bool(ours == theirs)
