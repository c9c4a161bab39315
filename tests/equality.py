"""Equality of values with arrays in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve import Accumulation, State
from optserve._messages import encode_receipt
from optserve_server.engine import state
from optserve_server.engine.parameter_set import ParameterSet


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal, arrays in them bit for bit."""
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    if isinstance(ours, State | Accumulation):
        return all(same(getattr(ours, name), getattr(theirs, name)) for name in ours.__slots__)
    return bool(ours == theirs)


def assert_same(ours: ParameterSet, theirs: ParameterSet) -> None:
    """That two sets are one, bit for bit, with their sessions, but for those in which nothing was pushed."""
    expected, present = ours.capture(), theirs.capture()
    entries = present.entries()
    for name, arrays in expected.entries().items():
        for tensor, array in arrays.items():
            assert array.tobytes() == entries[name][tensor].tobytes(), (name, tensor)
    assert (present.events, present.position.version) == (expected.events, expected.position.version)
    assert (present.optimizers, present.changes, present.keys) == (expected.optimizers, expected.changes, expected.keys)
    assert present.progress.steps.tolist() == expected.progress.steps.tolist()
    assert present.progress.memory == expected.progress.memory
    for name, values in expected.progress.group_memory.items():
        np.testing.assert_array_equal(present.progress.group_memory[name], values)
    assert (present.policy, present.policy_since) == (expected.policy, expected.policy_since)
    for name in ("accumulated", "accumulating", "skipped", "samples", "divisor", "staleness"):
        assert getattr(present.progress, name) == getattr(expected.progress, name), name
    ours_pushed, theirs_pushed = (
        {client: session for client, session in sessions_of(each).items() if session[1]} for each in (expected, present)
    )
    assert theirs_pushed == ours_pushed


def sessions_of(of: state.State) -> dict[str, tuple[int, int, list[bytes]]]:
    """Epoch, last sequence and receipts by client."""
    return {
        each.client_id: (
            each.epoch,
            each.last_sequence,
            [encode_receipt(kept.receipt).SerializeToString(deterministic=True) for kept in each.receipts.values()],
        )
        for each in of.sessions
    }
