"""PyTorch: worker processes teach one convolutional network to read digits; each pushes when it is ready, and waits for nobody.

Needs optserve[demo,torch]: `python examples/torch_digits.py`.
"""

import multiprocessing

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH = 64


def network() -> nn.Module:
    """Reads scans of 8 by 8 pixels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, digits.SIDE, digits.SIDE)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 4 * 4, 10),
    )


def tensors(images: digits.Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and the digits that they show."""
    return torch.tensor(images.pixels, dtype=torch.float32), torch.tensor(images.digits)


def train(address: str, worker: int, steps: int) -> None:
    """An ordinary loop; only the optimizer is elsewhere."""
    torch.set_num_threads(1)
    pixels, shown = tensors(digits.load()[0])
    model, random = network(), torch.Generator().manual_seed(worker)
    rule = optim.Adam(lr=2e-3)
    optimizer = RemoteOptimizer(model.named_parameters(), address, "digits", rule, client_id=f"worker-{worker}")
    for _ in range(steps):
        batch = torch.randint(len(shown), (BATCH,), generator=random)
        optimizer.zero_grad()
        cross_entropy(model(pixels[batch]), shown[batch]).backward()
        optimizer.step()
    optimizer.close()


def main(workers: int = 4, steps: int = 150) -> float:
    """Train with so many workers; returns the fraction of test images that are read correctly."""
    torch.manual_seed(0)
    model = network()
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        first = RemoteOptimizer(model.named_parameters(), client, "digits", optim.Adam(lr=2e-3))
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=train, args=(server.address, k, steps)) for k in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        first.pull()
        staleness = first.weights.describe().staleness
    pixels, shown = tensors(digits.load()[1])
    accuracy = (model(pixels).argmax(1) == shown).double().mean().item()
    updates = sum(staleness.values())
    stale = sum(updates * many for updates, many in staleness.items()) / updates
    print(f"{accuracy:.1%} read correctly after {updates} updates, of gradients that were {stale:.1f} updates old")
    return accuracy


if __name__ == "__main__":
    main()
