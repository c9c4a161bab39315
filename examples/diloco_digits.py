"""DiLoCo: workers learn to read handwritten digits, each from its own part of them, and synchronise once in 50 steps.

Needs optserve[demo]: `python examples/diloco_digits.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import optserve
from optserve import presets
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH = 32


def train(address: str, images: digits.Images, steps: int, every: int) -> optserve.DiLoCo:
    """One worker: an ordinary loop with an optimizer of its own (Adam), and one line more in it."""
    random = np.random.default_rng(len(images))
    with (
        optserve.Client(address) as client,
        client.parameter_set("digits").worker() as weights,
        optserve.DiLoCo(weights, every=every, delay=5) as diloco,
    ):
        parameters = diloco.parameters
        m = {name: np.zeros_like(array) for name, array in parameters.items()}
        v = {name: np.zeros_like(array) for name, array in parameters.items()}
        for t in range(1, steps + 1):
            _, gradients = digits.loss_and_gradients(parameters, images[random.integers(len(images), size=BATCH)])
            for name, g in gradients.items():
                m[name] += 0.1 * (g - m[name])
                v[name] += 0.001 * (g * g - v[name])
                parameters[name] -= 3e-3 * (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            diloco.step(samples=BATCH)
    return diloco


def main(workers: int = 4, steps: int = 200, every: int = 50) -> float:
    """Train with so many workers; returns the fraction of test images that are read correctly."""
    training, test = digits.load()
    parts = [training[part] for part in np.array_split(np.arange(len(training)), workers)]
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        start = digits.initial_parameters(seed=0)
        weights = client.create_parameter_set("digits", start, **presets.diloco(workers))
        with ThreadPoolExecutor(workers) as pool:
            trained = list(pool.map(lambda part: train(server.address, part, steps, every), parts))
        accuracy = digits.accuracy(weights.pull(), test)
    times, waited = trained[0].synchronisations, max(diloco.waited for diloco in trained)
    print(f"{accuracy:.1%} read correctly; {times} synchronisations in {steps} steps, {waited:.2f} s waited at most")
    return accuracy


if __name__ == "__main__":
    main()
