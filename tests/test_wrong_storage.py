"""Storage that is wrong on purpose is seen to be. The small form: every second mistake."""

import pytest
from tests.torture import wrong_storage
from tests.torture.script import run

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_a_mistake_is_seen(part: int) -> None:
    """In a process of its own, since it leaves files open."""
    run("wrong_storage", *[*wrong_storage.WRONG][::2][part::PARTS])
