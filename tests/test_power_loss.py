"""What is on disk survives a loss of power at any moment. The small form."""

from pathlib import Path

from tests.torture import power_loss


def test_whatever_a_loss_of_power_leaves_has_all_that_was_said_to_be_durable(tmp_path: Path) -> None:
    assert power_loss.images(200, 0, tmp_path) >= 200
