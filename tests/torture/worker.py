"""A worker: it pushes into both sets, whatever becomes of the server, and keeps ledgers."""

import contextlib
import itertools
from multiprocessing.connection import Connection

from tests.torture.checker import ADAM, SUMS, Shape
from tests.torture.ledger import Ledger

import optserve

TIMEOUT = 20.0  # seconds; longer than the server is away, short enough that some pushes have to be settled
CHECKPOINT_EVERY = 64  # pushes
TRANSPORTS = ("stream", "auto", "shared_memory")  # of clients, in turns


class Worker:
    """One client's handles on both sets; exactly what a careful user of the SDK would do about errors."""

    def __init__(self, address: str, shape: Shape, client: int) -> None:
        self._client = optserve.Client(address, timeout=TIMEOUT, transport=TRANSPORTS[client % 3])
        self._shape = shape
        self._handles = {
            set_id: self._client.parameter_set(set_id, client_id=f"client-{client}") for set_id in (SUMS, ADAM)
        }
        self._turns = itertools.cycle([SUMS, ADAM])
        self._numbers = dict.fromkeys(self._handles, 0)
        self.ledgers = {set_id: Ledger(client) for set_id in self._handles}

    def push(self) -> None:
        """Make the next push, until its outcome is known or can't be."""
        set_id = next(self._turns)
        number = self._numbers[set_id]
        self._numbers[set_id] += 1
        while not self._attempt(set_id, number):
            pass

    def checkpoint(self) -> None:
        """Ask for checkpoints of both sets; to no avail if the server goes away meanwhile."""
        with contextlib.suppress(optserve.ServerUnavailable, optserve.DeadlineExceeded):
            for handle in self._handles.values():
                handle.checkpoint()

    def _attempt(self, set_id: str, number: int) -> bool:
        """Push; False if it was certainly not applied, so that it may be pushed again."""
        handle, ledger = self._handles[set_id], self.ledgers[set_id]
        gradients = self._shape.gradients(set_id, ledger.client, number)
        try:
            ledger.acknowledge(number, handle.push(gradients))
        except optserve.NonFiniteValue:
            ledger.refused.add(number)
        except optserve.RolledBack:
            self._roll_back(set_id)
            return self._settle(set_id, number)
        except optserve.OutcomeUnknown:
            return self._settle(set_id, number)
        except (optserve.ServerUnavailable, optserve.DeadlineExceeded):  # it was never sent
            return False
        return True

    def _settle(self, set_id: str, number: int) -> bool:
        """Find out what became of a push; False if it was not applied."""
        handle, ledger = self._handles[set_id], self.ledgers[set_id]
        while True:
            try:
                receipt = handle.settle()
            except optserve.RolledBack:
                self._roll_back(set_id)
            except optserve.OutcomeUnknown:
                ledger.indeterminate.add(number)
                return True
            except (optserve.ServerUnavailable, optserve.DeadlineExceeded):
                pass
            else:
                break
        if receipt is None:
            return False
        if receipt.refused:
            ledger.refused.add(number)
        else:
            ledger.acknowledge(number, receipt)
        return True

    def _roll_back(self, set_id: str) -> None:
        self.ledgers[set_id].roll_back(self._handles[set_id].identity.sequence)


def work(address: str, shape: Shape, client: int, checkpoints: bool, orders: Connection) -> None:
    """Follow orders while there are some: each is a number of pushes that a newer one cuts short, answered with the ledgers.

    The answer may also be an error, which no worker can do anything about.
    """
    with contextlib.suppress(EOFError):
        try:
            _follow(Worker(address, shape, client), checkpoints, orders)
        except optserve.OptserveError as error:
            orders.send(error)


def _follow(worker: Worker, checkpoints: bool, orders: Connection) -> None:
    while True:
        for number in range(1, orders.recv() + 1):
            worker.push()
            if checkpoints and number % CHECKPOINT_EVERY == 0:
                worker.checkpoint()
            if orders.poll():
                break
        orders.send(worker.ledgers)
