"""Failures: what the caller of a method is told of an exception, and what the log keeps."""

import structlog

from optserve._errors import OptserveError, ServerError

log = structlog.get_logger()


def told(error: Exception, method: str) -> OptserveError:
    """The error that the caller gets. What is not an OptserveError is a bug: the log has it, the caller only that it was."""
    if isinstance(error, OptserveError):
        log.info("call refused", method=method, reason=error.reason(), message=str(error))
        return error
    log.error("call failed", method=method, exc_info=error)
    return ServerError("the server failed; its log has the details")
