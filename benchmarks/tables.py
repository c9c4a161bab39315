"""What a run on the wire found, for a terminal."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from benchmarks.contender import Missing
from benchmarks.measure import Results, Timing
from benchmarks.units import count, duration


def medians(groups: Sequence[Collection[str]], results: Results) -> Table:
    """Contenders by size, in groups."""
    table = _table("one step, medians", "parameters", *map(count, results))
    for group in groups:
        for name in group:
            table.add_row(name, *(_median(timings[name]) for timings in results.values()))
        table.add_section()
    return table


def quartiles(ratios: Mapping[int, Mapping[str, tuple[float, float, float]]]) -> Table:
    """Ratios by size."""
    table = _table("ratios", "", "parameters", "of medians", "quartiles")
    for size, comparisons in ratios.items():
        for name, (low, median, high) in comparisons.items():
            table.add_row(name, count(size), f"{median:.2f}", f"{low:.2f}–{high:.2f}")
        table.add_section()
    return table


def missing(results: Results) -> Iterator[str]:
    """Who could not take part, and why."""
    for size, timings in results.items():
        for name, timing in timings.items():
            if isinstance(timing, Missing):
                yield f"without {name} at {count(size)}: {timing.reason}"


def _median(timing: Timing | Missing) -> str:
    return "—" if isinstance(timing, Missing) else duration(timing.median)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right")
    return table
