"""Two small models, their batches, and what optimizers train them with."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

WORDS, LENGTH, CLASSES = 20, 6, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "Adadelta": {"lr": 0.3},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.05, "momentum": 0.9},
}


class Convolutions(nn.Module):
    """Reads images of 8 by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 6, 3)
        self.head, self.unused = nn.Linear(6, CLASSES), nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(images))))
        return self.head(hidden.flatten(1))


class Transformer(nn.Module):
    """Reads words; those that it writes have the embeddings of those that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        # Without biases: that of the keys has no effect, and its gradient is nothing but what rounding left.
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, bias=False)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(words))).mean(1)


def made(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def inputs_of(model: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, and its classes."""
    randomness = torch.Generator().manual_seed(step)
    if isinstance(model, Transformer):
        words = torch.randint(WORDS, (4, LENGTH), generator=randomness)
        return words, words[:, 0]
    images = torch.randn(8, 1, 8, 8, dtype=torch.float32, generator=randomness)  # the same for models of any dtype
    return images.to(next(model.parameters()).dtype), (images.mean((1, 2, 3)) * 20).long() % CLASSES


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    inputs, classes = inputs_of(model, step)
    return cross_entropy(model(inputs).to(torch.promote_types(next(model.parameters()).dtype, torch.float32)), classes)


def backward(model: nn.Module, step: int) -> float:
    loss = loss_of(model, step)
    loss.backward()
    return loss.item()
