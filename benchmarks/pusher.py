"""Many workers in one process: `python -m benchmarks.pusher ADDRESS SET FIRST COUNT SIZE`.

Each is a thread with a connection of its own, and pushes a gradient of `SIZE` elements, not the others'. The process says
`ready`; then, for each line on stdin, a number of pushes and of seconds, each worker does so many pushes, before each of which
it pauses for up to so many seconds, and the process prints as JSON, for each worker and push, when it ended by the monotonic
clock, and how long it took.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat

import numpy as np
from grpc import _common

import optserve
from benchmarks.ours.worker import TENSOR
from optserve import ParameterSet
from optserve._transport import CHANNEL_OPTIONS

_common.MAXIMUM_WAIT_TIMEOUT = (
    60.0  # else all who wait look at the clock ten times a second, as on machines of their own
)
CHANNEL_OPTIONS.append(("grpc.use_local_subchannel_pool", 1))  # else channels of one process share a connection


def main(address: str, set_id: str, first: str, count: str, size: str) -> None:
    """Push until stdin ends."""
    workers = range(int(first), int(first) + int(count))
    gradients = [{TENSOR: np.random.default_rng(worker).standard_normal(int(size), np.float32)} for worker in workers]
    with ExitStack() as stack, ThreadPoolExecutor(len(workers)) as threads:
        sets = []
        for worker in workers:
            client = stack.enter_context(optserve.Client(address, transport="stream"))
            sets.append(stack.enter_context(client.parameter_set(set_id).worker(f"worker-{worker}")))
        print("ready", flush=True)
        for line in sys.stdin:
            times, pause = line.split()
            pushes = threads.map(push, sets, gradients, repeat(int(times)), repeat(float(pause)))
            print(json.dumps(list(pushes)), flush=True)


def push(weights: ParameterSet, gradient: dict[str, np.ndarray], times: int, pause: float) -> list[tuple[float, float]]:
    """When each push ended, and how long it took, in seconds."""
    pushes = []
    for _ in range(times):
        time.sleep(random.uniform(0.0, pause))
        began = time.monotonic()
        weights.push(gradient)
        ended = time.monotonic()
        pushes.append((ended, ended - began))
    return pushes


if __name__ == "__main__":
    main(*sys.argv[1:])
