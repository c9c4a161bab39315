"""The links of an emulated network: `python -m benchmarks.relay RATE DELAY ROOM HUB HOST...`, the last as processes in it.

Kernels need not have netem, so this process stands between two TUN devices for each link. Each direction carries `RATE` bytes
per second behind a buffer of `ROOM` seconds, which drops what finds it full, and takes `DELAY` seconds. The process says
`ready`, then, for each line on stdin, what it has carried, as JSON: bytes, packets and drops of each direction. It ends, and
the devices with it, when stdin does.

TCP hands a device several segments at once, as it would a network card, and they are carried as one; bytes and packets are
counted as they would be on the wire, with headers for each segment.
"""

import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from benchmarks.within import enter

TUN = Path("/dev/net/tun")
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
CHECKSUMS, SEGMENTATION = 0x01, 0x02  # of TCP over IPv4: what a network card does
OFFLOAD = struct.Struct(
    "<BBHHHH"
)  # virtio's header: flags, kind, header length, segment size, checksum's start and place
NETWORK = "198.18"  # for measurements: RFC 2544
CONGESTION_CONTROL = "cubic"  # Linux's own default, for connections over these links
LARGEST = (64 << 10) + OFFLOAD.size
IN_A_ROW = 64  # packets taken in before others have their turn
MORE_THAN_WORKERS = -10  # a wire does not wait for processors


def address_of_hub(host: int) -> str:
    """Where a host finds the hub."""
    return f"{NETWORK}.{host}.1"


def address_of_host(host: int) -> str:
    """Where the hub finds a host."""
    return f"{NETWORK}.{host}.2"


class Direction:
    """One direction of a link: packets on their way from a TUN device to another."""

    def __init__(self, source: int, sink: int, rate: float, delay: float, room: float) -> None:
        self.source = source
        self.bytes = self.packets = self.dropped = 0
        self._sink, self._rate, self._delay, self._room = sink, rate, delay, room
        self._idle = 0.0  # when the last byte that was taken in will have left the buffer
        self._travelling: deque[tuple[float, bytes]] = deque()
        os.set_blocking(source, False)

    @property
    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._travelling[0][0] if self._travelling else None

    def take(self) -> None:
        """Take in what was sent."""
        for _ in range(IN_A_ROW):
            try:
                data = os.read(self.source, LARGEST)
            except BlockingIOError:
                return
            now = time.monotonic()
            size, packets = on_the_wire(data)
            begins = max(now, self._idle)
            if begins - now > self._room:
                self.dropped += packets
                continue
            self._idle = begins + size / self._rate
            self._travelling.append((self._idle + self._delay, data))
            self.bytes += size
            self.packets += packets

    def deliver(self) -> None:
        """Hand over what has arrived."""
        now = time.monotonic()
        while self._travelling and self._travelling[0][0] <= now:
            os.write(self._sink, self._travelling.popleft()[1])


def on_the_wire(data: bytes) -> tuple[int, int]:
    """Bytes, IP's and TCP's headers included, and packets that segments carried as one would be."""
    _, together, _, segment, transport, _ = OFFLOAD.unpack_from(data)
    size = len(data) - OFFLOAD.size
    if not together:
        return size, 1
    header = transport + 4 * (data[OFFLOAD.size + transport + 12] >> 4)
    packets = -(-(size - header) // segment)
    return size + (packets - 1) * header, packets


def device(process: int, name: str, address: str, peer: str) -> int:
    """A TUN device in the network of a process: its descriptor, from which comes what is sent there."""
    enter(process)
    descriptor = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("i", OFFLOAD.size))
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, CHECKSUMS | SEGMENTATION)
    for command in (
        f"address add {address} peer {peer} dev {name} noprefixroute",
        f"link set {name} up",
        f"route add {peer} dev {name} src {address} congctl {CONGESTION_CONTROL}",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return descriptor


def carry(directions: Iterable[Direction]) -> None:
    """Carry packets until stdin ends."""
    by_source = {each.source: each for each in directions}
    while True:
        for each in by_source.values():
            each.deliver()
        due = min((each.due for each in by_source.values() if each.due is not None), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        for ready in select.select([sys.stdin, *by_source], [], [], wait)[0]:
            if ready in by_source:
                by_source[ready].take()
            elif sys.stdin.readline():
                print(json.dumps([(each.bytes, each.packets, each.dropped) for each in by_source.values()]), flush=True)
            else:
                return


def main(rate: str, delay: str, room: str, hub: str, *hosts: str) -> None:
    """Make the links, and carry packets until stdin ends."""
    link = float(rate), float(delay), float(room)
    directions = []
    for number, host in enumerate(hosts):
        ends = address_of_host(number), address_of_hub(number)
        far = device(int(host), "uplink", *ends)
        near = device(int(hub), f"link{number}", *reversed(ends))
        directions += [Direction(far, near, *link), Direction(near, far, *link)]
    os.setpriority(os.PRIO_PROCESS, 0, MORE_THAN_WORKERS)
    print("ready", flush=True)
    carry(directions)


if __name__ == "__main__":
    main(*sys.argv[1:])
