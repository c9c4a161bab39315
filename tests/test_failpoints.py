"""A server that fails at any place, in any way, breaks no promise. The small form: at every fourth place."""

import pytest
from tests.torture import failpoints
from tests.torture.script import run

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_a_fault_at_any_place_breaks_no_promise(part: int) -> None:
    """In a process of its own, which is forked where a server is to end."""
    run("failpoints", *[*failpoints.POINTS][::4][part::PARTS])
