"""Wire formats: how the elements of a tensor travel when they need not travel in full.

A format takes float32; a float64 tensor is rounded to float32 first. Elements are encoded in blocks, consecutive elements of
the flattened tensor in C order of which only the last block may be shorter, and every block is one record on its own. All
numbers are little-endian, and every NaN is the quiet one, 0x7FC00000, or its equivalent in half precision.

`Int8` and `TopK` lose much at once, so they have error feedback: what a block could not say is kept by the worker as a
residual e (float32, zero before the first push) and said later:

    x ← g + e,   send encode(x),   e ← x − decode(encode(x))

(Seide et al., 1-bit SGD, Interspeech 2014; Karimireddy et al., arXiv:1901.09847.) The new residual is the worker's once the
server has taken the push; a refused push leaves the old one in place. NaN and infinity always travel as something that is
not finite, so that the server refuses the push.
"""

import abc
import math
import numbers
from dataclasses import dataclass
from typing import ClassVar

from optserve._errors import InvalidFormat
from optserve._specification import BLOCK

__all__ = ["BFloat16", "Float16", "Format", "Int8", "TopK"]


@dataclass(frozen=True)
class Format(abc.ABC):
    """A way to write float32 elements as bytes; `block` is the number of elements in a record."""

    block: ClassVar[int] = BLOCK
    error_feedback: ClassVar[bool] = False

    @abc.abstractmethod
    def record_size(self, count: int) -> int:
        """Bytes of the record of a block of `count` elements, 1 to `block`."""

    def encoded_size(self, count: int) -> int:
        """Bytes of `count` consecutive elements, of which the first begins a block."""
        blocks, rest = divmod(count, self.block)
        return blocks * self.record_size(self.block) + (self.record_size(rest) if rest else 0)


@dataclass(frozen=True)
class BFloat16(Format):
    """The upper half of a float32: its range, and 8 bits of precision. Rounds to nearest, ties to even; 2 bytes an element.

    (Kalamkar et al., arXiv:1905.12322.)
    """

    def record_size(self, count: int) -> int:
        """2n: the elements."""
        return 2 * count


@dataclass(frozen=True)
class Float16(Format):
    """IEEE 754 binary16: 11 bits of precision from 2⁻¹⁴ to 65504. Rounds to nearest, ties to even; 2 bytes an element.

    What rounds beyond 65504 becomes infinite, and the server refuses a push with infinities: scale, or use `BFloat16`.
    """

    def record_size(self, count: int) -> int:
        """2n: the elements."""
        return 2 * count


@dataclass(frozen=True)
class Int8(Format):
    """Linear quantization of blocks of 256 elements with a scale each (Dettmers et al., arXiv:2110.02861, there non-linear).

    With m = max|x| over the block, all in float32:

        scale s = m/127, clipped to [2⁻¹²⁶, largest s of which 127s is finite];   0 if m is 0, NaN if any x is not finite
        q = rint(x · min(127/m, 2¹²⁶)), ties to even;                              0 if m is 0 or not finite
        decoded value = qs, hence |x − qs| ≤ s/2 but for rounding

    The record is s as float32, then n times q as int8. Below 127 · 2⁻¹²⁶ a step is thus 2⁻¹²⁶, and rounding is the only error.
    """

    block: ClassVar[int] = 256
    error_feedback: ClassVar[bool] = True

    def record_size(self, count: int) -> int:
        """4 + n: the scale and the elements."""
        return 4 + count


@dataclass(frozen=True)
class TopK(Format):
    """The largest magnitudes of every block of 4096 elements; the others are zero until error feedback makes them large.

    Of n elements the k = ⌈fraction · n⌉, computed in float64, of largest magnitude travel, of equal ones the first; NaN is
    larger than infinity. The record is k indices in the block, ascending, as uint16, then their k values as float32. What
    travels leaves a residual of 0 behind, the others leave themselves.
    `fraction` is above 0 and at most 1; raises InvalidFormat.
    (Lin et al., Deep Gradient Compression, arXiv:1712.01887; by chunks as in Peng et al., DeMo, arXiv:2411.19870, and
    Sarfi et al., SparseLoCo, arXiv:2508.15706.)
    """

    error_feedback: ClassVar[bool] = True

    fraction: float

    def __post_init__(self) -> None:
        real = isinstance(self.fraction, numbers.Real) and not isinstance(self.fraction, bool)
        value = float(self.fraction) if real and 0 < self.fraction <= 1 else 0.0
        if not value:
            raise InvalidFormat(
                f"expected fraction to be a number above 0 and at most 1, such as 0.01 for one element in a hundred; "
                f"got {self.fraction!r}"
            )
        object.__setattr__(self, "fraction", value)

    def kept(self, count: int) -> int:
        """How many of a block of `count` elements travel."""
        return math.ceil(self.fraction * count)

    def record_size(self, count: int) -> int:
        """6k: the indices and the values."""
        return 6 * self.kept(count)
