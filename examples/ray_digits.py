"""Ray Train: two workers teach one network to read digits; each pushes to the server that the driver has started.

Needs optserve[demo,examples,torch]: `python examples/ray_digits.py`. Most of the time, Ray starts its processes.
"""

import sys
import tempfile

import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.functional import cross_entropy

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH, WIDTH = 64, 128
RULE = optim.AdamW(lr=3e-3)


def network() -> nn.Module:
    """Reads scans of 8 by 8 pixels."""
    return nn.Sequential(nn.Linear(digits.SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def train(options: dict[str, object]) -> None:
    """One worker, named after its rank: the workers' gradients make one update together."""
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    images, _ = digits.load()
    pixels, shown = torch.tensor(images.pixels, dtype=torch.float32), torch.tensor(images.digits)
    model, random = network(), torch.Generator().manual_seed(rank)
    optimizer = RemoteOptimizer(
        *(model.named_parameters(), options["address"], "digits", RULE),
        client_id=f"rank-{rank}",
        policy=optserve.Sync(ranks),
    )
    for _ in range(options["steps"]):
        batch = torch.randint(len(shown), (BATCH,), generator=random)
        optimizer.zero_grad()
        loss = cross_entropy(model(pixels[batch]), shown[batch])
        loss.backward()
        optimizer.step()
    ray.train.report({"loss": loss.item(), "version": optimizer.receipt.version})
    optimizer.close()


def main(workers: int = 2, steps: int = 200) -> float:
    """Train with so many workers; returns the fraction of test images that are read correctly."""
    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)
    with Server(Config(listen="127.0.0.1:0")) as server, tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            train,
            train_loop_config={"address": server.address, "steps": steps},
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        model = network()
        optimizer = RemoteOptimizer(
            model.named_parameters(), server.address, "digits", RULE, policy=optserve.Sync(workers)
        )
        updates = optimizer.weights.describe().version
        optimizer.close()
    ray.shutdown()
    _, test = digits.load()
    read = model(torch.tensor(test.pixels, dtype=torch.float32)).argmax(1)
    accuracy = (read == torch.tensor(test.digits)).double().mean().item()
    print(f"{accuracy:.1%} read correctly after {updates} updates of {workers} workers")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
