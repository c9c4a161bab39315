"""Lightning: a network reads handwritten digits; its optimizer is a server's, and a checkpoint brings it to another server.

Needs optserve[demo,examples,torch]: `python examples/lightning_digits.py`.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH, WIDTH = 64, 128


class Reader(lightning.LightningModule):
    """A network of two layers; without an address, with an optimizer in this process."""

    def __init__(self, address: str | None, epochs: int) -> None:
        super().__init__()
        self.address, self.epochs = address, epochs
        self.network = nn.Sequential(nn.Linear(digits.SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        pixels, shown = batch
        return cross_entropy(self.network(pixels), shown)

    def configure_optimizers(self):
        optimizer = (
            RemoteOptimizer(self.named_parameters(), self.address, "digits", optim.AdamW(lr=3e-3))
            if self.address is not None
            else torch.optim.AdamW(self.parameters(), lr=3e-3)
        )
        return [optimizer], [CosineAnnealingLR(optimizer, self.epochs)]


def data(images: digits.Images) -> TensorDataset:
    """Pixels, and the digits that they show."""
    return TensorDataset(torch.tensor(images.pixels, dtype=torch.float32), torch.tensor(images.digits))


def train(address: str | None, epochs: int, *, stop: int, checkpoint: Path) -> Reader:
    """Train up to an epoch, from the checkpoint if there is one, and leave one."""
    torch.set_num_threads(1)  # of so small a network, more of them would wait for each other
    torch.manual_seed(0)
    reader = Reader(address, epochs)
    trainer = lightning.Trainer(
        max_epochs=stop,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    batches = DataLoader(data(digits.load()[0]), BATCH)
    trainer.fit(reader, batches, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    trainer.save_checkpoint(checkpoint)
    return reader


def main(epochs: int = 6) -> float:
    """Train half of the epochs on a server, and the rest on another; returns the fraction of test images read correctly."""
    with tempfile.TemporaryDirectory() as folder:
        for stop in (epochs // 2, epochs):
            with Server(Config(listen="127.0.0.1:0")) as server:
                reader = train(server.address, epochs, stop=stop, checkpoint=Path(folder, "last.ckpt"))
                optimizer = reader.optimizers(use_pl_optimizer=False)
                print(f"{optimizer.weights.describe().version} updates after {stop} epochs")
                optimizer.close()
    pixels, shown = data(digits.load()[1]).tensors
    accuracy = (reader.network(pixels).argmax(1) == shown).double().mean().item()
    print(f"{accuracy:.1%} read correctly")
    return accuracy


if __name__ == "__main__":
    main()
