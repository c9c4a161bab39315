"""A TCP socket that sends back what it gets: the same bytes both ways, and no work at all.

`python -m benchmarks.peers.raw_echo BYTES` prints its address, then serves one connection until that ends.
"""

import socket
import sys


def main(size: int) -> None:
    """Receive `size` bytes, send them back, again and again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(size))
        with connection:
            while receive(connection, buffer):
                connection.sendall(buffer)


def receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill a buffer; False if the other side is gone."""
    received = 0
    while received < len(buffer):
        count = connection.recv_into(buffer[received:])
        if not count:
            return False
        received += count
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]))
