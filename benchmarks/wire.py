"""One optimizer step, from a thousand parameters to a hundred million: a gradient goes there, parameters come back.

All on one host, everyone in processes of their own and in the same rounds: optserve's ways to do it; Adam and who else brings
it to several processes; and programs that only send the bytes back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks import picture, tables
from benchmarks.measure import RESULTS, Results, Timing, Timings, interleaved_processes, keep
from benchmarks.units import count

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Effort:
    """How often a size is measured: rounds, and steps in a row of each contender in a round.

    Not `together`, a contender has its rounds before the next one starts: memory would not hold them all.
    """

    rounds: int
    batch: int
    together: bool = True


EFFORTS = {
    1_000: Effort(30, 50),
    10_000: Effort(30, 50),
    100_000: Effort(30, 20),
    1_000_000: Effort(30, 10),
    10_000_000: Effort(20, 3),
    25_000_000: Effort(15, 3),
    100_000_000: Effort(5, 1, together=False),
}  # by number of parameters

OURS = {
    "optserve, shared memory": "benchmarks.ours.shared_memory",
    "optserve, shared, copied": "benchmarks.ours.shared_memory_copied",
    "optserve, shared, no guard": "benchmarks.ours.shared_memory_unguarded",
    "optserve, shared, 2 in sync": "benchmarks.ours.shared_memory_sync",
    "optserve, TCP": "benchmarks.ours.tcp",
    "optserve, TCP, bf16": "benchmarks.ours.tcp_bfloat16",
    "optserve, TCP, int8/bf16": "benchmarks.ours.tcp_int8",
    "optserve, in process": "benchmarks.ours.in_process",
}
OTHERS = {
    "torch Adam, local": "benchmarks.peers.local_adam",
    "gloo all-reduce": "benchmarks.peers.gloo",
    "torch RPC": "benchmarks.peers.torch_rpc",
    "Ray actor": "benchmarks.peers.ray_actor",
}
ECHOES = {
    "raw TCP echo": "benchmarks.peers.raw_echo",
    "gRPC stream echo": "benchmarks.peers.stream_echo",
    "Arrow Flight echo": "benchmarks.peers.arrow_flight",
}

COMPARISONS = {
    1_000: [
        ("optserve, shared memory", "gRPC stream echo"),
        ("optserve, TCP", "gRPC stream echo"),
        ("torch RPC", "optserve, TCP"),
        ("Ray actor", "optserve, TCP"),
    ],
    25_000_000: [
        ("optserve, TCP", "raw TCP echo"),
        ("torch RPC", "optserve, TCP"),
        ("optserve, shared memory", "torch Adam, local"),
        ("optserve, shared, no guard", "torch Adam, local"),
        ("optserve, shared, copied", "torch Adam, local"),
        ("optserve, shared, 2 in sync", "gloo all-reduce"),
        ("optserve, TCP, bf16", "optserve, TCP"),
        ("optserve, TCP, int8/bf16", "optserve, TCP"),
    ],
}  # by number of parameters

NOTES = (
    "Adam on one float32 tensor; torch's is fused. Everything is on one host, and TCP is loopback. At 100 M, contenders run "
    "one after another, at fewer they take turns.",
    'optserve checks every gradient: finite, norm, digest; "no guard" does not. "Shared memory" computes the gradient in the '
    'handle\'s buffer and reads parameters in place, "copied" takes and returns ordinary arrays; "int8/bf16" is int8 there, '
    "bfloat16 back.",
    "Not TCP: on one host torch RPC sends control messages, and Ray its arrays, through shared memory.",
    'gloo: two workers average over TCP, then each updates all parameters on its share of the processors. "2 in sync": two '
    "workers' gradients make one update.",
    "Echoes do no work. The gRPC stream returns each message as it arrives, the other two begin when they have everything.",
)


def run(sizes: Sequence[int]) -> None:
    """Measure these sizes and show the figures; keep them if they are all."""
    console = Console()
    results = {}
    for size in sizes:
        with console.status(f"one step of {count(size)} parameters"):
            results[size] = measured(size)
    ratios = {size: compared(size, timings) for size, timings in results.items() if size in COMPARISONS}
    console.print(tables.medians((OURS, OTHERS, ECHOES), results))
    if ratios:
        console.print(tables.quartiles(ratios))
    for line in (*tables.missing(results), *NOTES):
        console.print(f"· {line}", highlight=False, markup=False)
    if len(results) == len(EFFORTS):
        console.print(f"kept in {keep('wire', figures(results, ratios))}")
        picture.draw(OURS, results, RESULTS / "wire.png")


def measured(size: int) -> Timings:
    """Time all contenders."""
    effort, contenders = EFFORTS[size], OURS | OTHERS | ECHOES
    if effort.together:
        return interleaved_processes(contenders, size, effort.rounds, effort.batch)
    return {
        name: interleaved_processes({name: module}, size, effort.rounds, effort.batch)[name]
        for name, module in contenders.items()
    }


def compared(size: int, timings: Timings) -> dict[str, Quartiles]:
    """The ratios that matter at this size, of those contenders that are there."""
    found = {}
    for name, other in COMPARISONS[size]:
        above, below = timings[name], timings[other]
        if isinstance(above, Timing) and isinstance(below, Timing):
            found[f"{name} ÷ {other}"] = above.ratio(below)
    return found


def figures(results: Results, ratios: Mapping[int, Mapping[str, Quartiles]]) -> dict[str, object]:
    """What is kept: seconds of a step in each round, by size and contender; and quartiles of the ratios."""
    seconds = {
        size: {name: timing.seconds for name, timing in timings.items() if isinstance(timing, Timing)}
        for size, timings in results.items()
    }
    return {"seconds": seconds, "ratios": ratios}
