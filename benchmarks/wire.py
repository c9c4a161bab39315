"""A step over TCP on one host, from a thousand parameters to 25 million: Adam on a server, gradients there, parameters back.

Beside it, in the same rounds: a raw socket that echoes the same bytes, a gRPC Python stream that does, the engine inside this
process, and `torch.optim.Adam(fused=True)` with nothing remote.
"""

import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

import optserve
from benchmarks.measure import Timing, interleaved, keep
from benchmarks.peers import raw_echo, stream_echo
from benchmarks.rules import torch_adam
from optserve import optim

SIZES = {1_000: 1000, 100_000: 200, 2_500_000: 40, 25_000_000: 15}  # parameters: rounds
LARGEST_MESSAGE = 10_000_000  # bytes: above, one message is not how anyone would send them


@contextmanager
def process(module: str, *arguments: str) -> Iterator[str]:
    """A program that prints `listening on ADDRESS`; gives the address."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout is not None
        try:
            yield program.stdout.readline().split()[-1]
        finally:
            program.terminate()


def raw(gradient: np.ndarray, stack: ExitStack) -> Callable[[], object]:
    """The same bytes over a raw socket, there and back."""
    host, _, port = stack.enter_context(process("benchmarks.peers.raw_echo", str(gradient.nbytes))).rpartition(":")
    connection = stack.enter_context(socket.create_connection((host, int(port))))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = memoryview(bytearray(gradient.nbytes))

    def echo() -> None:
        connection.sendall(gradient.data)
        raw_echo.receive(connection, back)

    return echo


def stream(gradient: np.ndarray, stack: ExitStack) -> Callable[[], object]:
    """The same bytes as one message each way on an open gRPC stream."""
    channel = stack.enter_context(
        grpc.insecure_channel(stack.enter_context(process("benchmarks.peers.stream_echo")), stream_echo.OPTIONS)
    )
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers = channel.stream_stream(stream_echo.METHOD)(iter(requests.get, None))
    stack.callback(requests.put, None)

    def echo() -> None:
        requests.put(gradient.tobytes())
        next(answers)

    return echo


def served(gradient: np.ndarray, address: str, stack: ExitStack) -> Callable[[], object]:
    """A step of optserve."""
    client = stack.enter_context(optserve.Client(address))
    weights = client.create_parameter_set("bench", {"x": np.zeros_like(gradient)}, optim.Adam())
    return lambda: weights.step({"x": gradient})


def run() -> None:
    """Measure every size."""
    optserve.keep_freed_memory()
    table = Table(title="one step, both ways, medians")
    for column in ("parameters", "raw echo", "gRPC echo", "in process", "torch, local", "optserve, TCP", "÷ raw echo"):
        table.add_column(column, justify="right")
    figures = {}
    for size, rounds in SIZES.items():
        timings = _measure(np.random.default_rng(0).normal(size=size).astype(np.float32), rounds)
        low, median, high = timings["optserve, TCP"].ratio(timings["raw echo"])
        figures[size] = {name: timing.seconds for name, timing in timings.items()}
        cells = [_seconds(timings.get(column.header)) for column in table.columns[1:-1]]
        table.add_row(f"{size:,}", *cells, f"{median:.2f} ({low:.2f}-{high:.2f})")
    Console().print(table)
    Console().print(f"kept in {keep('wire', figures)}")


def _measure(gradient: np.ndarray, rounds: int) -> dict[str, Timing]:
    with ExitStack() as stack:
        contenders = {"raw echo": raw(gradient, stack)}
        if gradient.nbytes <= LARGEST_MESSAGE:
            contenders["gRPC echo"] = stream(gradient, stack)
        contenders["in process"] = served(gradient, ":memory:", stack)
        contenders["torch, local"] = torch_adam(gradient)
        address = stack.enter_context(process("optserve_server", "serve", "--listen", "127.0.0.1:0"))
        contenders["optserve, TCP"] = served(gradient, address, stack)
        return interleaved(contenders, rounds, warm_up=3)


def _seconds(timing: Timing | None) -> str:
    if timing is None:
        return "—"
    return f"{timing.median * 1e3:.1f} ms" if timing.median > 1e-3 else f"{timing.median * 1e6:.0f} µs"
