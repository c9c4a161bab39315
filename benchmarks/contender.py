"""A contender in a process of its own, where its threads and its runtime meet no other's.

It is stopped while it has no turn, with the processes it started: some spin when they have nothing to do, as torch RPC does on
one host, and would take the processors from those who work.

`python -m benchmarks.contender MODULE SIZE` enters the module's `contender(SIZE)`, a context that gives a function which
does one step. It prints `ready`; then, for each line on stdin, a number of steps, it does them and prints their seconds.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

# Idle threads of OpenMP wait instead of spinning; and all have the allocator that optserve's server gives itself.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
READY = "ready"
WARM_UP = 3  # steps


@dataclass(frozen=True)
class Missing:
    """A contender that could not start, and why."""

    reason: str


@contextmanager
def started(module: str, size: int) -> Iterator[Callable[[int], list[float]] | Missing]:
    """Start a contender; gives a function that runs so many steps and returns their seconds."""
    command = [sys.executable, "-m", "benchmarks.contender", module, str(size)]
    environment = os.environ | ENVIRONMENT
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,
        ) as process,
    ):
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def run(steps: int) -> list[float]:
            with _signalled(process.pid, signal.SIGCONT, signal.SIGSTOP):
                print(steps, file=requests, flush=True)
                seconds = [float(text) for text in answers.readline().split()]
            if len(seconds) != steps:
                raise RuntimeError(f"{module} ended: {_last_line(errors)}")
            return seconds

        if answers.readline().strip() == READY:
            with _signalled(process.pid, signal.SIGSTOP, signal.SIGCONT):
                yield run
        else:
            process.wait()
            yield Missing(_last_line(errors))


def timed(step: Callable[[], object]) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main(module: str, size: int) -> None:
    """Serve steps until stdin ends."""
    with importlib.import_module(module).contender(size) as step:
        for _ in range(WARM_UP):
            step()
        print(READY, flush=True)
        for line in sys.stdin:
            print(*[timed(step) for _ in range(int(line))], flush=True)


@contextmanager
def _signalled(group: int, begin: signal.Signals, end: signal.Signals) -> Iterator[None]:
    os.killpg(group, begin)
    try:
        yield
    finally:
        os.killpg(group, end)


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    return (errors.read().strip().splitlines() or ["it said nothing"])[-1]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
