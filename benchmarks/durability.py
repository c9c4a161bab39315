"""What durability costs: checkpoints beside steps, journals for each step, and how long a restart takes.

Rates of the disk are measured in the same rounds as what is compared with them, of files of the same size that are written
past the page cache 16 MiB at a time and synced, and read likewise.
"""

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import optserve
from benchmarks.contender import timed
from benchmarks.measure import interleaved, keep
from benchmarks.peers.gradient import gradient
from benchmarks.units import count, duration
from optserve import optim

SIZE = 25_000_000
JOURNALED = {1_000: 200, 1_000_000: 20, SIZE: 1}  # parameters, and steps in a row of which the median counts
JOURNALS = ("off", "everysec", "always")
SLOTS = 2  # of Adam
ROUNDS = 12
CHUNK = 16 << 20  # bytes
TENSOR = "x"


@contextmanager
def serving(data_dir: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`optserve serve` on a data directory; its address, and its process."""
    command = [sys.executable, "-m", "optserve_server", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    command += ["--checkpoint-interval", "1e9", "--log-level", "error", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("listening on ").strip(), process
        finally:
            process.kill()


@dataclass
class Worker:
    """A set under Adam on a server on this host, and what its worker does with it."""

    weights: optserve.ParameterSet
    size: int

    @classmethod
    def of(cls, client: optserve.Client, size: int, journal: str = "off") -> "Worker":
        """Create the set, and its first checkpoint."""
        start = {TENSOR: np.zeros(size, np.float32)}
        weights = client.create_parameter_set(f"{journal}-{size}", start, optim.Adam(), journal=journal)
        weights.checkpoint()
        worker = cls(weights, size)
        worker.buffers = weights.gradient_buffers()
        worker.buffers[TENSOR][:] = gradient(size)
        return worker

    buffers: Any = None

    @property
    def nbytes(self) -> int:
        """Size of the set's state."""
        return 4 * self.size * (1 + SLOTS)

    def step(self) -> None:
        """Push and pull, copying nothing."""
        self.weights.step(self.buffers, copy=False)

    def checkpoint(self) -> None:
        """Have a checkpoint written of what is new."""
        self.weights.checkpoint()

    def steps_beside_a_checkpoint(self) -> list[float]:
        """Seconds of each step while a checkpoint is written."""
        writing = threading.Thread(target=self.checkpoint)
        writing.start()
        steps = [timed(self.step)]
        while writing.is_alive():
            steps.append(timed(self.step))
        writing.join()
        return steps


def write_file(path: Path, nbytes: int) -> None:
    """Write a file past the page cache, and sync it."""
    memory = mmap.mmap(-1, CHUNK)
    memory.write(np.random.default_rng(0).bytes(CHUNK))
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
    for _ in range(-(-nbytes // CHUNK)):
        os.write(descriptor, memory)
    os.fdatasync(descriptor)
    os.close(descriptor)


def read_files(paths: Sequence[Path]) -> None:
    """Read files past the page cache."""
    memory = mmap.mmap(-1, CHUNK)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        while os.readv(descriptor, [memory]):
            pass
        os.close(descriptor)


def forget(paths: Sequence[Path]) -> None:
    """Let the page cache have nothing of files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(process: subprocess.Popen[str], what: str) -> int:
    """Bytes of memory that a process has (VmRSS), or has had at most (VmHWM)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(what))


def checkpoints(directory: Path, rounds: int) -> dict[str, Any]:
    """Rates of checkpoints and of the disk, steps with and without one, and memory."""
    with serving(directory / "all") as (address, process), optserve.Client(address) as client:
        worker = Worker.of(client, SIZE)
        figures: dict[str, list[Any]] = {
            name: [] for name in ("disk", "checkpoint", "alone", "beside", "worst", "usual")
        }
        for _ in range(rounds):
            alone = [timed(worker.step) for _ in range(20)]
            beside = worker.steps_beside_a_checkpoint()
            worker.step()
            figures["disk"].append(timed(partial(write_file, directory / "raw", worker.nbytes)))
            figures["checkpoint"].append(timed(worker.checkpoint))
            figures["alone"].append(statistics.median(alone))
            figures["usual"].append(max(alone))
            figures["beside"].append(statistics.median(beside))
            figures["worst"].append(max(beside))
        peak = resident(process, "VmHWM")
    return {
        "bytes": worker.nbytes,
        "of_disk": _ratios(figures["disk"], figures["checkpoint"]),
        "beside_over_alone": _ratios(figures["beside"], figures["alone"]),
        "worst_over_allowed": _ratios(figures["worst"], [each + worker.nbytes / 8e9 for each in figures["alone"]]),
        "peak_memory": peak,
        "seconds": figures,
    }


def capped(directory: Path, rounds: int, part: float) -> dict[str, Any]:
    """The step that waits if only a part of the state may be copied."""
    with (
        serving(directory / f"copied-{part}", "--checkpoint-copy", str(part)) as (address, process),
        optserve.Client(address) as client,
    ):
        worker = Worker.of(client, SIZE)
        worst = [max(worker.steps_beside_a_checkpoint()) for _ in range(rounds)]
        return {"stalled_step": worst, "peak_memory": resident(process, "VmHWM")}


def journals(directory: Path, rounds: int) -> dict[int, Any]:
    """Seconds of a step with each setting, and how much longer than with none."""
    figures = {}
    for size, batch in JOURNALED.items():
        with serving(directory / f"journals-{size}") as (address, _), optserve.Client(address) as client:
            workers = {journal: Worker.of(client, size, journal) for journal in JOURNALS}
            timings = interleaved({name: _batch(each.step, batch) for name, each in workers.items()}, rounds)
        shutil.rmtree(directory / f"journals-{size}")
        seconds = {name: [each / batch for each in timing.seconds] for name, timing in timings.items()}
        figures[size] = {
            "seconds": seconds,
            "over_off": {name: timing.ratio(timings["off"]) for name, timing in timings.items()},
        }
    return figures


def restarts(directory: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of a server to serving, with nothing to restore and with a set; and of reading its files."""
    with serving(directory / "full") as (address, _), optserve.Client(address) as client:
        worker = Worker.of(client, SIZE)
        worker.step()
        worker.checkpoint()
    (newest, _) = sorted((directory / "full").rglob("checkpoint-*"), reverse=True)
    files = sorted(newest.iterdir())
    seconds: dict[str, list[float]] = {"empty": [], "full": [], "read": []}
    for _ in range(rounds):
        for name in ("empty", "full"):
            forget(files)
            seconds[name].append(timed(partial(_start, directory / name)))
        seconds["read"].append(timed(partial(read_files, files)))
    allowed = [2 + each for each in seconds["read"]]
    return {"full_over_allowed": _ratios(seconds["full"], allowed), "seconds": seconds}


def run(rounds: int = ROUNDS) -> None:
    """Measure all, and keep the figures."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        figures = {
            "checkpoints": checkpoints(directory, rounds),
            "capped": {part: capped(directory, rounds // 2, part) for part in (0.25, 0.0)},
            "journals": journals(directory, rounds),
            "restarts": restarts(directory, rounds // 2),
        }
    _show(figures)
    Console().print(f"kept in {keep('durability', figures)}")


def _start(data_dir: Path) -> None:
    with serving(data_dir):
        pass


def _batch(step: Callable[[], None], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of medians, between the quartiles of the ratios round by round."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    median = statistics.median(numerators) / statistics.median(denominators)
    return ratios[len(ratios) // 4], median, ratios[-1 - len(ratios) // 4]


def _show(figures: dict[str, Any]) -> None:
    table = Table(title=f"durability, {count(SIZE)} float32 parameters under Adam", box=box.SIMPLE)
    for column in ("", "of medians", "quartiles"):
        table.add_column(column, justify="left" if not column else "right")
    made, restarted = figures["checkpoints"], figures["restarts"]
    rows = {
        "rate of a checkpoint ÷ of the disk": made["of_disk"],
        "median step beside a checkpoint ÷ alone": made["beside_over_alone"],
        "worst step beside one ÷ (step + state ÷ 8 GB/s)": made["worst_over_allowed"],
        "restart ÷ (2 s + reading the files)": restarted["full_over_allowed"],
    }
    for size, each in figures["journals"].items():
        for journal in JOURNALS[1:]:
            rows[f"a step of {count(size)} with journal {journal} ÷ off"] = each["over_off"][journal]
    for name, (low, median, high) in rows.items():
        table.add_row(name, f"{median:.2f}", f"{low:.2f}–{high:.2f}")
    console = Console()
    console.print(table)
    least = figures["capped"][0.0]["peak_memory"]
    for part, peak in ((1.0, made["peak_memory"]), (0.25, figures["capped"][0.25]["peak_memory"])):
        console.print(f"memory ÷ state, {part:g} of it copied: {1 + (peak - least) / made['bytes']:.2f}")
    for part, each in figures["capped"].items():
        stalled = statistics.median(each["stalled_step"])
        console.print(f"the step that waits, {part:g} of the state copied: {duration(stalled)}")
    for size, each in figures["journals"].items():
        seconds = ", ".join(f"{name} {duration(statistics.median(values))}" for name, values in each["seconds"].items())
        console.print(f"a step of {count(size)}: {seconds}")
