"""Sparse pushes: workers learn who likes what, with a row for each person and each thing, and send the rows that they touched.

Needs optserve[server]: `python examples/embeddings.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import optserve
from optserve import RowSparse, optim
from optserve_server import Config, Server

PEOPLE, THINGS, RANK, BATCH = 4_000, 1_000, 8, 256


def likes(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some people, things, and how much each likes the other: whether their kinds, out of four, are the same."""
    people, things = random.integers(PEOPLE, size=BATCH), random.integers(THINGS, size=BATCH)
    return people, things, np.where(people % 4 == things % 4, 1.0, 0.0).astype(np.float32)


def train(address: str, worker: int, steps: int) -> tuple[float, float]:
    """One worker; returns the loss of the last steps, and the part of all rows that a step has moved."""
    random = np.random.default_rng(worker)
    losses, rows = [], 0
    with optserve.Client(address) as client, client.parameter_set("likes") as weights:
        for _ in range(steps):
            people, things, liked = likes(random)
            own = {"people": np.unique(people), "things": np.unique(things)}
            pulled = weights.pull(rows=own)
            p = pulled["people"][np.searchsorted(own["people"], people)]
            t = pulled["things"][np.searchsorted(own["things"], things)]
            error = (p * t).sum(1) - liked
            losses.append(float((error**2).mean()))
            rows += sum(map(len, own.values()))
            weights.push(
                {
                    "people": RowSparse(people, 2 * error[:, None] * t),
                    "things": RowSparse(things, 2 * error[:, None] * p),
                }
            )
    return float(np.mean(losses[-20:])), rows / steps / (PEOPLE + THINGS)


def main(workers: int = 2, steps: int = 400) -> float:
    """Train with so many workers; returns the mean squared error at the end."""
    random = np.random.default_rng(0)
    start = {
        name: random.normal(scale=0.3, size=(count, RANK)).astype(np.float32)
        for name, count in (("people", PEOPLE), ("things", THINGS))
    }
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        client.create_parameter_set("likes", start, optim.Adagrad(lr=0.3))
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda worker: train(server.address, worker, steps), range(workers)))
    error, part = (float(np.mean(each)) for each in zip(*found, strict=True))
    print(f"mean squared error {error:.3f}; a step moved {part:.1%} of the rows")
    return error


if __name__ == "__main__":
    main()
