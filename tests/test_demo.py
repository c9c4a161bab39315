"""The demonstration: its network and its children by themselves, then short runs of the real thing."""

import math
import signal
from pathlib import Path

import numpy as np
import pytest

import optserve
from optserve import optim
from optserve_server import Server
from optserve_server.demo import digits, tuning
from optserve_server.demo.compare import compare
from optserve_server.demo.digits import Images
from optserve_server.demo.processes import ChildFailed, deferred_interrupts, python
from optserve_server.demo.train import train

PNG = b"\x89PNG\r\n\x1a\n"
STEP = 1e-6


def test_gradients_are_those_of_finite_differences() -> None:
    random = np.random.default_rng(0)
    parameters = digits.initial_parameters(0, np.float64)
    images = Images(random.normal(size=(7, digits.WIDTHS[0])), random.integers(10, size=7))
    loss, gradients = digits.loss_and_gradients(parameters, images)
    assert loss == digits.loss(parameters, images)
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        direction = random.normal(size=gradient.shape)
        ahead, behind = (
            digits.loss(parameters | {name: parameters[name] + step * direction}, images) for step in (STEP, -STEP)
        )
        assert (ahead - behind) / (2 * STEP) == pytest.approx(float(np.vdot(gradient, direction)), rel=1e-6)


def test_no_image_to_train_on_is_one_to_test_on() -> None:
    training, test = digits.load()
    assert len(test) == digits.TEST_IMAGES
    assert len(training) == 5 * (1797 - digits.TEST_IMAGES)
    assert not {row.tobytes() for row in training.pixels} & {row.tobytes() for row in test.pixels}


def test_the_rules_that_are_shown_are_of_the_catalogue() -> None:
    assert tuning.LEARNING_RATES.keys() <= optim.catalogue().keys()


def test_a_child_that_fails_says_why() -> None:
    with (
        pytest.raises(ChildFailed, match=r"json\.tool --nonsense ended with status 2(.|\n)*unrecognized arguments"),
        python("json.tool", "--nonsense", environment={}) as child,
    ):
        child.read_line()


def test_an_interrupt_waits_until_it_is_asked_for_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with deferred_interrupts() as check:
        check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"steps": 0}])
def test_a_run_without_workers_or_steps_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one worker and one step"):
        train(**arguments)  # type: ignore[arg-type]


def test_the_default_run_reads_at_least_97_percent_of_the_digits(tmp_path: Path) -> None:
    assert train(output=tmp_path / "picture.png").accuracy >= 0.97


def test_workers_train_against_a_server_of_their_own(tmp_path: Path) -> None:
    result = train(workers=2, steps=80, output=tmp_path / "new" / "picture.png")
    assert result.picture.read_bytes().startswith(PNG)
    assert result.loss < math.log(10) / 2  # half of what guessing costs
    assert result.accuracy > 0.5


def test_workers_train_against_a_running_server_and_leave_nothing_behind(
    server: Server, tcp_client: optserve.Client, tmp_path: Path
) -> None:
    result = train(optimizer="SGD", workers=1, steps=3, address=server.address, output=tmp_path / "picture.png")
    assert result.picture.exists()
    assert not [each.id for each in tcp_client.list_parameter_sets() if each.id.startswith("demo/")]


def test_every_rule_is_compared(tmp_path: Path) -> None:
    pictures = compare(steps=6, output=tmp_path / "all")
    assert [picture.name for picture in pictures] == ["all-paths.png", "all-digits.png", "all-formats.png"]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
