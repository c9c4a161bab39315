"""The examples learn, in a shorter form."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server

EXAMPLES = Path(__file__).parent.parent / "examples"
KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LIGHTNING = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*resuming from a checkpoint:UserWarning")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


def run_as(example: str, *arguments: str, **environment: str) -> str:
    """What an example prints in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=220, env=os.environ | environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def farthest(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((one - two).detach().abs().max().item() for one, two in pairs)


@pytest.mark.parametrize(
    ("example", "options", "least"),
    [
        ("diloco_digits", {"workers": 2, "steps": 60, "every": 20}, 0.8),
        ("torch_digits", {"workers": 2, "steps": 60}, 0.8),
        ("jax_mlp", {"steps": 100}, 0.8),
        ("federated_round", {"devices": 4, "rounds": 6}, 0.5),
        ("fine_tuning", {"steps": 100}, 0.75),
        pytest.param("keras_digits", {"epochs": 2}, 0.85, marks=KERAS),
        pytest.param("lightning_digits", {"epochs": 2}, 0.8, marks=LIGHTNING),
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


@pytest.mark.parametrize("example", ["trainer_characters"], indirect=True)
def test_a_trainer_of_transformers_learns_and_resumes(example: Any) -> None:
    first, last = example.main(steps=40)
    assert last < 0.9 * first


@pytest.mark.parametrize("example", ["trainer_characters"], indirect=True)
def test_a_trainer_leads_where_it_leads_with_the_local_optimizer(example: Any, server: Server, tmp_path: Path) -> None:
    """With accumulation, clipping, a scheduler, and on the way a checkpoint from which both resume."""
    models, steps = [], 8
    for place in ("local", "remote"):
        for stop in (steps // 2, steps):
            model = example.network()
            optimizer = (
                torch.optim.AdamW(model.parameters(), lr=1e-3)
                if place == "local"
                else RemoteOptimizer(model.named_parameters(), server.address, f"gpt-{stop}", optim.AdamW(lr=1e-3))
            )
            example.train(model, optimizer, str(tmp_path / place), steps, stop=stop)
        models.append(model)
    assert isinstance(optimizer, RemoteOptimizer)
    assert optimizer.weights.describe().version == steps
    optimizer.close()
    assert farthest(*models) < 1e-5


@LIGHTNING
@pytest.mark.parametrize("example", ["lightning_digits"], indirect=True)
def test_lightning_leads_where_it_leads_with_the_local_optimizer(example: Any, tmp_path: Path) -> None:
    """As above."""
    models = []
    for place in ("local", "remote"):
        for stop in (1, 2):
            with Server(Config(listen="127.0.0.1:0")) as server:
                address = server.address if place == "remote" else None
                model = example.train(address, 2, stop=stop, checkpoint=tmp_path / place)
                if address is not None:
                    model.optimizers(use_pl_optimizer=False).close()
        models.append(model)
    assert farthest(*models) < 1e-4


@pytest.mark.timeout(240)  # Ray starts a dozen processes
def test_workers_of_ray_train_learn_together() -> None:
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    found = re.search(
        r"([\d.]+)% read correctly after 40 updates of 2 workers", run_as("ray_digits", "2", "40", **quiet)
    )
    assert found is not None
    assert float(found[1]) > 80.0


def test_keras_learns_with_torch_as_well() -> None:
    found = re.search(
        r"([\d.]+)% read correctly", run_as("keras_digits", "2", KERAS_BACKEND="torch", OMP_NUM_THREADS="1")
    )
    assert found is not None
    assert float(found[1]) > 85.0


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text() + (Path(__file__).parent / "test_own_rules.py").read_text()
    assert [each.name for each in EXAMPLES.glob("*.py") if each.stem not in here] == []
