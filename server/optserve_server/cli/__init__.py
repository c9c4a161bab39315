"""The command line: `optserve serve`, `optserve demo`, and what an operator asks of a running server or a data directory."""

from optserve_server.cli import serving, sets, storage  # noqa: F401 (their commands, in the order of the help)
from optserve_server.cli.app import app

__all__ = ["app"]
