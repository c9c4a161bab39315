"""`python -m tests.torture.kills`: a server is killed at random moments while workers push. Prints what was found, as JSON."""

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from tests.torture.checker import ADAM, SUMS, Findings, Shape, check
from tests.torture.children import CONTEXT, Server, start
from tests.torture.ledger import Ledger
from tests.torture.worker import work

import optserve
from optserve_server.storage.files import TEMPORARY

LIVES = (0.05, 0.4)  # seconds that a server serves
CHECKPOINT_INTERVAL = 0.1  # seconds
EARLY = 0.125  # of the kills come before it serves
ROOM = 200  # pushes of a client into a set, for each kill
FLOOR = 10.0  # acknowledged pushes for each kill, below which a run shows nothing
WITHOUT_END = sys.maxsize


class Workers:
    """Worker processes, and their ledgers. With `checkpoints`, one of them asks for some."""

    def __init__(self, address: str, shape: Shape, *, checkpoints: bool, wrong: str | None = None) -> None:
        self._orders: list[Connection] = []
        for client in range(shape.clients):
            here, there = CONTEXT.Pipe()
            start(work, address, shape, client, checkpoints and client == 0, there, wrong=wrong)
            there.close()
            self._orders.append(here)

    def push(self, count: int) -> None:
        """Let each make so many pushes."""
        try:
            for orders in self._orders:
                orders.send(count)
        except BrokenPipeError:
            raise RuntimeError("a worker has crashed; its traceback is above") from None

    def ledgers(self) -> dict[str, list[Ledger]]:
        """Wait for what was ordered, and take the ledgers of each set; raises AssertionError if a worker had to give up."""
        try:
            answers: list[Mapping[str, Ledger] | optserve.OptserveError] = [orders.recv() for orders in self._orders]
        except EOFError:
            raise RuntimeError("a worker has crashed; its traceback is above") from None
        ledgers: dict[str, list[Ledger]] = {SUMS: [], ADAM: []}
        for answer in answers:
            assert not isinstance(answer, optserve.OptserveError), f"a worker gave up: {answer}"
            for set_id, ledger in answer.items():
                ledgers[set_id].append(ledger)
        return ledgers

    def stop(self) -> dict[str, list[Ledger]]:
        """Let each finish the push that it is at, and make one more on each handle, to see the server as it is now."""
        self.push(2)
        self.ledgers()  # of the order that was cut short
        return self.ledgers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for orders in self._orders:
            orders.close()


@dataclass
class Run:
    """What a run was, and what it found."""

    kills: int
    journal: str
    clients: int
    seed: int
    early_kills: int = 0  # before the server served
    torn_checkpoints: int = 0  # that kills left half written
    seconds: float = 0.0
    findings: Findings = field(default_factory=Findings)

    @property
    def acked_per_kill(self) -> float:
        """The load."""
        return self.findings.acked / self.kills

    def check(self) -> None:
        """Raises AssertionError if pushes are lost or there twice, or if there were too few of them."""
        self.findings.check()
        if self.journal != "off":
            assert not self.findings.taken_back, f"lost with a journal, though the workers were told: {self.findings}"
        assert self.acked_per_kill >= FLOOR, f"void: {self.acked_per_kill:.1f} acknowledged pushes for each kill"

    def to_json(self) -> str:
        """One line."""
        figures = asdict(self) | {"acked_per_kill": round(self.acked_per_kill, 1), "seconds": round(self.seconds, 1)}
        return json.dumps(figures | figures.pop("findings"))


def run(kills: int, journal: str, clients: int, seed: int, directory: Path, *, wrong: str | None = None) -> Run:
    """Kill a server so many times under load, then look."""
    randomness = random.Random(seed)
    done = Run(kills, journal, clients, seed)
    shape = Shape(clients, capacity=ROOM * (kills + 5))
    began = time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(served(directory, interval=CHECKPOINT_INTERVAL, wrong=wrong))
        server.wait()
        create(server.address, shape, journal)
        workers = stack.enter_context(Workers(server.address, shape, checkpoints=True, wrong=wrong))
        workers.push(WITHOUT_END)
        starting = 0.1  # seconds, in the mean
        for _ in range(kills):
            if randomness.random() < EARLY:
                time.sleep(randomness.uniform(0, starting))
                done.early_kills += 1
            else:
                started = time.monotonic()
                server.wait()
                starting += (time.monotonic() - started - starting) / 10
                time.sleep(randomness.uniform(*LIVES))
            server.kill()
            done.torn_checkpoints += any(directory.rglob(f"*{TEMPORARY}"))
            server.start()
        server.wait()
        ledgers = workers.stop()
        done.findings = found(server.address, shape, ledgers, journal)
    done.seconds = time.monotonic() - began
    return done


def served(directory: Path, *, interval: float, wrong: str | None = None) -> Server:
    """A server with a data directory there that writes checkpoints in an interval of seconds, on a port of its own."""
    arguments = {"listen": f"127.0.0.1:{free_port()}", "data-dir": directory / "data", "checkpoint-interval": interval}
    given = [f"--{name}={value}" for name, value in arguments.items()]
    return Server(*given, log=directory / "log", wrong=wrong)


def free_port() -> int:
    """A port that stays free while no server listens.

    It is not among those that connections get: a client that tries to connect to one of those may get it itself, and then
    be connected to itself.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(first - 10_000, first), 100):
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def create(address: str, shape: Shape, journal: str) -> None:
    """Create the sets, and put them on stable storage."""
    with optserve.Client(address) as client:
        shape.create(client, journal)
        for set_id in (SUMS, ADAM):
            client.parameter_set(set_id).checkpoint()


def found(address: str, shape: Shape, ledgers: dict[str, list[Ledger]], journal: str) -> Findings:
    """What the ledgers say, against the server."""
    with optserve.Client(address) as client:
        sums, adam = (client.parameter_set(set_id).pull() for set_id in (SUMS, ADAM))
    return check(shape, ledgers, sums, adam, durable=journal == "always")


def main() -> None:
    """Exits with 1 if something was wrong, or if the run was void."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--journal", choices=("always", "everysec", "off"), default="always")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory(prefix="optserve-kills-") as directory:
        done = run(**vars(parser.parse_args()), directory=Path(directory))
    print(done.to_json())
    try:
        done.check()
    except AssertionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
