"""What the documentation shows runs: Python as it stands, commands on hosts that are directories."""

import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

import optserve
from optserve_server import Config, Server
from optserve_server.cli import app
from processes import running

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
LANGUAGES = {"python", "console", ""}  # what has none is no code
ADDRESS = re.compile(r"\b(localhost|127\.0\.0\.1|a|b):50051\b")

NOT_RUN = {
    "docker compose": "needs Docker; tests/test_compose.py reads the file",
    "make bench": "takes over an hour",
    "make demo": "tests/test_demo.py trains so",
    "make test": "is this",
    "pip install": "changes what the tests run in",
    "python -m benchmarks": "measures, and needs a machine for itself",
}  # commands by how they begin
STAND_INS = {
    "s3://bucket/run": "file://{}/store",  # there is no object store here
    "12000": "1",  # nor the time for so many updates
}
MODULE = "my_rule"  # a page shows the class of examples/my_rule.py, which elsewhere would be a second rule of its name
PATIENCE = 20.0  # seconds until servers have found each other


class Hosts:
    """Who has an address in the documentation: each host has a directory, and a server at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._servers: dict[str, tuple[str, ExitStack]] = {}
        self._namespace: dict[str, object] = {"__name__": MODULE}

    def python(self, code: str) -> None:
        """Run a block after those before it."""
        os.chdir(self._home("localhost"))
        exec(self._connected(code), self._namespace)

    def console(self, block: str) -> None:
        """Run the commands of a block; what they print is not compared."""
        for line in block.splitlines():
            if line.startswith("$ ") and not any(line.startswith(f"$ {each}") for each in NOT_RUN):
                for shown, instead in STAND_INS.items():
                    line = line.replace(shown, instead.format(self.directory))
                self._run(shlex.split(line.removeprefix("$ "), comments=True))

    def close(self) -> None:
        """Stop everything."""
        for each in self._namespace.values():
            if isinstance(each, optserve.Client):
                each.close()
        for _, stack in self._servers.values():
            stack.close()

    def _run(self, command: list[str]) -> None:
        assert command[0] == "optserve", f"{command}: neither run nor named in NOT_RUN"
        host = "localhost"
        if "--listen" in command:
            host = command.pop(place := command.index("--listen") + 1).partition(":")[0].replace("127.0.0.1", host)
            command.pop(place - 1)
        os.chdir(self._home(host))
        if command[1] == "serve":
            arguments = [self._connected(each) for each in command[2:]]
            self._stop(host)
            stack = ExitStack()
            server = stack.enter_context(
                running("--listen", "127.0.0.1:0", *arguments, log=self.directory / f"{host}.log")
            )
            stack.callback(server.stop)
            self._servers[host] = server.address, stack
        else:
            self._ask([self._connected(each) for each in command[1:]])

    def _ask(self, arguments: list[str]) -> None:
        """Run a command in this process, until it has come to a good end."""
        end = time.monotonic() + PATIENCE
        while True:
            result = CliRunner().invoke(app, arguments, env={"OPTSERVE_ADDRESS": self._address("localhost")})
            if result.exit_code == 0:
                return
            assert time.monotonic() < end, f"{arguments}: {result.output} {result.exception}"
            time.sleep(0.1)

    def _connected(self, text: str) -> str:
        """A text with the addresses that there are."""
        return ADDRESS.sub(lambda found: self._address(found[1]), text)

    def _address(self, host: str) -> str:
        """Where a host's server listens; if none was started, one starts in this process."""
        host = host.replace("127.0.0.1", "localhost")
        if host not in self._servers:
            stack = ExitStack()
            server = stack.enter_context(Server(Config(listen="127.0.0.1:0", data_dir=self._home(host) / "state")))
            self._servers[host] = server.address, stack
        return self._servers[host][0]

    def _stop(self, host: str) -> None:
        if host in self._servers:
            _, stack = self._servers.pop(host)
            stack.close()

    def _home(self, host: str) -> Path:
        home = self.directory / host
        if not home.exists():
            home.mkdir()
            (home / "examples").symlink_to(ROOT / "examples")
        return home


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Hosts without servers; the working directory is restored."""
    monkeypatch.chdir(tmp_path)
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_blocks_of_a_page_run_in_order(page: Path, hosts: Hosts) -> None:
    for language, block in BLOCK.findall(page.read_text()):
        assert language in LANGUAGES
        if language == "python":
            hosts.python(block)
        elif language == "console":
            hosts.console(block)


def test_what_is_not_run_is_shown_somewhere() -> None:
    shown = "\n".join(page.read_text() for page in PAGES)
    assert [command for command in NOT_RUN if f"\n$ {command}" not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    """As on GitHub; the site's are checked when it is built."""
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []
