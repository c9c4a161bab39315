"""What each rank of `torch.distributed` does in tests, as a function of the rank and a server's address."""

from pathlib import Path

import torch
import torch.distributed as dist

from optserve import optim
from optserve.torch import RemoteOptimizer


def step(optimizer: RemoteOptimizer) -> None:
    """One with gradients of 1."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    optimizer.step()


def resumed(rank: int, address: str, set_id: str, folder: str) -> None:
    """Load what was saved, go on, and take in another group, as a script does that all ranks run; saves what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    optimizer = RemoteOptimizer([("first", first)], address, set_id, optim.Adam(lr=0.1), client_id=f"rank-{rank}")
    optimizer.load_state_dict(torch.load(Path(folder, "saved.pt"), weights_only=True))
    step(optimizer)
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.01})
    step(optimizer)
    dist.barrier()
    optimizer.pull()
    torch.save([first.detach(), second.detach(), optimizer.state_dict()], Path(folder, f"rank-{rank}.pt"))
    optimizer.close()
    dist.destroy_process_group()
