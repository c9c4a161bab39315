"""Figures that `python -m benchmarks` has kept, as tables."""

import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import tables, torch_step, wire
from benchmarks.measure import RESULTS, Results, Timing
from benchmarks.tables import within_quartiles
from benchmarks.units import count, duration
from rich.table import Table

JOURNALS = ("off", "everysec", "always")


def table(name: str) -> str:
    """One of them, in Markdown."""
    return "\n".join(TABLES[name]())


def _kept(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _machine() -> Iterator[str]:
    machine = _kept("wire")["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(machine["packages"].items()))
    yield (
        f"{machine['processor']}, {machine['processors']} processors, {machine['system']}, Python {machine['python']}; "
        f"{packages}."
    )


def _steps() -> Iterator[str]:
    return _markdown(tables.medians((wire.OURS, wire.OTHERS, wire.ECHOES), _results()))


def _ratios() -> Iterator[str]:
    ratios = _kept("wire")["figures"]["ratios"]
    return _markdown(tables.quartiles({int(size): found for size, found in ratios.items()}))


def _notes() -> Iterator[str]:
    for line in wire.NOTES:
        yield f"- {line}"


def _results() -> Results:
    seconds = _kept("wire")["figures"]["seconds"]
    return {int(size): {name: Timing(tuple(each)) for name, each in found.items()} for size, found in seconds.items()}


def _rules() -> Iterator[str]:
    yield from _head("rule", "bytes", "update", "of roofline", "with the guard, of roofline", "torch ÷ update")
    for name, found in _kept("rules")["figures"]["rules"].items():
        torch = within_quartiles(found["torch_over_update"]) if "torch_over_update" in found else "—"
        rooflines = [within_quartiles(found["of_roofline"][each]) for each in ("update", "step")]
        median = duration(statistics.median(found["seconds"]["update"]))
        yield _row(name, found["bytes_per_parameter"]["update"], median, *rooflines, torch)


def _torch_here() -> Iterator[str]:
    return _markdown(torch_step.shown(_kept("torch_step")["figures"]["host"]))


def _torch_link() -> Iterator[str]:
    figures = _kept("torch_step")["figures"]["link"]
    yield from _markdown(torch_step.shown(figures))
    yield ""
    yield torch_step.hiding(figures)


def _durability() -> Iterator[str]:
    figures = _kept("durability")["figures"]
    made = figures["checkpoints"]
    yield from _head("", "ratio of medians (quartiles)")
    yield _row("rate of a checkpoint ÷ rate of the disk", within_quartiles(made["of_disk"]))
    yield _row("median step beside a checkpoint ÷ alone", within_quartiles(made["beside_over_alone"]))
    yield _row("worst step beside one ÷ (a step + state ÷ 8 GB/s)", within_quartiles(made["worst_over_allowed"]))
    yield _row(
        "start of a server ÷ (2 s + reading its files)", within_quartiles(figures["restarts"]["full_over_allowed"])
    )


def _journals() -> Iterator[str]:
    yield from _head("parameters", *(f'`journal="{each}"`' for each in JOURNALS))
    for size, found in _kept("durability")["figures"]["journals"].items():
        yield _row(count(int(size)), *(duration(statistics.median(found["seconds"][each])) for each in JOURNALS))


def _standby() -> Iterator[str]:
    figures = _kept("failover")["figures"]
    yield from _head("", "median", "worst")
    for name, seconds in figures["kills"].items():
        yield _row(name, duration(statistics.median(seconds)), duration(max(seconds)))


TABLES = {
    each.__name__.removeprefix("_"): each
    for each in (_machine, _steps, _ratios, _notes, _rules, _torch_here, _torch_link, _durability, _journals, _standby)
}


def _markdown(shown: Table) -> Iterator[str]:
    """A table for a terminal, as one for a page; a line is empty where a section ends."""
    yield from _head(*(str(column.header) for column in shown.columns))
    columns = (list(map(str, column.cells)) for column in shown.columns)
    for cells in zip(*columns, strict=True):
        yield _row(*cells)


def _head(*cells: str) -> Iterable[str]:
    return _row(*cells), "|---|" + "---:|" * (len(cells) - 1)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
