"""torch's own database of optimizer configurations, `optim_db`, for the optimizers that are here."""

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import hypothesis
import pytest

from optserve import optim

# For the base of a class that is not used here; and with the database come settings of Hypothesis, which are not wanted.
sys.modules.setdefault("expecttest", SimpleNamespace(TestCase=TestCase))  # type: ignore[arg-type]
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput, optim_db  # noqa: E402

hypothesis.settings.load_profile("optserve")

__all__ = ["HERE", "IMPLEMENTATION", "OptimizerInfo", "OptimizerInput", "case", "optim_db", "ours"]

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")

HERE: list[OptimizerInfo] = [info for info in optim_db if info.optim_cls.__name__ in optim.catalogue()]


def ours(info: OptimizerInfo, options: Mapping[str, Any]) -> optim.Optimizer:
    """Our optimizer with what torch's was given."""
    return optim.catalogue()[info.optim_cls.__name__](
        **{name: value for name, value in options.items() if name not in IMPLEMENTATION}
    )


def case(info: OptimizerInfo, value: Any, description: str) -> Any:
    """An optimizer and one of its inputs, by name."""
    return pytest.param(info, value, id=f"{info.optim_cls.__name__}: {description}")
