"""A worker process that does as it is told: `python puppet.py ADDRESS SET_ID CLIENT_ID`.

It joins the set and says so, reads lines such as `push 1.5`, and answers each with one line of JSON.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import optserve


class Puppet:
    """Such a process, as a test holds it."""

    def __init__(self, address: str, set_id: str, client_id: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, address, set_id, client_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, *words: object) -> None:
        """Tell it to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What came of it."""
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def do(self, *words: object) -> dict[str, Any]:
        """Tell it to do something, and wait until it is done."""
        self.begin(*words)
        return self.answer()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)


@contextmanager
def puppet(address: str, set_id: str, client_id: str) -> Iterator[Puppet]:
    """A process that is a member by now, and is killed at the end."""
    worker = Puppet(address, set_id, client_id)
    with worker.process:
        try:
            worker.answer()
            yield worker
        finally:
            worker.signal(signal.SIGKILL)


def obey(address: str, set_id: str, client_id: str) -> None:
    """Read and do, until there is no more to read."""
    with optserve.Client(address) as client, client.parameter_set(set_id).worker(client_id) as weights:
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            verb, *values = line.split()
            print(json.dumps(done(weights, verb, values)), flush=True)


def done(weights: optserve.ParameterSet, verb: str, values: list[str]) -> dict[str, Any]:
    """What comes of a command."""
    match verb:
        case "identity":
            identity = weights.identity
            return {"client_id": identity.client_id, "epoch": identity.epoch, "sequence": identity.sequence}
        case "pull":
            pulled = weights.pull()
            return {"version": pulled.version, "x": float(pulled["x"])}
        case "push":
            receipt = weights.push({"x": np.float64(values[0])})
            reason = receipt.refusal.reason if receipt.refusal is not None else None
            return {"outcome": receipt.outcome.name, "version": receipt.version, "reason": reason}
    raise ValueError(f"expected a command; got {verb!r}")


if __name__ == "__main__":
    obey(*sys.argv[1:])
