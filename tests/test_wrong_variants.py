"""Servers and workers that are wrong on purpose are seen to be."""

import pytest
from tests.torture.wrong import WRONG, seen


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_seen(name: str) -> None:
    assert seen(name)
