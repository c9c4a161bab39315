"""Processes of the benchmarks, each with one thread for NumPy, and a server."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from optserve_server.demo import processes
from optserve_server.demo.processes import Child

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "OPTSERVE_DATA_DIR": "",
} | {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


def python(module: str, *arguments: str) -> AbstractContextManager[Child]:
    """A process that runs `python -m module arguments`."""
    return processes.python(module, *arguments, environment=ENVIRONMENT)


@contextmanager
def server(listen: str = "127.0.0.1:0", *arguments: str) -> Iterator[tuple[str, Child]]:
    """`optserve serve` with nothing on the disk: its address, and its process."""
    with python("optserve_server", "serve", "--listen", listen, "--log-level", "error", *arguments) as process:
        yield process.read_line().removeprefix(processes.LISTENING), process
