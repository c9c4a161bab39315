"""A host of an emulated network sends bytes to its hub: `python -m tests.link_probe` prints what arrived and was counted."""

import socket
import sys

from benchmarks.link import network

SENT = 1_000_000  # bytes


def main() -> None:
    """Be the hub."""
    with (
        network(2, rate=1e9, delay=0.001, room=1.0) as net,
        socket.create_server(("0.0.0.0", 0)) as listener,
        net.hosts[0].python("tests.link_probe", net.hosts[0].address_of_hub(listener.getsockname()[1])),
    ):
        connection, _ = listener.accept()
        received = 0
        while data := connection.recv(1 << 16):
            received += len(data)
        first, second = net.traffic()
        print(received, first.up, second.bytes, first.dropped + second.dropped)


def send(address: str) -> None:
    """Be the host."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(bytes(SENT))


if __name__ == "__main__":
    send(*sys.argv[1:]) if sys.argv[1:] else main()
