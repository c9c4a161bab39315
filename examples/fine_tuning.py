"""Fine-tuning: a network that reads the digits below five learns the others; its first layers stay, or follow slowly.

Needs optserve[demo,torch]: `python examples/fine_tuning.py`.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH = 64


def tensors(images: digits.Images, *, below: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the digits below five, or of the others; and which of the five they show."""
    chosen = images[(images.digits < 5) == below]
    return torch.tensor(chosen.pixels, dtype=torch.float32), torch.tensor(chosen.digits % 5)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: tuple[torch.Tensor, torch.Tensor], steps: int
) -> None:
    """An ordinary loop."""
    (pixels, shown), random = images, torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(shown), (BATCH,), generator=random)
        optimizer.zero_grad()
        cross_entropy(model(pixels[batch]), shown[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The fraction that is read correctly."""
    return (model(images[0]).argmax(1) == images[1]).double().mean().item()


def main(steps: int = 200) -> float:
    """Train, and tune; returns the fraction of the other digits' test images that are read correctly."""
    torch.manual_seed(0)
    training, test = digits.load()
    model = nn.Sequential(
        *(nn.Linear(digits.SIDE**2, 64), nn.ReLU()), *(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 5)
    )
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), tensors(training, below=True), steps)

    frozen, slow, head = model[0], model[2], model[4]
    frozen.requires_grad_(False)
    head.reset_parameters()
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        optimizer = RemoteOptimizer(
            [
                {"params": head.named_parameters("head")},
                {"params": slow.named_parameters("slow"), "lr": 3e-4, "weight_decay": 0.0, "name": "slow"},
            ],
            client,
            "tuned",
            optim.AdamW(lr=3e-3),
        )
        train(model, optimizer, tensors(training, below=False), steps)
        groups = {group.name: group.optimizer.lr for group in optimizer.weights.describe().groups}
    read = accuracy(model, tensors(test, below=False))
    print(f"{read:.1%} of the other digits read correctly; learning rates {groups}, the first layer untouched")
    return read


if __name__ == "__main__":
    main()
