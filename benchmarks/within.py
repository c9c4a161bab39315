"""A Python module run as a script in the network of another process: `python -m benchmarks.within PROCESS MODULE ARGUMENTS`."""

import ctypes
import os
import runpy
import sys
from pathlib import Path

CLONE_NEWNET = 0x4000_0000  # of setns(2)


def enter(process: int) -> None:
    """Move this thread, and what it starts from now on, to the network namespace of a process; raises OSError."""
    with Path(f"/proc/{process}/ns/net").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    enter(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
