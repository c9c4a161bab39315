"""Gradients as what a push takes, and parameters back."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from optserve._errors import InvalidTensor
from optserve._rows import RowSparse
from optserve.interop._building import Array
from optserve.interop.torch import as_array


def as_gradient(gradient: torch.Tensor) -> Array | RowSparse:
    """A gradient as a push takes it: that of an embedding with `sparse=True` as some of its rows. Raises InvalidTensor."""
    if gradient.layout != torch.sparse_coo:
        return as_array(gradient)
    if gradient.sparse_dim() != 1:
        raise InvalidTensor(
            f"expected a sparse gradient that has whole rows, as an embedding's; got one with {gradient.sparse_dim()} "
            "sparse dimensions"
        )
    gradient = gradient.coalesce()
    return RowSparse(as_array(gradient.indices()[0]), as_array(gradient.values()))


def assign(tensor: torch.Tensor, array: Array) -> None:
    """Let a tensor have the values of an array, and autograd know that it changed."""
    if tensor.device.type == "cpu":
        np.copyto(as_array(tensor), array)
        torch.autograd.graph.increment_version(tensor)
    else:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        np.copyto(as_array(staged), array)
        with torch.no_grad():
            tensor.copy_(staged, non_blocking=True)


def digest(state: Mapping[int, Mapping[str, Any]], parameters: Mapping[str, torch.Tensor]) -> bytes:
    """What is another one if a state dict's state or a parameter is, on whatever device they are."""
    found = hashlib.blake2b()
    kept = [
        (f"{index} {key}", value) for index, values in sorted(state.items()) for key, value in sorted(values.items())
    ]
    for name, value in (*kept, *parameters.items()):
        tensor = isinstance(value, torch.Tensor)
        found.update(f"{name} {(value.dtype, value.shape) if tensor else value}\n".encode())
        if tensor:
            found.update(np.ascontiguousarray(as_array(value)).reshape(-1).view(np.uint8).data)
    return found.digest()
