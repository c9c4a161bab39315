"""The checker: what ledgers say, against what the server has.

Two sets make mistakes visible. In `sums`, push k of a client adds exactly 1.0 to an element that no other push touches, and to
one that counts the client's pushes, so that a push that is lost, applied twice or applied in part can be pointed at. In `adam`,
whose updates depend on each other, the pushes in the order of their versions must lead to the server's parameters, bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tests.direct import DirectSet
from tests.torture.ledger import Ledger

from optserve import Client, Parameters, RowSparse, optim

Array = np.ndarray[Any, Any]

SUMS, ADAM = "sums", "adam"
LR = 1e-3
SIZE = 257  # of `adam`: no multiple of anything
SHOWN = 10  # of the pushes that are not as they should be
REFUSED_EVERY = 16  # pushes; this one has a NaN in it
TOLERANCE = 1e-4  # of float32 against float64, over as many updates as there are


@dataclass(frozen=True)
class Shape:
    """Clients, and how many pushes each may make into each set."""

    clients: int
    capacity: int

    def create(self, client: Client, journal: str = "off") -> None:
        """Create both sets, on stable storage where there is any."""
        options: dict[str, Any] = {} if journal == "off" else {"journal": journal}
        zeros = {
            "pushes": np.zeros(self.clients * self.capacity, np.float32),
            "counts": np.zeros(self.clients, np.float32),
        }
        client.create_parameter_set(SUMS, zeros, optim.SGD(lr=1.0, maximize=True), **options).close()
        client.create_parameter_set(ADAM, {"x": np.zeros(SIZE, np.float32)}, optim.Adam(lr=LR), **options).close()

    def gradients(self, set_id: str, client: int, number: int) -> dict[str, Array | RowSparse]:
        """What a client pushes as its push of that number."""
        assert number < self.capacity, f"expected at most {self.capacity} pushes of each client; make room for more"
        wrong = np.float32(np.nan if number % REFUSED_EVERY == REFUSED_EVERY - 1 else 1)
        if set_id == ADAM:
            return {"x": wrong * noise(client, number)}
        counts = np.zeros(self.clients, np.float32)
        counts[client] = wrong
        return {"pushes": RowSparse([client * self.capacity + number], np.ones(1, np.float32)), "counts": counts}


def noise(client: int, number: int) -> Array:
    """A gradient that follows from who pushes it, and when."""
    return np.random.default_rng((client, number)).standard_normal(SIZE, np.float32)


@dataclass
class Findings:
    """How many pushes there were, by what became of them, and in `wrong` what must not be."""

    acked: int = 0
    lost: int = 0
    duplicated: int = 0  # or there at all, and should not be
    taken_back: int = 0
    refused: int = 0
    indeterminate: int = 0
    recovered: int = 0
    rollbacks: int = 0
    replayed: int = 0
    wrong: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises AssertionError if something is wrong."""
        assert not self.wrong, "; ".join(self.wrong)


def check(
    shape: Shape, ledgers: Mapping[str, Sequence[Ledger]], sums: Parameters, adam: Parameters, *, durable: bool
) -> Findings:
    """Compare the ledgers of both sets with their parameters. If `durable`, no receipt may have been of memory only."""
    every = [each for of_set in ledgers.values() for each in of_set]
    found = Findings(
        acked=sum(len(each.acknowledged) + len(each.taken_back) for each in every),
        taken_back=sum(len(each.taken_back) for each in every),
        refused=sum(len(each.refused) for each in every),
        indeterminate=sum(len(each.indeterminate) for each in every),
        recovered=sum(each.recovered for each in every),
        rollbacks=sum(each.rollbacks for each in every),
    )
    in_memory_only = sum(each.in_memory_only for each in every)
    if durable and in_memory_only:
        found.wrong.append(f"{in_memory_only} receipts of memory only")
    _check_sums(shape, ledgers[SUMS], sums, found)
    _check_adam(ledgers[ADAM], adam, found)
    return found


def _check_sums(shape: Shape, ledgers: Sequence[Ledger], sums: Parameters, found: Findings) -> None:
    """Every acknowledged push is there once, and no other is but for those whose outcome is not known."""
    least = np.zeros((shape.clients, shape.capacity), np.float32)
    most = least.copy()
    for ledger in ledgers:
        least[ledger.client, list(ledger.acknowledged)] = 1
        most[ledger.client, [*ledger.acknowledged, *ledger.indeterminate]] = 1
    present = sums["pushes"].reshape(least.shape)
    found.lost += int((least - present).clip(0).sum())
    found.duplicated += int((present - most).clip(0).sum())
    names = np.full(least.shape, "given up or never made", object)
    for ledger in ledgers:
        for name in ("acknowledged", "refused", "indeterminate", "taken_back"):
            names[ledger.client, list(getattr(ledger, name))] = name.replace("_", " ")
    for client, number in np.argwhere((present < least) | (present > most))[:SHOWN]:
        value = present[client, number]
        found.wrong.append(f"push {number} of client {client}, {names[client, number]}, is there {value:g} times")
    for client in np.flatnonzero(sums["counts"] != present.sum(axis=1)):
        found.wrong.append(
            f"client {client}: {sums['counts'][client]:g} pushes counted, {present[client].sum():g} there"
        )
    if sums.version != present.sum():
        found.wrong.append(f"version {sums.version} of sums, after {present.sum():g} pushes")


def _check_adam(ledgers: Sequence[Ledger], adam: Parameters, found: Findings) -> None:
    """Every version is one acknowledged push, and all of them together are the parameters."""
    pushes = sorted(
        (each.version, ledger.client, number) for ledger in ledgers for number, each in ledger.acknowledged.items()
    )
    versions = [version for version, _, _ in pushes]
    if versions != list(range(1, adam.version + 1)):
        if not any(each.indeterminate for each in ledgers):
            missing = sorted({*range(1, adam.version + 1)} - {*versions})
            found.wrong.append(
                f"version {adam.version} of adam, with {len(versions)} acknowledged pushes up to version "
                f"{max(versions, default=0)}; without a push: {missing[:10]}"
            )
        return
    replica, exact = DirectSet({"x": np.zeros(SIZE, np.float32)}, optim.Adam(lr=LR), threads=1), PlainAdam()
    for _, client, number in pushes:
        gradient = noise(client, number)
        replica.push({"x": gradient})
        exact.update(gradient)
    found.replayed = len(pushes)
    if replica.pull()["x"].tobytes() != adam["x"].tobytes():
        found.wrong.append("adam is not what its pushes lead to, bit for bit")
    if not np.allclose(adam["x"], exact.parameters, rtol=0, atol=TOLERANCE):
        found.wrong.append(f"adam is {np.abs(adam['x'] - exact.parameters).max():g} from what its pushes lead to")


class PlainAdam:
    """Adam as its paper has it, in float64, with no code of ours."""

    def __init__(self) -> None:
        self.parameters = np.zeros(SIZE)
        self._mean, self._square, self._steps = np.zeros(SIZE), np.zeros(SIZE), 0

    def update(self, gradient: Array) -> None:
        """One step down the gradient."""
        self._steps += 1
        self._mean += 0.1 * (gradient - self._mean)
        self._square += 0.001 * (gradient.astype(np.float64) ** 2 - self._square)
        mean, square = self._mean / (1 - 0.9**self._steps), self._square / (1 - 0.999**self._steps)
        self.parameters -= LR * mean / (np.sqrt(square) + 1e-8)
