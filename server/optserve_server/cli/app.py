"""What all commands share: the application, arguments, the connection, errors as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

import optserve
from optserve_server.config import Config
from optserve_server.engine.rules import own

app = typer.Typer(help="The optimizer step as a service.", no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULT = Config()
PATIENT = 3600.0  # seconds for a call that moves a whole set
UNBOUNDED = 10_000  # columns

Address = Annotated[str, typer.Option(envvar="OPTSERVE_ADDRESS", help="Where the server listens, host:port.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for an answer.")]
Rules = Annotated[
    list[Path] | None,
    typer.Option("--rule", envvar="OPTSERVE_RULES", help="A Python file with rules of your own; may be repeated."),
]
SetId = Annotated[str, typer.Argument(help="Id of a parameter set.", show_default=False)]


def show(what: RenderableType) -> None:
    """Print a table: as wide as the terminal, or for other programs as wide as it is."""
    console = Console()
    (console if console.is_terminal else Console(width=UNBOUNDED)).print(what)


@contextmanager
def connected(address: str, timeout: float) -> Iterator[optserve.Client]:
    with reported(optserve.OptserveError), optserve.Client(address, timeout=timeout) as client:
        yield client


@contextmanager
def reported(*expected: type[Exception], hint: str = "") -> Iterator[None]:
    """End with the error's message and exit code 1, without a traceback."""
    try:
        yield
    except expected as error:
        typer.echo(f"optserve: {error}" + (f"; {hint}" if hint else ""), err=True)
        raise typer.Exit(1) from None


def load(rules: list[Path] | None) -> None:
    """Know rules of one's own, as the server does."""
    with reported(ValueError):
        for path in rules or ():
            own.load(path)
