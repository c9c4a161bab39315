"""`python -m tests.torture.dropped_acks`: every push is applied, and its acknowledgement never arrives. Prints what was found.

A proxy breaks each connection when the server's receipt comes by, so that the worker can't know. Half of the workers use the
SDK, which asks what became of a push once it is connected again; the others send the push again.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tests.proxy import Proxy
from tests.torture.children import Server, call
from tests.torture.plain import Plain

import optserve
from optserve import optim

SET_ID = "counts"
WORKERS = 4
DESCRIBED, OPENED, RECEIPT = 1, 1, 1  # messages of the server's that pass before the receipt that does not
ALL = sys.maxsize
ROOM = 100  # pushes of a worker whose receipts come at once, since a connection broke before


class Pushed(NamedTuple):
    """What a worker saw."""

    pushes: int
    dropped: int
    duplicates: int


@dataclass
class Found:
    """What became of pushes whose acknowledgements were dropped."""

    pushes: int
    dropped: int
    duplicates: int
    version: int
    applied_once: int
    seconds: float

    def check(self) -> None:
        """Raises AssertionError unless every push was applied once, and each that was dropped was recognized."""
        right = self.pushes == self.version == self.applied_once and self.dropped == self.duplicates
        assert right, f"expected each push to be applied once, and each that was dropped to be recognized; got {self}"


def run(drops: int, directory: Path, *, wrong: str | None = None) -> Found:
    """Drop so many acknowledgements, in equal parts of all workers."""
    began = time.monotonic()
    each = -(-drops // WORKERS)
    with Server("--listen", "127.0.0.1:0", log=directory / "log", wrong=wrong) as server, ThreadPoolExecutor() as pool:
        server.wait()
        with optserve.Client(server.address) as client:
            zeros = {f"worker-{k}": np.zeros(each + ROOM, np.float32) for k in range(WORKERS)}
            direct = client.create_parameter_set(SET_ID, zeros, optim.SGD(lr=1.0, maximize=True))
            kinds = itertools.cycle([push_with_sdk, push_with_stubs])
            pushing = [
                pool.submit(call, kind, server.address, name, each, wrong=wrong, patience=90 + each)
                for kind, name in zip(kinds, zeros, strict=False)
            ]
            pushed: list[Pushed] = [each.result() for each in pushing]
            parameters = direct.pull()
    return Found(
        pushes=sum(each.pushes for each in pushed),
        dropped=sum(each.dropped for each in pushed),
        duplicates=sum(each.duplicates for each in pushed),
        version=parameters.version,
        applied_once=sum(int((array == 1).sum()) for array in parameters.values()),
        seconds=round(time.monotonic() - began, 1),
    )


def push_with_sdk(address: str, name: str, drops: int) -> Pushed:
    """Push until so many receipts were dropped; each comes when the next connection is opened."""

    def may_pass() -> int:
        if proxy.dropped == drops:
            return ALL
        return OPENED if proxy.dropped else DESCRIBED + OPENED

    pushes = duplicates = 0
    with (
        Proxy(address, answers=may_pass) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        client.parameter_set(SET_ID, client_id=name) as weights,
    ):
        while proxy.dropped < drops:
            duplicates += weights.push({name: counting(drops + ROOM, pushes)}).duplicate
            pushes += 1
        return Pushed(pushes, proxy.dropped, duplicates)


def push_with_stubs(address: str, name: str, drops: int) -> Pushed:
    """Push until so many receipts were dropped; each comes when its push is sent again."""

    def may_pass() -> int:
        if proxy.dropped == drops:
            return ALL
        return OPENED + RECEIPT if proxy.dropped else OPENED

    pushes = duplicates = 0
    with Proxy(address, answers=may_pass) as proxy, Plain(proxy.address, SET_ID, name) as worker:
        while proxy.dropped < drops:
            duplicates += worker.push(pushes + 1, name, counting(drops + ROOM, pushes)).duplicate
            pushes += 1
        return Pushed(pushes, proxy.dropped, duplicates)


def counting(size: int, number: int) -> "np.ndarray[Any, Any]":
    """A gradient that counts its push, in an element of its own."""
    gradient = np.zeros(size, np.float32)
    gradient[number] = 1
    return gradient


def main() -> None:
    """Exits with 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.dropped_acks", description=__doc__)
    parser.add_argument("--drops", type=int, default=10_000)
    with tempfile.TemporaryDirectory(prefix="optserve-drops-") as directory:
        found = run(parser.parse_args().drops, Path(directory))
    print(json.dumps(asdict(found)))
    try:
        found.check()
    except AssertionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
