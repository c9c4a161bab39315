"""What a worker chooses about how its tensors travel."""

import enum
from dataclasses import dataclass

from optserve._errors import InvalidFormat
from optserve.formats import BFloat16, Float16, Format


class Via(enum.Enum):
    """The way of tensors: shared memory if that can be, else the stream; or one of them only."""

    AUTO = "auto"
    STREAM = "stream"
    SHARED_MEMORY = "shared_memory"


@dataclass(frozen=True, slots=True)
class Choice:
    """How tensors travel: which way, and in which formats (None: as they are); raises InvalidFormat."""

    transport: Via = Via.AUTO
    push_format: Format | None = None
    pull_format: BFloat16 | Float16 | None = None

    def __post_init__(self) -> None:
        if self.push_format is not None and not isinstance(self.push_format, Format):
            raise InvalidFormat(
                f"expected push_format to be a format, such as formats.Int8(); got {self.push_format!r}"
            )
        if self.pull_format is not None and not isinstance(self.pull_format, BFloat16 | Float16):
            raise InvalidFormat(
                f"expected pull_format to be formats.BFloat16() or formats.Float16(); got {self.pull_format!r}"
            )
        if self.transport is Via.SHARED_MEMORY and (self.push_format or self.pull_format):
            raise InvalidFormat("expected no formats with shared memory, where fewer bytes are not faster; choose one")

    @property
    def shared_memory(self) -> bool:
        """Whether to ask for shared memory."""
        return self.transport is not Via.STREAM and self.push_format is None and self.pull_format is None
