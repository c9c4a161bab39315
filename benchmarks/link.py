"""An emulated network: hosts with a link each to this process, as slow and as long as is asked for.

Hosts are network namespaces of this machine, so that TCP on both ends is the kernel's, with its slow start and its congestion
control; what goes over the links passes a process of its own (`relay.py`). Nothing of it is known outside, and nothing has a
name that could be left behind: a namespace lives as long as the process that holds it, a device as long as the relay, and
both end with this process, however it ends. Needs Linux, root and /dev/net/tun.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.children import ENVIRONMENT, python
from benchmarks.relay import TUN, address_of_hub
from optserve_server.demo.processes import Child

HOLD = "ip link set lo up; echo ready; exec cat"  # until stdin ends


class NoLink(RuntimeError):
    """Links can't be emulated here; the message says what is missing."""


@dataclass(frozen=True)
class Traffic:
    """What a link has carried, in bytes of IP packets, and how many packets found its buffer full."""

    up: int
    down: int
    packets: int
    dropped: int

    @property
    def bytes(self) -> int:
        """Both ways together."""
        return self.up + self.down

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(
            self.up - earlier.up,
            self.down - earlier.down,
            self.packets - earlier.packets,
            self.dropped - earlier.dropped,
        )


@dataclass(frozen=True)
class Host:
    """A host of an emulated network: its number, and the process that holds its namespace."""

    number: int
    process: int

    def address_of_hub(self, port: int) -> str:
        """Where it finds what listens on that port of all addresses here."""
        return f"{address_of_hub(self.number)}:{port}"

    def python(self, module: str, *arguments: str) -> AbstractContextManager[Child]:
        """A process there that runs `python -m module arguments`."""
        return python("benchmarks.within", str(self.process), module, *arguments)


@dataclass(frozen=True)
class Network:
    """Hosts with links to this process."""

    hosts: tuple[Host, ...]
    relay: Child

    def traffic(self) -> list[Traffic]:
        """What each host's link has carried so far."""
        self.relay.write_line("count")
        counts = json.loads(self.relay.read_line())
        return [
            Traffic(up[0], down[0], up[1] + down[1], up[2] + down[2])
            for up, down in zip(counts[::2], counts[1::2], strict=True)
        ]


def isolated(module: str, *arguments: str) -> None:
    """Run `python -m module arguments` in a network of its own, where `network` works; raises NoLink, CalledProcessError."""
    if os.geteuid() != 0 or not TUN.exists():
        raise NoLink(f"expected Linux, root and {TUN}, to emulate links")
    command = [
        "unshare",
        "--net",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        sys.executable,
        "-P",
        "-m",
        module,
        *arguments,
    ]
    subprocess.run(command, env=os.environ | ENVIRONMENT, check=True)


@contextmanager
def network(hosts: int, *, rate: float, delay: float, room: float) -> Iterator[Network]:
    """Hosts with links that carry `rate` bytes per second each way, take `delay` seconds, and can hold `room` seconds.

    This process must be in a network of its own: see `isolated`.
    """
    with ExitStack() as stack:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        others = tuple(stack.enter_context(_host(number)) for number in range(hosts))
        processes = [str(process) for process in (os.getpid(), *(each.process for each in others))]
        relay = stack.enter_context(python("benchmarks.relay", f"{rate:g}", f"{delay:g}", f"{room:g}", *processes))
        relay.read_line()
        yield Network(others, relay)


@contextmanager
def _host(number: int) -> Iterator[Host]:
    command = ["unshare", "--net", "sh", "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise NoLink("expected to be allowed another network namespace")
        yield Host(number, process.pid)
