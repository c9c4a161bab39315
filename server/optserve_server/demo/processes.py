"""Child processes, each of which ends when its `with` block does."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from optserve import OptserveError

PATIENCE = 10.0  # seconds that a child has to end once it is told to
LISTENING = "listening on "


class ChildFailed(RuntimeError):
    """A child process failed; the message holds what it wrote to stderr."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process to which lines of text go and from which they come."""

    name: str
    process: subprocess.Popen[str]
    errors: IO[str]

    def write_line(self, line: str) -> None:
        """Send a line; raises ChildFailed."""
        assert self.process.stdin is not None
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None

    def read_line(self) -> str:
        """The next line; raises ChildFailed if there is none."""
        for line in self.lines():
            return line
        raise self._failure()

    def lines(self) -> Iterator[str]:
        """All further lines; raises ChildFailed if the process does not end well."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.rstrip("\n")
        if self.process.wait() != 0:
            raise self._failure()

    def check(self) -> None:
        """Raise ChildFailed if the process has ended."""
        if self.process.poll() is not None:
            raise self._failure()

    def _failure(self) -> ChildFailed:
        status = self.process.wait()
        self.errors.seek(0)
        return ChildFailed(f"{self.name} ended with status {status}\n{self.errors.read()}".rstrip())


@contextmanager
def python(module: str, *arguments: str, environment: Mapping[str, str]) -> Iterator[Child]:
    """A process that runs `python -m module arguments`, with some variables added to its environment."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    with (
        tempfile.TemporaryFile("w+") as errors,  # unlike a pipe, it never fills up
        subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,  # Ctrl-C reaches this process only, which then ends the others
            env={**os.environ, **environment},
        ) as process,
    ):
        try:
            yield Child(" ".join(("python -m", module, *arguments)), process, errors)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the function given is called, which then raises KeyboardInterrupt.

    An exception in the middle of gRPC's code can leave its locks taken for ever. A second signal does not wait.
    """
    received: list[int] = []

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    def receive(number: int, frame: object) -> None:
        check()
        received.append(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # others don't get signals
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
    handlers = [(number, signal.signal(number, receive)) for number in numbers]
    try:
        yield check
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


@contextmanager
def local_server() -> Iterator[str]:
    """The address of a server in a process of its own; raises ChildFailed if that ends too early."""
    memory_only = {"OPTSERVE_DATA_DIR": ""}
    with python("optserve_server", "serve", "--listen", "127.0.0.1:0", environment=memory_only) as server:
        line = server.read_line()
        if not line.startswith(LISTENING):
            raise ChildFailed(f"expected {server.name} to say '{LISTENING}...' first; got {line!r}")
        try:
            yield line.removeprefix(LISTENING)
        except (ChildFailed, OptserveError):
            server.check()  # a dead server explains more than what followed from its death
            raise
