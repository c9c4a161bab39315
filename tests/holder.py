"""A worker process that holds on to what it got: `python holder.py ADDRESS SET_ID` prints "holding" and waits to be killed.

It holds a result that lies in shared memory, and a push whose gradients lie there and that it never commits.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import optserve


@contextmanager
def holding(address: str, set_id: str) -> Iterator[subprocess.Popen[str]]:
    """Such a process, from when it holds everything."""
    with subprocess.Popen([sys.executable, __file__, address, set_id], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


def hold(address: str, set_id: str) -> None:
    """Hold, until a signal comes."""
    with optserve.Client(address, transport="shared_memory") as client:
        weights = client.parameter_set(set_id)
        gradients = weights.gradient_buffers()
        for gradient in gradients.values():
            gradient.fill(1)
        held = weights.step(gradients, copy=False)
        session = weights._session
        frames = list(session._requests(weights._outgoing(gradients, None, None, 1.0, 1.0), None, 2))
        frames[-1].message.commit = False
        assert session._stream is not None
        session._stream.send(frames)
        assert all((array == np.float32(held.version)).all() for array in held.values())
        print("holding", flush=True)
        signal.pause()


if __name__ == "__main__":
    hold(*sys.argv[1:])
