"""What a run on the wire found, for a terminal."""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from benchmarks.contender import Missing
from benchmarks.measure import Results, Timing
from benchmarks.units import count, duration


def medians(groups: Sequence[Collection[str]], results: Results) -> Table:
    """Contenders by size, in groups."""
    made = table("one step, medians", "parameters", *map(count, results))
    for group in groups:
        for name in group:
            made.add_row(name, *(_median(timings[name]) for timings in results.values()))
        made.add_section()
    return made


def quartiles(ratios: Mapping[int, Mapping[str, tuple[float, float, float]]]) -> Table:
    """Ratios by size."""
    made = table("ratios", "", "parameters", "of medians", "quartiles")
    for size, comparisons in ratios.items():
        for name, (low, median, high) in comparisons.items():
            made.add_row(name, count(size), f"{median:.2f}", f"{low:.2f}–{high:.2f}")
        made.add_section()
    return made


def missing(results: Results) -> Iterator[str]:
    """Who could not take part, and why."""
    for size, timings in results.items():
        for name, timing in timings.items():
            if isinstance(timing, Missing):
                yield f"without {name} at {count(size)}: {timing.reason}"


def table(title: str, first: str, *others: str) -> Table:
    """An empty one, of which all columns but the first hold numbers."""
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column(first, no_wrap=True)
    for other in others:
        made.add_column(other, justify="right")
    return made


def spread(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    """The median, and from the lowest to the highest; a dash where one of them is not there."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "—"
    low, middle, high = (text(value) for value in (min(known), statistics.median(known), max(known)))
    return middle if low == high else f"{middle} ({low}–{high})"


def within_quartiles(ratio: Sequence[float]) -> str:
    """A ratio, given between its quartiles."""
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _median(timing: Timing | Missing) -> str:
    return "—" if isinstance(timing, Missing) else duration(timing.median)
