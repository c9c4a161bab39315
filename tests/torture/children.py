"""Child processes that start at once: forked from one that has imported everything and compiled the loops.

A server that starts cold takes seconds to import and compile, which would be most of a run of a thousand kills. Its fork
runs the same command line on the same data directory, and is killed as any process is.
"""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", "tests.torture.compiled"])


def start(function: Callable[..., Any], *arguments: Any, wrong: str | None = None) -> BaseProcess:
    """Call a function in a child that ends with this process at the latest, with a change of `wrong` applied there."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, wrong), daemon=True)
    process.start()
    return process


def call(function: Callable[..., Any], *arguments: Any, wrong: str | None = None, patience: float = 90.0) -> Any:
    """What a function returns in a child; raises what it raises there.

    A child that says nothing for so many seconds prints where its threads are, and is killed; that raises TimeoutError.
    """
    here, there = CONTEXT.Pipe(duplex=False)
    process = start(_answer, function, arguments, there, patience, wrong=wrong)
    there.close()
    try:
        with here:
            if not here.poll(patience + 5):
                raise TimeoutError(f"{function.__name__} has not returned within {patience:g} s; its stacks are above")
            error, result = here.recv()
        process.join(5)
    finally:
        process.kill()
    if error is not None:
        raise error
    return result


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection, patience: float) -> None:
    faulthandler.dump_traceback_later(patience)
    try:
        answer.send((None, function(*arguments)))
    except Exception as error:
        answer.send((error, None))
        if not isinstance(error, AssertionError):
            raise  # so that its traceback is printed


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], wrong: str | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if wrong is not None:
        from tests.torture.wrong import WRONG

        WRONG[wrong].apply()
    function(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class Server:
    """`optserve serve`, in a child that is started again and again with the same arguments."""

    def __init__(self, *arguments: str, log: Path, wrong: str | None = None) -> None:
        self._arguments = arguments
        self._log = log
        self._wrong = wrong
        self._litter = tempfile.TemporaryDirectory(
            prefix="optserve-"
        )  # where servers that are killed leave what they had
        self._process: BaseProcess | None = None
        self.address = ""

    def start(self) -> None:
        """Start it, and come back at once."""
        assert self._process is None
        self._said = b""
        self._output, output = CONTEXT.Pipe(duplex=False)
        self._process = start(_serve, self._arguments, self._log, self._litter.name, output, wrong=self._wrong)
        output.close()

    def wait(self) -> None:
        """Wait until it serves; raises AssertionError if it ended before."""
        while not self._said.endswith(b"\n"):
            data = os.read(self._output.fileno(), 1 << 10)
            assert data, f"the server ended: {self._log.read_text()[-3000:]}"
            self._said += data
        self.address = self._said.decode().removeprefix("listening on ").strip()

    def kill(self) -> None:
        """End it by SIGKILL; raises AssertionError if it had ended by itself."""
        assert self._process is not None
        self._process.kill()
        self._process.join()
        status, self._process = self._process.exitcode, None
        self._output.close()
        assert status == -9, f"the server ended by itself, with status {status}: {self._log.read_text()[-3000:]}"

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._output.close()
        self._litter.cleanup()


def _serve(arguments: tuple[str, ...], log: Path, temporary: str, output: Connection) -> None:
    from optserve_server.cli import app

    tempfile.tempdir = temporary
    os.dup2(output.fileno(), sys.stdout.fileno())
    with log.open("ab") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    app(["serve", *arguments])
