"""Fragments: a set's tensors, divided into parts that are synchronised at different times."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from optserve._errors import InvalidArgument
from optserve._specification import TensorSpec

Fragments = int | Sequence[Sequence[str]]


def divide(tensors: Sequence[TensorSpec], fragments: Fragments) -> list[tuple[str, ...]]:
    """Names of the tensors of each fragment, in the set's order.

    `fragments` are so many of about the same size in bytes, or a list of names and shell patterns for each. Raises
    InvalidArgument unless every tensor is in one of them and none is empty.
    """
    parts = _even(tensors, fragments) if isinstance(fragments, int) else _named(tensors, fragments)
    return [tuple(tensor.name for tensor in tensors if tensor.name in part) for part in parts]


def _even(tensors: Sequence[TensorSpec], count: int) -> list[set[str]]:
    """The largest tensor first, each to the fragment that has least; see Graham, SIAM J. Appl. Math. 17, 1969."""
    if not 1 <= count <= len(tensors):
        raise InvalidArgument(f"expected 1 to {len(tensors)} fragments, as many as there are tensors; got {count}")
    parts: list[set[str]] = [set() for _ in range(count)]
    sizes = [0] * count
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        least = min(range(count), key=lambda index: (sizes[index], len(parts[index])))
        parts[least].add(tensor.name)
        sizes[least] += tensor.nbytes
    return parts


def _named(tensors: Sequence[TensorSpec], patterns: Sequence[Sequence[str]]) -> list[set[str]]:
    names = [tensor.name for tensor in tensors]
    for each in patterns:
        if isinstance(each, str):
            raise InvalidArgument(
                f"expected a list of names or patterns for each fragment, such as [{each!r}]; got {each!r}"
            )
    parts = [{name for name in names if any(fnmatchcase(name, each) for each in part)} for part in patterns]
    for part, wanted in zip(parts, patterns, strict=True):
        if not part:
            raise InvalidArgument(f"expected a fragment of at least one tensor; nothing matches {list(wanted)}")
    for name in names:
        if (count := sum(name in part for part in parts)) != 1:
            raise InvalidArgument(f"expected every tensor in one fragment; {name!r} is in {count}")
    return parts
