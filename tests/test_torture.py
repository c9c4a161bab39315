"""Servers that are killed, acknowledgements that are dropped: no push is lost, none is applied twice. The small form."""

from pathlib import Path

import pytest
from tests.torture import dropped_acks, kills


@pytest.mark.parametrize(("journal", "count"), [("off", 5), ("everysec", 10), ("always", 25)])
def test_a_server_that_is_killed_at_random_moments_loses_and_repeats_nothing_that_it_promised(
    tmp_path: Path, journal: str, count: int
) -> None:
    kills.run(count, journal, clients=8, seed=count, directory=tmp_path).check()


def test_a_push_is_applied_once_and_acknowledged_in_the_end_though_every_acknowledgement_is_dropped(
    tmp_path: Path,
) -> None:
    dropped_acks.run(500, tmp_path).check()
