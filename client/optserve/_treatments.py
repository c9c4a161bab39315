"""Treatments: what becomes of tensors that no rule touches, such as the running statistics of a batch normalization."""

import enum
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from optserve._errors import InvalidGroup

# What PyTorch, Keras and Flax call them.
_STATISTIC = re.compile(
    r"(^|[./_])(running_mean|running_var|num_batches_tracked|moving_mean|moving_variance|batch_stats)([./:]|$)"
)


class Treatment(enum.Enum):
    """What becomes of a tensor of which values are pushed: their mean, the last, or nothing; or it is optimized after all."""

    AVERAGE = "average"
    REPLACE = "replace"
    FREEZE = "freeze"
    OPTIMIZE = "optimize"

    @classmethod
    def _missing_(cls, value: object) -> "Treatment":
        raise InvalidGroup(f"expected a buffer to be {', '.join(repr(each.value) for each in cls)}; got {value!r}")


def resolved(names: Sequence[str], buffers: Mapping[str, Treatment]) -> dict[int, Treatment]:
    """The treatment of each tensor that has one, by its index; raises InvalidGroup.

    A tensor that is called like a statistic must have one: no optimizer is to move it by accident.
    """
    treatments: dict[int, Treatment] = {}
    matched: set[str] = set()
    for index, name in enumerate(names):
        patterns = [name] if name in buffers else [each for each in buffers if fnmatchcase(name, each)]
        matched.update(patterns)
        if len(patterns) > 1:
            raise InvalidGroup(
                f"expected one pattern of buffers to match {name!r}; {', '.join(map(repr, patterns))} do"
            )
        if patterns and buffers[patterns[0]] is not Treatment.OPTIMIZE:
            treatments[index] = buffers[patterns[0]]
        elif not patterns and _STATISTIC.search(name):
            raise InvalidGroup(
                f"tensor {name!r} is called like a statistic of a normalization, which an optimizer would ruin: expected "
                f"buffers={{{name!r}: 'average'}}, 'replace' or 'freeze', as a name or a pattern; or 'optimize', if it is a "
                "parameter after all"
            )
    for pattern in buffers:
        if pattern not in matched:
            some = ", ".join(map(repr, names[:10]))
            raise InvalidGroup(f"expected the buffers {pattern!r} to match a tensor; the set has {some}")
    return treatments
