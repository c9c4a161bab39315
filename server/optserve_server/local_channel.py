"""The local channel: a Step stream goes on over a Unix socket, with the same messages and errors."""

import contextlib
import socket
from collections.abc import Callable, Iterator

from optserve._errors import OptserveError
from optserve._local_channel import ERROR, MESSAGE, encode_error, messages, reader, write
from optserve._wire import Frame
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server.failures import told


def serve(
    connection: socket.socket, answers: Callable[[Iterator[Frame[StepRequest]]], Iterator[Frame[StepResponse]]]
) -> None:
    """Answer what comes over a connection until it ends; an error is the last answer."""
    with contextlib.suppress(OSError), reader(connection) as incoming:  # the worker may be gone
        connection.sendall(b"\0")
        try:
            for answer in answers(Frame.from_bytes(StepRequest, data) for data in messages(incoming)):
                write(connection, MESSAGE, answer.to_bytes())
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, OptserveError):
                raise  # the connection's
            write(connection, ERROR, encode_error(told(error, "Step")))
