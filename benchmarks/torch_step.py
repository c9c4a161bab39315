"""A training step in torch whose optimizer is on a server, beside one whose optimizer is torch's fused one, in the process.

A transformer of 25 million float32 parameters reads 512 tokens. `step()` is what the script waits for in that call, and in
clipping: with overlap by far not all that it costs, since gradients are sent during backward and parameters come back during
forward. What that takes from them, and from the processors, is in the time of whole steps.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.children import python, server
from benchmarks.link import NoLink, isolated, network
from benchmarks.measure import Timing, keep
from benchmarks.tables import table, within_quartiles
from benchmarks.units import count, duration

TOKENS = 512
ROUNDS = 9
PORT = 50051
LINK = {"rate": 1e9 / 8, "delay": 0.0005, "room": 0.1}
TRAINER = "benchmarks.torch_trainer"


@dataclass(frozen=True)
class Way:
    """Where the optimizer is: without a transport, in the process; and who clips gradients: the script, or the server."""

    transport: str | None = None
    overlap: bool = True
    clipped_here: bool = False
    clipped_there: bool = False


WAYS: Mapping[str, Mapping[str, Way]] = {
    "host": {
        "torch, fused": Way(),
        "shared memory": Way("shared_memory"),
        "shared memory, no overlap": Way("shared_memory", overlap=False),
        "TCP": Way("stream"),
        "TCP, no overlap": Way("stream", overlap=False),
        "torch, fused, clip_grad_norm_": Way(clipped_here=True),
        "shared memory, clip_grad_norm_": Way("shared_memory", clipped_here=True),
        "shared memory, max_norm": Way("shared_memory", clipped_there=True),
    },
    "link": {
        "torch, fused": Way(),
        "TCP": Way("stream"),
        "TCP, no overlap": Way("stream", overlap=False),
    },
}
TITLES = {"host": "the server on this host", "link": "the server behind a link of 1 Gbit/s and 1 ms there and back"}
LOCAL, OVERLAPPED, NO_OVERLAP = "torch, fused", "TCP", "TCP, no overlap"
BASES = {name: "torch, fused, clip_grad_norm_" if "norm" in name else LOCAL for name in WAYS["host"]}  # to compare with
PHASES = {"backward": "forward and backward", "step": "step()", "whole": "whole step"}


def on_this_host(rounds: int) -> dict[str, Any]:
    """Everyone, with a server beside them."""
    with server() as (address, _), python(TRAINER, "host", address, str(rounds)) as trainer:
        return _figures(trainer.read_line())


def over_a_link(rounds: int) -> dict[str, Any]:
    """Some of them, on a host behind a link; raises NoLink."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        isolated("benchmarks.torch_step", str(rounds), str(path))
        return _figures(path.read_text())


def run(*, short: bool) -> None:
    """Measure, show, and keep the figures unless they are of a short run."""
    console, rounds = Console(), 1 if short else ROUNDS
    figures = {}
    with console.status("training steps on this host"):
        figures["host"] = on_this_host(rounds)
    try:
        with console.status("training steps over a link"):
            figures["link"] = over_a_link(rounds)
    except NoLink as missing:
        console.print(f"· without a link: {missing}")
    for where, found in figures.items():
        console.print(
            f"{count(found['parameters'])} parameters, {TOKENS} tokens, {TITLES[where]}", shown(found), hiding(found)
        )
    if not short and len(figures) == len(WAYS):
        console.print(f"kept in {keep('torch_step', figures)}")


def shown(found: Mapping[str, Any]) -> Table:
    """What was found in one place."""
    made = table("", "", *PHASES.values(), "step() ÷ torch's", "whole step ÷ torch's", "state here")
    for name, turns in found["turns"].items():
        times = [duration(Timing(tuple(turn[phase] for turn in turns)).median) for phase in PHASES]
        ratios = [found["ratios"][phase].get(name) for phase in ("step", "whole")]
        compared = [within_quartiles(each) if each else "" for each in ratios]
        made.add_row(name, *times, *compared, f"{found['state_bytes'][name] / 1e6:.0f} MB")
    return made


def hiding(found: Mapping[str, Any]) -> str:
    """What overlap is for."""
    low, median, high = (duration(seconds) if seconds > 0 else f"−{duration(-seconds)}" for seconds in found["hidden"])
    waited, computed = (
        duration(Timing(tuple(turn[phase] for turn in found["turns"][name])).median)
        for name, phase in ((NO_OVERLAP, "step"), (LOCAL, "backward"))
    )
    return (
        f"Over TCP, overlap shortens a whole step by {median} ({low} to {high}); without it, `step()` is waited for {waited}, "
        f"and forward and backward, behind which that could hide, take {computed} with torch's optimizer."
    )


def hidden(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[float, float, float]:
    """Seconds by which overlap shortens a whole step over TCP: the median of the rounds, between their quartiles."""
    late, early = ([turn["whole"] for turn in turns[name]] for name in (NO_OVERLAP, OVERLAPPED))
    seconds = sorted(one - other for one, other in zip(late, early, strict=True))
    return seconds[len(seconds) // 4], seconds[len(seconds) // 2], seconds[-1 - len(seconds) // 4]


def _figures(text: str) -> dict[str, Any]:
    """What a trainer printed, with ratios to torch's optimizer."""
    found: dict[str, Any] = json.loads(text)
    turns = found["turns"]

    def timing(name: str, phase: str) -> Timing:
        return Timing(tuple(turn[phase] for turn in turns[name]))

    found["ratios"] = {
        phase: {name: timing(name, phase).ratio(timing(BASES[name], phase)) for name in turns if name != BASES[name]}
        for phase in ("step", "whole")
    }
    found["hidden"] = hidden(turns)
    return found


def _isolated(rounds: str, path: str) -> None:
    """Measure over a link from this process's network, which has nothing else in it."""
    with ExitStack() as stack:
        host = stack.enter_context(network(1, **LINK)).hosts[0]
        stack.enter_context(server(f"0.0.0.0:{PORT}"))
        trainer = stack.enter_context(host.python(TRAINER, "link", host.address_of_hub(PORT), rounds))
        Path(path).write_text(trainer.read_line())


if __name__ == "__main__":
    _isolated(*sys.argv[1:])
