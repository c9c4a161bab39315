"""A worker process: `python -m optserve_server.demo.worker ADDRESS SET WORKER SEED STEPS`.

It says `ready`, waits for a line, then prints a measurement as JSON for each step.
"""

import json
import sys
from dataclasses import asdict

import optserve
from optserve_server.demo import digits
from optserve_server.demo.replica import Replica

TIMEOUT = 10.0  # seconds without an answer from the server


def main(address: str, set_id: str, worker: str, seed: str, steps: str) -> None:
    """Train until the steps are done or the parent is gone."""
    training, _ = digits.load()
    with optserve.Client(address, timeout=TIMEOUT) as client:
        replica = Replica(client.parameter_set(set_id), training, worker=int(worker), seed=int(seed), steps=int(steps))
        print("ready", flush=True)
        if sys.stdin.readline():
            for _ in range(int(steps)):
                print(json.dumps(asdict(replica.step())), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
