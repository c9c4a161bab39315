"""What a run on the wire found, as a picture.

Colours are Okabe and Ito's and one of Tol's, which colour-blind people can tell apart too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.measure import Results, Timing
from benchmarks.units import count, duration

TITLE = "One step of Adam: a gradient goes there, parameters come back"
SUBTITLE = "Median time by number of parameters, on one host. Echoes return the bytes and update nothing."
COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#CC79A7", "#009E73", "#000000", "#882255")
GREYS = ("#888888", "#A0A0A0", "#B4B4B4")
MARKERS = "s^Dv<>P"
INK, FAINT = "#333333", "#EBEBEB"
LINE = 0.042  # height of a line of text, of the axes
PASSES = 200


@dataclass(frozen=True)
class Curve:
    """A contender's medians by size, and how its line and its label look."""

    name: str
    seconds: Mapping[int, float]
    line: Mapping[str, Any]
    label: Mapping[str, Any]


def draw(emphasized: Collection[str], results: Results, path: Path) -> None:
    """Seconds of a step over parameters, both logarithmic; every curve is named where it ends."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(TITLE, x=0.075, ha="left", weight="bold", color=INK)
    axes.set_title(SUBTITLE, loc="left", fontsize="medium", color=INK, pad=12)
    drawn = curves(emphasized, results)
    for curve in drawn:
        axes.plot(list(curve.seconds), list(curve.seconds.values()), markersize=5, **curve.line)
    _finish(axes, list(results))
    _name(axes, drawn)
    figure.savefig(path, dpi=150)


def curves(emphasized: Collection[str], results: Results) -> list[Curve]:
    """Everyone who was there: the emphasized in colour and bold, the others in grey and told apart by markers."""
    colours, greys, markers = cycle(COLOURS), cycle(GREYS), cycle(MARKERS)
    found: dict[str, dict[int, float]] = {}
    for size, timings in results.items():
        for name, timing in timings.items():
            if isinstance(timing, Timing):
                found.setdefault(name, {})[size] = timing.median
    drawn = []
    for name, seconds in found.items():
        if name in emphasized:
            colour = next(colours)
            line = {"color": colour, "marker": "o", "linewidth": 2.4, "zorder": 3}
            label = {"color": colour, "weight": "bold"}
        else:
            line = {"color": next(greys), "marker": next(markers), "linewidth": 1.2, "zorder": 2}
            label = {"color": INK}
        drawn.append(Curve(name, seconds, line, label))
    return drawn


def spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved apart until a line of text fits between any two, all of them at most 1."""
    placed = list(heights)
    for _ in range(PASSES):
        placed[-1] = min(placed[-1], 1.0)
        for lower, upper in pairwise(range(len(placed))):
            overlap = max(0.0, LINE - (placed[upper] - placed[lower]))
            placed[lower] -= overlap / 2
            placed[upper] += overlap / 2
    return placed


def _finish(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="float32 parameters", ylabel="time of a step, median")
    axes.set_xticks(sizes, labels=[count(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.grid(color=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.autoscale_view()


def _name(axes: Axes, drawn: Sequence[Curve]) -> None:
    ends = {curve.name: list(curve.seconds.items())[-1] for curve in drawn}
    by_height = sorted(drawn, key=lambda curve: ends[curve.name][1])
    to_axes = axes.transData - axes.transAxes
    heights = spread([to_axes.transform(ends[curve.name])[1] for curve in by_height])
    for curve, height in zip(by_height, heights, strict=True):
        leader = {"arrowstyle": "-", "color": curve.line["color"], "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 4}
        axes.annotate(
            curve.name,
            ends[curve.name],
            (1.08, height),
            textcoords="axes fraction",
            verticalalignment="center",
            arrowprops=leader,
            **curve.label,
        )
