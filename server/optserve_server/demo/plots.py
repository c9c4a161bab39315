"""The pictures. Colours are Okabe and Ito's, which colour-blind people can tell apart too."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optserve_server.demo import plane
from optserve_server.demo.digits import Array
from optserve_server.demo.history import History
from optserve_server.demo.lesson import Lesson
from optserve_server.demo.plane import Descent

BLUE, GREEN, VERMILLION = "#0072B2", "#009E73", "#D55E00"
INK, PALE, FAINT = "#333333", "#CCCCCC", "#EEEEEE"
SMOOTHING = 50  # minibatches that a smoothed loss is the mean of
COLUMNS = 4  # of small multiples
CONTOURS = tuple(0.08 * ring**2 for ring in range(13))  # rings of equal width


def draw_training(history: History, title: str, path: Path) -> None:
    """Loss and accuracy against updates, and how stale the gradients were."""
    figure = _figure(11, 6, title)
    axes = figure.subplot_mosaic([["loss", "staleness"], ["accuracy", "staleness"]], width_ratios=(5, 3))
    _draw_loss(axes["loss"], history)
    _draw_accuracy(axes["accuracy"], history)
    _draw_staleness(axes["staleness"], history)
    axes["loss"].sharex(axes["accuracy"])
    axes["loss"].tick_params(labelbottom=False)
    _save(figure, path)


def draw_descents(descents: Sequence[Descent], path: Path) -> None:
    """Each rule's way over the contours of the valley."""
    figure, panels = _small_multiples(len(descents), f"{plane.STEPS} updates from (−7, 2) on f(x, y) = x²/20 + y²")
    x, y = np.meshgrid(np.linspace(-8, 4, 200), np.linspace(-2.5, 2.5, 100))
    heights = plane.height(x, y)
    for panel, descent in zip(panels, descents, strict=True):
        panel.contourf(x, y, heights, CONTOURS, cmap="Greys", vmin=-2, vmax=30)
        panel.contour(x, y, heights, CONTOURS, colors="white", linewidths=0.8)
        panel.plot(*descent.points.T, "o-", color=BLUE, linewidth=1.3, markersize=3)
        panel.plot(*plane.START, "s", color=VERMILLION, markersize=6)
        panel.plot(0, 0, "+", color=INK, markersize=11)
        outcome = f"f = {plane.height(*descent.points[-1]):.1g}"
        _label(panel, descent.rule.rule, f"learning rate {descent.rule.lr:g}\n{outcome}")
    figure.supxlabel("x")
    figure.supylabel("y")
    _save(figure, path)


def draw_lessons(title: str, lessons: Sequence[tuple[str, str, Lesson]], path: Path) -> None:
    """The loss on the digits of each lesson, given with a name and a remark, in front of all the others'."""
    figure, panels = _small_multiples(len(lessons), title)
    curves = [smoothed(lesson.losses) for _, _, lesson in lessons]
    for panel, (name, remark, lesson), curve in zip(panels, lessons, curves, strict=True):
        for other in curves:
            panel.plot(other, color=PALE, linewidth=0.8)
        panel.plot(curve, color=BLUE, linewidth=2.2)
        panel.set_yscale("log")
        panel.grid(axis="y", color=FAINT)
        _label(panel, name, f"{remark}\ntest accuracy {lesson.accuracy:.1%}")
    figure.supxlabel("updates")
    figure.supylabel(f"training loss (nats), mean of {SMOOTHING} minibatches")
    _save(figure, path)


def smoothed(values: Array) -> Array:
    """The mean of SMOOTHING values around each, or of as many as there are."""
    half = SMOOTHING // 2
    return np.array([values[max(index - half, 0) : index + half].mean() for index in range(len(values))])


def _draw_loss(axes: Axes, history: History) -> None:
    measurements = sorted(history.measurements, key=lambda each: each.version)
    versions = [each.version for each in measurements]
    losses = np.array([each.loss for each in measurements])
    axes.plot(versions, losses, ".", color=PALE, markersize=3, label="one minibatch")
    axes.plot(versions, smoothed(losses), color=BLUE, linewidth=2, label=f"mean of {SMOOTHING} minibatches")
    axes.set(title="Loss on the training images", ylabel="nats", yscale="log")
    axes.grid(axis="y", color=FAINT)
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, history: History) -> None:
    versions, accuracies = zip(*history.accuracies, strict=True)
    axes.plot(versions, accuracies, "o-", color=VERMILLION, linewidth=1.5, markersize=4)
    axes.set(title=f"Accuracy on the test images: {accuracies[-1]:.1%} at the end", xlabel="updates")
    axes.yaxis.set_major_formatter(_percent)
    axes.grid(axis="y", color=FAINT)


def _draw_staleness(axes: Axes, history: History) -> None:
    counts = np.bincount([each.staleness for each in history.measurements])
    axes.bar(range(len(counts)), counts / counts.sum(), color=GREEN, width=0.8)
    axes.set(title="Staleness of the gradients", xlabel="updates between pull and push", ylabel="share of the pushes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_percent)


def _percent(value: float, position: float) -> str:
    return f"{100 * value:.3g}%"


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK)
    return figure


def _small_multiples(count: int, title: str) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / COLUMNS)
    figure = _figure(13, 1 + 2.3 * rows, title)
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for unused in grid.flat[count:]:
        unused.set_axis_off()
    panels = list(grid.flat[:count])
    for lowest in panels[-COLUMNS:]:
        lowest.tick_params(labelbottom=True)
    return figure, panels


def _label(axes: Axes, name: str, text: str) -> None:
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=9, color=INK)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
