"""Restarts at moments that are known, so that what must be there afterwards is known, too."""

from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
from tests.torture.checker import ADAM, SUMS, Findings, Shape
from tests.torture.kills import Workers, create, found, served
from tests.torture.plain import Plain

import optserve
from optserve import optim

NEVER = 3600.0  # seconds, between checkpoints that nobody asks for
CLIENTS, PUSHES = 2, 10  # each time; too few for one that is refused


def run(journal: str, directory: Path, *, damage: bool = False, wrong: str | None = None) -> Findings:
    """Workers push, a checkpoint is written, they push, the server is killed, the checkpoint damaged, and they push again."""
    shape = Shape(CLIENTS, capacity=3 * PUSHES)
    with ExitStack() as stack:
        server = stack.enter_context(served(directory, interval=NEVER, wrong=wrong))
        server.wait()
        create(server.address, shape, journal)
        workers = stack.enter_context(Workers(server.address, shape, checkpoints=False, wrong=wrong))
        workers.push(PUSHES)
        workers.ledgers()
        checkpoint(server.address, SUMS, ADAM)
        workers.push(PUSHES)
        workers.ledgers()
        server.kill()
        if damage:
            damage_newest_checkpoints(directory)
        server.start()
        server.wait()
        workers.push(PUSHES)
        return found(server.address, shape, workers.ledgers(), journal)


def check_without_journal(directory: Path, *, wrong: str | None = None) -> None:
    """Raises AssertionError unless what was pushed after the checkpoint is gone, and nothing else, and the workers know."""
    findings = run("off", directory, wrong=wrong)
    findings.check()
    assert findings.taken_back == CLIENTS * PUSHES, findings


def check_with_journal(directory: Path, *, wrong: str | None = None) -> None:
    """Raises AssertionError unless everything is there."""
    findings = run("always", directory, wrong=wrong)
    assert not findings.rollbacks, findings
    findings.check()


def check_with_damage(directory: Path, *, wrong: str | None = None) -> None:
    """Raises AssertionError unless everything is there though the newest checkpoints are damaged."""
    findings = run("always", directory, damage=True, wrong=wrong)
    assert not findings.rollbacks, findings
    findings.check()


def damage_newest_checkpoints(directory: Path) -> None:
    """Change a bit of the parameters in the newest checkpoint of every set."""
    for home in (directory / "data" / "sets").iterdir():
        path = max(home.glob("checkpoint-*")) / "parameters.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def checkpoint(address: str, *set_ids: str) -> None:
    """Write sets to stable storage."""
    with optserve.Client(address) as client:
        for set_id in set_ids:
            client.parameter_set(set_id).checkpoint()


def check_that_counting_workers_are_told(directory: Path, *, wrong: str | None = None) -> None:
    """A worker that counts its pushes by itself, and does not look at what the server says when a stream opens, is refused
    when the server has lost some: else what comes after would hide the loss. Raises AssertionError if it is not."""
    one = np.ones(1, np.float32)
    with served(directory, interval=NEVER, wrong=wrong) as server:
        server.wait()
        with optserve.Client(server.address) as client:
            client.create_parameter_set("counts", {"x": np.zeros(1, np.float32)}, optim.SGD(lr=1.0, maximize=True))
        with Plain(server.address, "counts", "plain") as worker:
            worker.push(1, "x", one)
            checkpoint(server.address, "counts")
            worker.push(2, "x", one)
            server.kill()
            server.start()
            server.wait()
            outcome = "push 3 was taken"
            try:
                worker.push(3, "x", one)
            except grpc.RpcError as error:
                outcome = Plain.reason(error)
            assert outcome == "SEQUENCE_GAP", f"push 2 was lost, and then: {outcome}"


def check_that_readers_are_told(directory: Path, *, wrong: str | None = None) -> None:
    """A worker that only pulls hears that what it has pulled is not there any more. Raises AssertionError if it does not."""
    with served(directory, interval=NEVER, wrong=wrong) as server:
        server.wait()
        with optserve.Client(server.address) as client:
            zeros = {"x": np.zeros(1, np.float32)}
            weights = client.create_parameter_set("counts", zeros, optim.SGD(lr=1.0, maximize=True))
            checkpoint(server.address, "counts")
            weights.push({"x": np.ones(1, np.float32)})
            reader = client.parameter_set("counts")
            reader.pull()
            server.kill()
            server.start()
            server.wait()
            try:
                outcome = f"version {reader.pull().version} came"
            except optserve.RolledBack:
                outcome = "told"
            assert outcome == "told", f"version 1 was lost, and then: {outcome}"
