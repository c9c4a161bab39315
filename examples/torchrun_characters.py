"""PyTorch under torchrun: a transformer learns the letters of this repository's documentation; each rank has its own batches.

Needs optserve[server,torch]: `torchrun --nproc-per-node 2 examples/torchrun_characters.py`. Rank 0 serves.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server

LENGTH, BATCH, WIDTH = 48, 16, 64


def text() -> torch.Tensor:
    """The documentation's characters, as numbers below 128."""
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    return torch.tensor(list("".join(page.read_text() for page in pages).encode("ascii", "replace")))


class Characters(nn.Module):
    """Says which character comes next, from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.character(characters) + self.place(torch.arange(LENGTH))
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def batch(characters: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of text, and the same one character later."""
    starts = torch.randint(len(characters) - LENGTH, (BATCH, 1), generator=random) + torch.arange(LENGTH)
    return characters[starts], characters[starts + 1]


def train(address: str, rank: int, ranks: int, steps: int) -> list[float]:
    """The loss of each step: the ranks' gradients make one update together."""
    torch.manual_seed(rank)  # whatever it begins with: all have the first one's parameters
    characters, random, model = text(), torch.Generator().manual_seed(rank), Characters()
    optimizer = RemoteOptimizer(
        model.named_parameters(), address, "characters", optim.AdamW(lr=3e-3), policy=optserve.Sync(ranks)
    )
    losses = []
    for _ in range(steps):
        inputs, targets = batch(characters, random)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    return losses


def main(steps: int = 150) -> None:
    """Train on all ranks, and say how the loss went."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    server = Server(Config(listen="127.0.0.1:0")).start() if rank == 0 else None
    address = [server.address if server is not None else None]
    dist.broadcast_object_list(address)
    losses = train(str(address[0]), rank, ranks, steps)
    dist.barrier()
    if server is not None:
        server.stop()
        print(f"{os.environ['WORLD_SIZE']} ranks: loss {losses[0]:.2f}, after {steps} steps {losses[-1]:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
