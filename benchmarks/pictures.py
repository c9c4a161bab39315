"""What the pictures of training have in common."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from benchmarks.picture import COLOURS, FAINT, INK
from benchmarks.tables import spread

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
Curve = tuple[Sequence[float], Sequence[float]]  # ascending x, and y from there on


def picture(width: float, height: float, title: str) -> Figure:
    """An empty one."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", color=INK)
    return figure


def coloured(names: Iterable[str]) -> dict[str, str]:
    """A colour for each."""
    return dict(zip(names, COLOURS, strict=False))


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[Curve]], colours: Mapping[str, str]) -> None:
    """The median of each one's runs, over a band from the lowest to the highest, until half of them have ended."""
    for name, runs in curves.items():
        begin, end = max(x[0] for x, _ in runs), np.median([x[-1] for x, _ in runs])
        grid = np.geomspace(begin, end, 300)
        heights = np.array([np.asarray(y)[np.searchsorted(x, grid[1:], side="right") - 1] for x, y in runs])
        middle = np.median(heights, axis=0)
        axes.fill_between(
            grid[1:], heights.min(axis=0), heights.max(axis=0), color=colours[name], alpha=0.15, linewidth=0
        )
        axes.plot(grid[1:], middle, color=colours[name], linewidth=1.8, label=name)
        axes.plot(grid[-1], middle[-1], "o", color=colours[name], markersize=5)
    axes.grid(color=FAINT)


def over_time(axes: Axes) -> None:
    """Let axes have accuracies over seconds."""
    axes.set(xscale="log", xlabel="seconds", ylabel="accuracy on the test images", ylim=(0.8, 1.0))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))


def draw_range(
    axes: Axes, points: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], colours: Mapping[str, str]
) -> None:
    """The median of each one's values at each x, and lines from the lowest to the highest, side by side."""
    for place, (name, (x, values)) in enumerate(points.items()):
        middle = np.array([np.median(some) for some in values])
        lengths = [middle - [min(some) for some in values], [max(some) for some in values] - middle]
        beside = np.asarray(x) * 1.02 ** (place - len(points) / 2)
        axes.errorbar(beside, middle, lengths, fmt="o-", color=colours[name], linewidth=1.2, markersize=4, label=name)
    axes.grid(color=FAINT)


def draw_bars(
    axes: Axes,
    title: str,
    values: Mapping[str, Sequence[float | None]],
    text: Callable[[float], str],
    colours: Mapping[str, str],
) -> None:
    """A bar for each name, as long as the median of its values, beside their spread."""
    for place, (name, some) in enumerate(values.items()):
        length = 0.0 if None in some else statistics.median(each for each in some if each is not None)
        axes.barh(place, length, color=colours[name], height=0.7)
        label = spread(some, text)
        axes.annotate(label, (length, place), (4, 0), textcoords="offset points", va="center", color=INK, size=9)
    axes.set_yticks(range(len(values)), labels=list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * axes.get_xlim()[1])
    axes.set_xticks([])
    axes.set_title(title, loc="left", size=10, color=INK)


def save(figure: Figure, name: str) -> Path:
    """Write a picture among the documents'."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=0)
    path = PICTURES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
