"""The local channel: a Step stream goes on over a Unix socket, with the same messages and errors."""

import contextlib
import socket
from collections.abc import Callable, Iterator

import structlog

from optserve._errors import OptserveError, ServerError
from optserve._local_channel import ERROR, MESSAGE, encode_error, messages, write
from optserve._wire import Frame
from optserve.v1.step_pb2 import StepRequest, StepResponse

log = structlog.get_logger()


def serve(
    connection: socket.socket, answers: Callable[[Iterator[Frame[StepRequest]]], Iterator[Frame[StepResponse]]]
) -> None:
    """Answer what comes over a connection until it ends; an error is the last answer."""
    with contextlib.suppress(OSError):  # the worker is gone
        connection.sendall(b"\0")
        try:
            for answer in answers(Frame.from_bytes(StepRequest, data) for data in messages(connection)):
                write(connection, MESSAGE, answer.to_bytes())
        except OptserveError as error:
            log.info("call refused", method="Step", reason=error.reason(), message=str(error))
            write(connection, ERROR, encode_error(error))
        except OSError:
            raise
        except Exception as error:
            log.error("call failed", method="Step", exc_info=error)
            write(connection, ERROR, encode_error(ServerError("the server failed; its log has the details")))
