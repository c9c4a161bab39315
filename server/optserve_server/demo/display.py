"""The progress of training, live on a terminal."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.console import Group
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table

from optserve_server.demo.history import History

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 100  # steps that the loss shown is a mean of


class Display:
    """A bar and a few numbers about a history, which may grow while they are shown."""

    def __init__(self, history: History, title: str, steps: int) -> None:
        self._history = history
        self._title = title
        self._steps = steps
        self._started = time.monotonic()

    def __rich__(self) -> Group:
        seconds = time.monotonic() - self._started
        done = len(self._history.measurements)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(self._steps, done, width=40), f"{done:,} of {self._steps:,} updates", f"{seconds:.1f} s"
        )
        return Group(f"[bold]{self._title}[/]", bar, Padding(self._numbers(seconds), (1, 0, 0, 0)))

    def _numbers(self, seconds: float) -> Table:
        measurements = self._history.measurements[:]  # other threads append
        table = Table.grid(padding=(0, 2))
        table.add_column(width=12)
        table.add_column(width=8, justify="right", style="bold")
        table.add_column(style="dim")
        if measurements and self._history.accuracies:
            losses = [each.loss for each in measurements]
            staleness = [each.staleness for each in measurements]
            samples = sum(each.samples for each in measurements)
            version, accuracy = self._history.accuracies[-1]
            table.add_row("loss", f"{fmean(losses[-RECENT:]):.4f}", sparkline(losses))
            table.add_row("accuracy", f"{accuracy:.1%}", f"of the test images, after {version:,} updates")
            table.add_row("staleness", f"{fmean(staleness):.1f}", f"updates on average, {max(staleness)} at most")
            table.add_row("speed", f"{len(measurements) / seconds:,.0f}", "steps/s")
            table.add_row("", f"{samples / seconds:,.0f}", "samples/s")
        return table


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Values above zero as a row of blocks, each the mean of a stretch, on a logarithmic scale."""
    stretches = min(width, len(values))
    edges = [len(values) * edge // stretches for edge in range(stretches + 1)]
    levels = [math.log(fmean(values[left:right]) + 1e-9) for left, right in pairwise(edges)]
    lowest, span = min(levels), max(levels) - min(levels) or 1.0
    return "".join(BLOCKS[round((level - lowest) / span * (len(BLOCKS) - 1))] for level in levels)
