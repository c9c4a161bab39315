"""What tests share: one server for the whole run, and a client on each transport."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

import optserve
from optserve_server import Config, Server
from optserve_server.engine import threads

os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported

threads.INLINE = 1 << 15  # so that sets of the size that tests have are shared by threads

settings.register_profile("optserve", deadline=None)  # the first example of a test may compile a loop
settings.load_profile("optserve")


COMPILING = (
    *("test_rules", "test_rules_everywhere", "test_coalescing", "test_torch_database", "test_torch_suite"),
    *("test_torch_optimizer", "test_interop"),
)
LONG = (
    *("test_command_line", "test_standby", "test_large", "test_server", "test_history", "test_demo", "test_store"),
    *("test_examples", "test_docs", "test_failpoints", "test_overload", "test_own_rules", "test_torture"),
    "test_wrong_storage",
)


class Files(LoadScopeScheduling):
    """Lets one process have all tests of a file; and those of files that need the same compiled loops, to compile them once."""

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.split("::", 1)[0]).stem
        return "compiling" if module in COMPILING else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    """Share the tests out so."""
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what takes long come first, so that no process is left with it in the end."""
    first = {module: place for place, module in enumerate((*COMPILING, *LONG))}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C be an exception, also where a shell runs the suite in the background, and with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server on a free port of the loopback."""
    with Server(Config(listen="127.0.0.1:0")) as server:
        yield server


@pytest.fixture(scope="session")
def tcp_client(server: Server) -> Iterator[optserve.Client]:
    """A client of that server whose tensors travel in messages."""
    with optserve.Client(server.address, transport="stream") as client:
        yield client


@pytest.fixture(scope="session")
def shared_memory_client(server: Server) -> Iterator[optserve.Client]:
    """A client of that server whose tensors travel through shared memory."""
    with optserve.Client(server.address, transport="shared_memory") as client:
        yield client


@pytest.fixture(scope="session")
def memory_client() -> Iterator[optserve.Client]:
    """A client with an engine in this process."""
    with optserve.Client(":memory:") as client:
        yield client


@pytest.fixture(params=["memory", "tcp", "shared_memory"])
def client(request: pytest.FixtureRequest) -> optserve.Client:
    """Each of them in turn."""
    return request.getfixturevalue(f"{request.param}_client")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def new_id() -> Callable[[], str]:
    """A parameter set id that no other test uses."""
    counter = itertools.count()
    return lambda: f"tests/set-{next(counter)}"
