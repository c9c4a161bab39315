"""Structured logs on standard error: lines for people on a terminal, JSON for machines elsewhere."""

import logging
import sys

import structlog

# Without local variables: whole messages may be among them.
_TRACEBACKS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def configure(level: str = "info", *, json: bool | None = None) -> None:
    """Send the log of this process to standard error; `json` is chosen by whether that is a terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_TRACEBACKS), structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_level(level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _level(name: str) -> int:
    """A level by name; raises ValueError."""
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        raise ValueError(f"expected a log level among debug, info, warning, error; got {name!r}")
    return levels[name.upper()]
