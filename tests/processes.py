"""Real server processes, started by the command line that users type."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def optserve_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line that users type, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "optserve_server", *arguments], capture_output=True, text=True, timeout=60
    )


class ServerProcess:
    """`optserve serve` in a process of its own."""

    def __init__(self, *arguments: str, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "optserve_server", "serve", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONWARNINGS": "default"},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        self.address = line.removeprefix("listening on ").strip()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@contextmanager
def running(*arguments: str, log: Path) -> Iterator[ServerProcess]:
    """A server process that is killed at the end if it still runs."""
    server = ServerProcess(*arguments, log=log)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)
