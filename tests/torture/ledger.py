"""A ledger: what one worker knows of each of its pushes into one set."""

from dataclasses import dataclass, field
from typing import NamedTuple

from optserve import Receipt
from optserve._results import Durability


class Acknowledged(NamedTuple):
    """What the receipt of a push said."""

    sequence: int
    version: int


@dataclass
class Ledger:
    """Pushes by number, which is the worker's own count from 0: each ends up in one of the four collections, or was given up.

    `taken_back` were acknowledged, and the server said later, by RolledBack, that it has lost them.
    """

    client: int
    acknowledged: dict[int, Acknowledged] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    indeterminate: set[int] = field(default_factory=set)
    taken_back: set[int] = field(default_factory=set)
    recovered: int = 0  # receipts that were lost on their way, and came when the push was settled or sent again
    rollbacks: int = 0
    in_memory_only: int = 0  # receipts of pushes that were not on stable storage

    def acknowledge(self, number: int, receipt: Receipt) -> None:
        """Note the receipt of a push that was applied."""
        assert receipt.applied, f"push {number} of client {self.client}: {receipt}"
        self.acknowledged[number] = Acknowledged(receipt.sequence, receipt.version)
        self.recovered += receipt.duplicate
        self.in_memory_only += receipt.durability == Durability.MEMORY

    def roll_back(self, last_sequence: int) -> None:
        """Note that the server has only the pushes up to a sequence."""
        gone = {number for number, each in self.acknowledged.items() if each.sequence > last_sequence}
        for number in gone:
            del self.acknowledged[number]
        self.taken_back |= gone
        self.rollbacks += 1
