"""A peer's other side, a server or a second worker, in a process of its own."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def spawned(serve: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Run `serve(connection, *arguments)` in a new process until the context ends; gives our end of the connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that each side notices when the other is gone
    try:
        yield ours
    finally:
        process.terminate()
        process.join()
