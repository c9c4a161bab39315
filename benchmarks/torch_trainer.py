"""A transformer and its optimizers: `python -m benchmarks.torch_trainer WHERE ADDRESS ROUNDS`.

It prints what steps took, as JSON. Each way to train has a copy of the model in this process, and takes turns of some steps. A
turn ends when all parameters are back, so that nobody's work goes on in another's turn.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.torch_step import TOKENS, WAYS, Way
from optserve import Client, optim
from optserve.torch import RemoteOptimizer

WIDTH, HEADS, LAYERS, WORDS = 512, 8, 8, 256  # 25 million parameters
STEPS = 3  # in a turn
MAX_NORM = 1.0
LEARNING_RATE = 1e-4


class Transformer(nn.Module):
    """Reads bytes, and says which comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.layers(self.embedding(words), mask, is_causal=True))


@dataclass(frozen=True)
class Turn:
    """Seconds: medians of forward and backward, and of what the script waits for the optimizer; the mean of whole steps."""

    backward: float
    step: float
    whole: float


class Trainer:
    """A model, and one way to train it."""

    def __init__(self, way: Way, set_id: str, address: str, resources: ExitStack) -> None:
        torch.manual_seed(0)
        self.model, self._way = Transformer(), way
        self.optimizer, self._wait = _optimizer(self.model, way, set_id, address, resources)

    def turn(self) -> Turn:
        """Some steps, until nothing of them is left to do."""
        begin, phases = time.perf_counter(), [self._step() for _ in range(STEPS)]
        self._wait()
        whole = (time.perf_counter() - begin) / STEPS
        backward, step = (statistics.median(each) for each in zip(*phases, strict=True))
        return Turn(backward, step, whole)

    def _step(self) -> tuple[float, float]:
        words = torch.randint(WORDS, (1, TOKENS + 1))
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.model(words[:, :-1])[0], words[0, 1:]).backward()
        between = time.perf_counter()
        if self._way.clipped_here:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        return between - begin, time.perf_counter() - between

    @property
    def state_bytes(self) -> int:
        """Of what the optimizer keeps in this process."""
        tensors = (value for values in self.optimizer.state.values() for value in values.values())
        return sum(tensor.nbytes for tensor in tensors)


def _optimizer(
    model: nn.Module, way: Way, set_id: str, address: str, resources: ExitStack
) -> tuple[torch.optim.Optimizer, Callable[[], object]]:
    """An optimizer, and how to wait until it has done everything."""
    if way.transport is None:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True), lambda: None
    client = resources.enter_context(Client(address, transport=way.transport))
    max_norm = MAX_NORM if way.clipped_there else None
    remote = RemoteOptimizer(
        model.named_parameters(), client, set_id, optim.AdamW(lr=LEARNING_RATE), overlap=way.overlap, max_norm=max_norm
    )
    resources.callback(remote.close)
    return remote, remote.wait


def measured(ways: Mapping[str, Way], address: str, rounds: int) -> dict[str, object]:
    """The turns of each way, who all have one in each round, after a first one that does not count."""
    torch.set_num_threads(os.cpu_count() or 1)
    with ExitStack() as resources:
        trainers = {
            name: Trainer(way, f"model-{number}", address, resources) for number, (name, way) in enumerate(ways.items())
        }
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        names = list(ways)
        for number in range(1 + rounds):
            for name in names:
                turn = trainers[name].turn()
                if number:
                    turns[name].append(asdict(turn))
            names = names[1:] + names[:1]
        size = sum(tensor.numel() for tensor in next(iter(trainers.values())).model.parameters())
        state = {name: trainer.state_bytes for name, trainer in trainers.items()}
        return {"parameters": size, "state_bytes": state, "turns": turns}


if __name__ == "__main__":
    print(json.dumps(measured(WAYS[sys.argv[1]], sys.argv[2], int(sys.argv[3]))))
