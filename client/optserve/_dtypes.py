"""Element types: what the caller holds, what travels, and what the server computes in."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from optserve._errors import InvalidTensor

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True, slots=True)
class DType:
    """One element type: `storage` is the NumPy type of its bytes, `compute` the one that the server calculates in."""

    name: str
    storage: np.dtype[Any]
    compute: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes."""
        return self.storage.itemsize

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return LARGEST_FLOAT16 if self.storage == np.float16 else float(np.finfo(self.compute).max)

    @property
    def is_half(self) -> bool:
        """Whether elements are computed in a wider type than they travel in."""
        return self.itemsize < self.compute.itemsize

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The NumPy type that users see; bfloat16 needs the package ml_dtypes and raises InvalidTensor without it."""
        if self.name != "bfloat16":
            return self.storage
        try:
            import ml_dtypes
        except ImportError:
            raise InvalidTensor(
                "NumPy has no bfloat16 of its own; install optserve[bfloat16] (the package ml_dtypes) to receive such tensors"
            ) from None
        return cast("np.dtype[Any]", np.dtype(ml_dtypes.bfloat16))


FLOAT32 = DType("float32", np.dtype("<f4"), np.dtype("<f4"))
FLOAT64 = DType("float64", np.dtype("<f8"), np.dtype("<f8"))
BFLOAT16 = DType("bfloat16", np.dtype("<u2"), np.dtype("<f4"))
FLOAT16 = DType("float16", np.dtype("<f2"), np.dtype("<f4"))

DTYPES = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}


def dtype_named(name: str) -> DType:
    """The element type of that name; raises InvalidTensor for any other than float32, float64, bfloat16, float16."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise InvalidTensor(f"expected a dtype among {', '.join(_BY_NAME)}; got {name!r}") from None


def computed(dtype: DType) -> DType:
    """What elements of a dtype are while the server calculates."""
    return FLOAT64 if dtype is FLOAT64 else FLOAT32


def narrowed(dtype: DType, wanted: DType | None) -> DType:
    """What elements of a dtype travel as if a reader wants them no wider than `wanted`."""
    return wanted if wanted is not None and wanted.itemsize < dtype.itemsize else dtype
