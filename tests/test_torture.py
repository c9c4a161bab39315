"""Servers that are killed, acknowledgements that are dropped: no push is lost, none is applied twice. The small form."""

import inspect
from pathlib import Path

import pytest
from tests.torture import dropped_acks, kills

import optserve

with_journal = pytest.mark.skipif(
    "journal" not in inspect.signature(optserve.Client.create_parameter_set).parameters,
    reason="there is no journal yet",
)


@pytest.mark.parametrize(
    ("journal", "count"),
    [("off", 5), pytest.param("everysec", 10, marks=with_journal), pytest.param("always", 25, marks=with_journal)],
)
def test_a_server_that_is_killed_at_random_moments_loses_and_repeats_nothing_that_it_promised(
    tmp_path: Path, journal: str, count: int
) -> None:
    kills.run(count, journal, clients=8, seed=count, directory=tmp_path).check()


def test_a_push_is_applied_once_and_acknowledged_in_the_end_though_every_acknowledgement_is_dropped(
    tmp_path: Path,
) -> None:
    dropped_acks.run(500, tmp_path).check()
