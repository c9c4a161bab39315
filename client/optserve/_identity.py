"""Who a worker is to a parameter set, as a value that outlives the worker's process."""

from dataclasses import dataclass

from optserve._errors import InvalidArgument
from optserve._specification import check_client_id

LARGEST = 2**64 - 1  # epochs and sequences, as they travel


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker's session with a parameter set, and its last push that is known to be consumed; raises InvalidArgument kinds.

    Plain values, to be saved beside the worker's own checkpoint: `Identity(**json.loads(json.dumps(asdict(identity))))`.
    """

    client_id: str
    epoch: int
    sequence: int

    def __post_init__(self) -> None:
        check_client_id(self.client_id)
        for name, least, value in (("epoch", 1, self.epoch), ("sequence", 0, self.sequence)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
                raise InvalidArgument(f"expected {name} to be a whole number of at least {least}; got {value!r}")
