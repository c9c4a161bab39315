"""Standing: what a server must not forget of the other one when it restarts, in its data directory."""

import json
import secrets
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from optserve_server.storage import files

NAME = "STANDING"


class Role(StrEnum):
    """What a server is to another one."""

    ALONE = "alone"
    LEASED = "leased"  # the peer may promote itself
    DEPOSED = "deposed"  # the peer was promoted
    STANDBY = "standby"  # the peer is followed
    PROMOTED = "promoted"  # instead of the peer


@dataclass(frozen=True, slots=True)
class Standing:
    """A role, the peer that it is about (the `id` of a standby, the address of a primary) and that one's address; `seconds` of
    a lease. `id` is this server's own."""

    role: Role = Role.ALONE
    peer: str = ""
    address: str = ""
    seconds: float = 0.0
    id: str = field(default_factory=lambda: secrets.token_hex(8))


def read(directory: Path) -> Standing:
    """The standing that was written last, or that of a server that has been alone; raises ValueError if it can't be read."""
    try:
        record = json.loads((directory / NAME).read_bytes())
        return Standing(**record | {"role": Role(record["role"])})
    except FileNotFoundError:
        return Standing()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory / NAME} is damaged ({error}); remove it if no other server may serve") from error


def write(directory: Path, standing: Standing) -> None:
    """Keep a standing, durably; raises OSError."""
    files.write_file(directory / NAME, json.dumps(asdict(standing)).encode())
