"""PyTorch: an optimizer that runs on a server, `RemoteOptimizer`, in the place of one of `torch.optim`; and `DiLoCo`."""

from optserve.torch._diloco import DiLoCo
from optserve.torch._optimizer import RemoteOptimizer

__all__ = ["DiLoCo", "RemoteOptimizer"]
