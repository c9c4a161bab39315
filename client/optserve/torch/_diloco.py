"""DiLoCo around an ordinary torch loop."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import torch

import optserve
from optserve._errors import InvalidTensor
from optserve._fragments import Fragments
from optserve._parameter_set import ParameterSet
from optserve.interop._building import Array
from optserve.interop.torch import as_array


class DiLoCo(optserve.DiLoCo):
    """`optserve.DiLoCo` on the tensors of a model: each step of the local `optimizer` counts as one.

    `tensors` are `model.named_parameters()`, and of a model with buffers that the set has, such as running statistics,
    `model.state_dict()`: those in the memory of the host. Raises InvalidTensor for others.

        with optserve.torch.DiLoCo(weights, optimizer, model.named_parameters(), every=50):
            for inputs, targets in loader: ...
    """

    def __init__(
        self,
        weights: ParameterSet,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        every: int,
        delay: int = 0,
        mixing: float | None = None,
        fragments: Fragments = 1,
    ) -> None:
        self._tensors = dict(tensors)
        for name, tensor in self._tensors.items():
            if tensor.device.type != "cpu":
                raise InvalidTensor(f"expected tensors in the memory of the host; {name!r} is on {tensor.device}")
        parameters = {name: as_array(tensor) for name, tensor in self._tensors.items()}
        super().__init__(weights, every=every, delay=delay, mixing=mixing, fragments=fragments, parameters=parameters)
        self._optimizer = optimizer

    def __enter__(self) -> Self:
        super().__enter__()
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self.step())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()
        super().__exit__(kind, error, traceback)

    def _assign(self, name: str, value: Array) -> None:
        super()._assign(name, value)
        torch.autograd.graph.increment_version(self._tensors[name])
