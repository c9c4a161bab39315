"""Interleaved timing: every contender runs in every round, so that a noisy machine disturbs all of them alike."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import machine
from benchmarks.contender import Missing, started, timed

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of a step in each round: the median, where a round has a batch of steps."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """This ÷ the other: the ratio of their medians, between the quartiles of the ratios round by round."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        return ratios[len(ratios) // 4], self.median / other.median, ratios[-1 - len(ratios) // 4]


Timings = Mapping[str, Timing | Missing]  # by contender
Results = Mapping[int, Timings]  # by size


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time each contender, a function in this process, once a round; the first `warm_up` rounds don't count."""
    return _rounds({name: partial(_once, step) for name, step in contenders.items()}, rounds, warm_up)


def interleaved_processes(
    modules: Mapping[str, str], size: int, rounds: int, batch: int = 1, warm_up: int = 2
) -> Timings:
    """Time `batch` steps of each contender, a module in a process of its own, in each round.

    Steps that are shorter than a switch between processes need a batch: the first of them finds cold caches, which the
    median of the batch leaves out.
    """
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(started(module, size)) for name, module in modules.items()}
        turns = {name: partial(run, batch) for name, run in contenders.items() if not isinstance(run, Missing)}
        timings = _rounds(turns, rounds, warm_up)
    missing = {name: value for name, value in contenders.items() if isinstance(value, Missing)}
    return {name: missing.get(name) or timings[name] for name in modules}


def keep(name: str, figures: object) -> Path:
    """Write figures as JSON, with what they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine.description(), "figures": figures}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _once(step: Callable[[], object]) -> tuple[float]:
    return (timed(step),)


def _rounds(turns: Mapping[str, Callable[[], Iterable[float]]], rounds: int, warm_up: int) -> dict[str, Timing]:
    """Give each its turn once a round, beginning with another one each time: nobody always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for round_number in range(warm_up + rounds):
        for name in names:
            steps = turns[name]()
            if round_number >= warm_up:
                seconds[name].append(statistics.median(steps))
        names = names[1:] + names[:1]
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
