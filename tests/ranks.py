"""What each rank of `torch.distributed` does in tests, as a function of the rank and a server's address."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from optserve import optim
from optserve.torch import RemoteOptimizer, _optimizer


def step(optimizer: RemoteOptimizer) -> None:
    """One with gradients of 1."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    optimizer.step()


def let_others_know(signals: dist.FileStore) -> None:
    """Once this rank has come to where it waits for the others."""
    wait = _optimizer.of_all_ranks

    def signalled(fact: Any) -> list[Any]:
        signals.set("arrived", "")
        return wait(fact)

    _optimizer.of_all_ranks = signalled


def resumed(rank: int, address: str, set_id: str, folder: str) -> None:
    """Load what was saved, go on, and take in another group, as a script does that all ranks run; saves what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    optimizer = RemoteOptimizer([("first", first)], address, set_id, optim.Adam(lr=0.1), client_id=f"rank-{rank}")
    optimizer.load_state_dict(torch.load(Path(folder, "saved.pt"), weights_only=True))
    signals = dist.FileStore(f"{folder}/signals", 2)
    if rank == 0:
        step(optimizer)
        let_others_know(signals)
    else:
        signals.wait(["arrived"])  # one is in the middle of adding its group when the other makes its step
        step(optimizer)
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.01})
    step(optimizer)
    dist.barrier()
    optimizer.pull()
    torch.save([first.detach(), second.detach(), optimizer.state_dict()], Path(folder, f"rank-{rank}.pt"))
    optimizer.close()
    dist.destroy_process_group()
