"""`optserve serve`, in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND = (sys.executable, "-m", "optserve_server", "serve", "--listen", "127.0.0.1:0")


@contextmanager
def server() -> Iterator[str]:
    """Run a server until the context ends; gives its address."""
    with subprocess.Popen(COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.kill()  # there is nothing to drain or to keep
