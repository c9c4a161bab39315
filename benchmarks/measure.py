"""Interleaved timing: every contender runs once a round, so that a noisy machine disturbs all of them alike."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """This ÷ the other, round by round: lower quartile, median, upper quartile."""
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        return ratios[len(ratios) // 4], statistics.median(ratios), ratios[-1 - len(ratios) // 4]


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time each contender once a round; the first `warm_up` rounds don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warm_up + rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            elapsed = time.perf_counter() - begin
            if round_number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def keep(name: str, figures: object) -> Path:
    """Write figures as JSON, with what they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"processors": os.cpu_count(), "python": platform.python_version(), "system": platform.machine()}
    path.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2, ensure_ascii=False) + "\n")
    return path
