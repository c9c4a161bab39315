"""PyTorch: an optimizer that runs on a server, `RemoteOptimizer`, in the place of one of `torch.optim`."""

from optserve.torch._optimizer import RemoteOptimizer

__all__ = ["RemoteOptimizer"]
