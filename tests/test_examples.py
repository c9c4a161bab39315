"""The examples learn, in a shorter form."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    ("example", "options", "least"),
    [
        ("diloco_digits", {"workers": 2, "steps": 60, "every": 20}, 0.8),
        ("torch_digits", {"workers": 2, "steps": 60}, 0.8),
        ("jax_mlp", {"steps": 100}, 0.8),
        ("federated_round", {"devices": 4, "rounds": 6}, 0.5),
        ("fine_tuning", {"steps": 100}, 0.75),
    ],
    indirect=["example"],
)
def test_digits_are_read(example: Any, options: dict[str, int], least: float) -> None:
    assert example.main(**options) > least


@pytest.mark.parametrize("example", ["embeddings"], indirect=True)
def test_embeddings_say_who_likes_what(example: Any) -> None:
    untrained, trained = example.main(steps=1), example.main(steps=250)
    assert trained < 0.8 * untrained


def test_ranks_under_torchrun_learn_together() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(EXAMPLES / "torchrun_characters.py"), "20"], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    found = re.search(r"2 ranks: loss ([\d.]+), after 20 steps ([\d.]+)", run.stdout)
    assert found is not None
    assert float(found[2]) < 0.9 * float(found[1])


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text() + (Path(__file__).parent / "test_own_rules.py").read_text()
    assert [each.name for each in EXAMPLES.glob("*.py") if each.stem not in here] == []
