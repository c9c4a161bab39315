"""What is on disk survives a loss of power, damage, and faults at any place; and mistakes in that are seen. The small form."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.torture import damage, failpoints, power_loss, wrong_storage

PARTS = 4


def test_whatever_a_loss_of_power_leaves_has_all_that_was_said_to_be_durable(tmp_path: Path) -> None:
    assert power_loss.images(200, 0, tmp_path) >= 200


def test_bits_that_flip_and_files_that_end_early_never_pass_for_what_was_there(tmp_path: Path) -> None:
    found = damage.damages(500, 0, tmp_path)
    assert min(found[each] for each in ("complete", "refused", "earlier")) > 0


@pytest.mark.parametrize("part", range(PARTS))
def test_a_fault_at_any_place_breaks_no_promise(part: int) -> None:
    """In a process of its own, which is forked where a server is to end."""
    called("failpoints", [*failpoints.POINTS][part::PARTS])


@pytest.mark.parametrize("part", range(PARTS))
def test_storage_that_is_wrong_on_purpose_is_seen(part: int) -> None:
    """In a process of its own, since it leaves files open."""
    called("wrong_storage", [*wrong_storage.WRONG][part::PARTS])


def called(module: str, names: list[str]) -> None:
    """Raises AssertionError if a module ends with an error."""
    command = [sys.executable, "-m", f"tests.torture.{module}", *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
