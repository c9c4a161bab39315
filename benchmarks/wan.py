"""Ways to train over a slow link: what they achieve by when, and what they send.

Four workers, each on an emulated link to the server; everything else of the machine they share. The network that they train is
the demonstration's, wider, so that sending it takes longer than a round trip; all ways have the same number of images.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import optserve
from benchmarks.children import server
from benchmarks.link import Network, isolated, network
from benchmarks.measure import keep
from benchmarks.training import WORKER, Course, Job, train
from optserve import Async, Policy, Sync, optim, schedules
from optserve_server.demo import digits
from optserve_server.demo.processes import Child

WORKERS = 4
WIDTHS = (64, 512, 256, 10)
BATCH = 64
STEPS = 1000  # of each worker
PORT = 5000
SLOW = {"rate": 100e6 / 8, "delay": 0.02, "room": 0.1}
FAST = {"rate": 100e9 / 8, "delay": 0.0, "room": 1.0}
LEARNING_RATE = 0.003


@dataclass(frozen=True)
class Way:
    policy: Policy
    updates: int  # by each round of steps
    push_format: str | None = None
    pull_format: str | None = None


WAYS = {
    "sync, float32": Way(Sync(WORKERS), 1),
    "sync, int8 up, bfloat16 down": Way(Sync(WORKERS), 1, "Int8", "BFloat16"),
    "async, float32": Way(Async(), WORKERS),
}


def main(steps: int = 100):
    with ExitStack() as stack:
        net = stack.enter_context(network(WORKERS, **SLOW))
        address, _ = stack.enter_context(server(f"0.0.0.0:{PORT}"))
        client = stack.enter_context(optserve.Client(f"127.0.0.1:{PORT}"))
        children = [stack.enter_context(host.python(WORKER)) for host in net.hosts]
        for name, way in WAYS.items():
            decay = schedules.Linear(LEARNING_RATE, 0.0, transition_steps=steps * way.updates)
            before = net.traffic()
            weights = client.create_parameter_set(name.replace(" ", "").replace(",", "-"), digits.initial_parameters(0, widths=WIDTHS), optim.Adam(lr=decay), policy=way.policy)
            jobs = [Job(address=host.address_of_hub(PORT), set_id=weights.id, worker=host.number, seed=0, steps=steps, batch=BATCH, push_format=way.push_format, pull_format=way.pull_format) for host in net.hosts]
            course = train(weights, children, jobs)
            traffic = [a - b for a, b in zip(net.traffic(), before)]
            print(name, f"{course.seconds:.1f} s, {1e3*course.seconds/steps:.1f} ms a step, computing {course.computing:.3f}, to .97 {course.seconds_to(.97)}, {course.accuracy}", traffic[0], statistics.mean(t.bytes for t in traffic)/steps, "exchange ms", [round(1e3*s.exchanging) for s in course.steps[0]][::10], "compute ms", 1e3*statistics.median(s.computing for s in course.steps[0]), flush=True)

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
