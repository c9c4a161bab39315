"""Files of tensors in the safetensors format (https://github.com/huggingface/safetensors), streamed and checked.

The library's own writer needs all tensors at once and syncs nothing, its reader maps files, which ends the process if one is
cut short; so the few lines of the format are here, and tests hold them to the library.
"""

import itertools
import json
import math
import os
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._copy import copy_array
from optserve_server.engine.arena import padded
from optserve_server.storage.files import PAGE, File

WORTHWHILE = 1 << 20  # bytes: what is smaller goes by the page cache
PART = 16 << 20  # bytes that are read at a time

_NAMES = {
    np.dtype(t): name
    for t, name in ((np.float32, "F32"), (np.float64, "F64"), (np.uint16, "U16"), (np.uint8, "U8"), (np.int64, "I64"))
}
_ITEMSIZES = {name: dtype.itemsize for dtype, name in _NAMES.items()}
_EXPORTED = {"float16": "F16", "bfloat16": "BF16"}  # written, but never read here: NumPy has no bfloat16 of its own
_RESERVED = "__metadata__"


class Damaged(ValueError):
    """What a file has is not what was written there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: its name there, what it is, and the CRC-32 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    crc32: int


Tensors = Mapping[str, NDArray[Any]]


class Writer:
    """Writes one file of tensors, whose elements come as memory that they were copied to; raises OSError."""

    def __init__(self, path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
        self._names = _named(list(tensors))
        self._data = [tensor.reshape(-1).view(np.uint8) for tensor in tensors.values()]
        self._tensors = list(tensors.values())
        self._begins = list(itertools.accumulate((data.size for data in self._data), initial=0))
        self._checksums = [0] * len(self._tensors)
        header = _header(dict(zip(self._names, self._tensors, strict=True)), metadata)
        self._end = len(header) + self.nbytes
        self._file = File(path)
        try:
            self._file.reserve(self._end)
            self._file.write([header])
        except BaseException:
            self._file.close()
            raise

    @property
    def nbytes(self) -> int:
        """Size of all elements."""
        return self._begins[-1]

    def copy(self, begin: int, target: NDArray[np.uint8]) -> None:
        """Copy elements from a byte of the file's elements on."""
        for index, part in self._parts(begin, target):
            first = begin + _offset(part, target) - self._begins[index]
            copy_array(part, self._data[index][first : first + part.size])

    def write(self, begin: int, data: NDArray[np.uint8]) -> None:
        """Append what was copied; it begins at a page, and so does the memory, of which the last page is free to its end."""
        checksums = threading.Thread(target=self._add_checksums, args=(begin, data), name="optserve-checksums")
        checksums.start()  # beside the disk, which takes no processor
        try:
            if data.size < WORTHWHILE:
                self._file.write([data.data])
            else:
                pages = np.lib.stride_tricks.as_strided(data, (padded(data.size, PAGE),))
                self._file.write_pages(pages.data)
        finally:
            checksums.join()

    def finish(self) -> list[Entry]:
        """Sync the file; its entries."""
        self._file.cut(self._end)
        self._file.sync()
        return [
            Entry(name, _dtype(tensor), tensor.shape, checksum)
            for name, tensor, checksum in zip(self._names, self._tensors, self._checksums, strict=True)
        ]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add_checksums(self, begin: int, data: NDArray[np.uint8]) -> None:
        for index, part in self._parts(begin, data):
            self._checksums[index] = zlib.crc32(part.data, self._checksums[index])

    def _parts(self, begin: int, memory: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The parts of memory that have elements of one tensor each, with its index."""
        end = begin + memory.size
        for index in range(bisect_right(self._begins, begin) - 1, len(self._data)):
            first, last = max(begin, self._begins[index]), min(end, self._begins[index + 1])
            if first < last:
                yield index, memory[first - begin : last - begin]
            elif first >= end:
                return


def _offset(part: NDArray[np.uint8], memory: NDArray[np.uint8]) -> int:
    return part.ctypes.data - memory.ctypes.data


def read_into(path: Path, tensors: Sequence[NDArray[Any]], entries: Sequence[Entry]) -> Iterator[int]:
    """Read a file's elements to where tensors lie, yielding how many bytes were read; raises Damaged or OSError."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        _check_header(path, file, entries)
        for entry, tensor in zip(entries, tensors, strict=True):
            if (entry.dtype, entry.shape) != (_NAMES[tensor.dtype], tensor.shape):
                raise Damaged(f"{path}: expected {entry.name!r} to be {tensor.dtype}{list(tensor.shape)}; got {entry}")
            checksum, data = 0, tensor.reshape(-1).view(np.uint8)
            for begin in range(0, data.size, PART):
                part = data[begin : begin + PART]
                if file.readinto(part.data) != part.size:
                    raise Damaged(f"{path}: expected all of {entry.name!r}; the file ends at {size} bytes")
                checksum = zlib.crc32(part.data, checksum)
                yield part.size
            if checksum != entry.crc32:
                raise Damaged(f"{path}: the checksum of {entry.name!r} does not match")
        if file.tell() != size:
            raise Damaged(f"{path}: expected {file.tell()} bytes; got {size}")


def check(path: Path, entries: Sequence[Entry]) -> Iterator[int]:
    """Read a file, and check it, yielding how many bytes were read; raises Damaged or OSError."""
    names = {name: dtype for dtype, name in _NAMES.items()}
    for entry in entries:
        if entry.dtype not in names:
            raise Damaged(f"{path}: expected a dtype among {', '.join(names)}; got {entry.dtype}")
    tensors = [np.empty(entry.shape, names[entry.dtype]) for entry in entries]
    yield from read_into(path, tensors, entries)


def _check_header(path: Path, file: Any, entries: Sequence[Entry]) -> None:
    length = int.from_bytes(file.read(8), "little")
    if length > os.fstat(file.fileno()).st_size:
        raise Damaged(f"{path}: expected a header; got {length} for its length")
    try:
        header = json.loads(file.read(length))
        header.pop(_RESERVED, None)
        present = [
            (name, each["dtype"], tuple(each["shape"]), tuple(each["data_offsets"])) for name, each in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path}: expected a header of the safetensors format ({error})") from error
    sizes = [math.prod(entry.shape) * _ITEMSIZES.get(entry.dtype, 0) for entry in entries]
    ends = list(itertools.accumulate(sizes, initial=0))
    if present != [
        (entry.name, entry.dtype, entry.shape, (begin, end))
        for entry, (begin, end) in zip(entries, itertools.pairwise(ends), strict=True)
    ]:
        raise Damaged(f"{path}: the header is not the one that was written")


def _header(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_RESERVED: dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _dtype(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _dtype(tensor: NDArray[Any]) -> str:
    return _EXPORTED.get(tensor.dtype.name) or _NAMES[tensor.dtype]


def _named(names: Sequence[str]) -> list[str]:
    """Names of tensors in a file, all different; the format has a meaning for one."""
    free = "tensor"
    while free in names:
        free += "-"
    return [name if name != _RESERVED else free for name in names]
