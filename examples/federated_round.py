"""Federated averaging: devices that each know a few digits only train at home, and a server averages what came of it.

Needs optserve[demo]: `python examples/federated_round.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

import optserve
from optserve import presets
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH, RATE = 32, 0.05


def at_home(parameters: dict[str, np.ndarray], images: digits.Images, epochs: int, seed: int) -> None:
    """Train in place with plain gradient descent; the images never leave."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(images))
        for batch in np.array_split(order, max(1, len(images) // BATCH)):
            _, gradients = digits.loss_and_gradients(parameters, images[batch])
            for name, gradient in gradients.items():
                parameters[name] -= RATE * gradient


def main(devices: int = 10, rounds: int = 15, epochs: int = 1) -> float:
    """Train on so many devices; returns the fraction of test images that are read correctly."""
    training, test = digits.load()
    by_digit = np.argsort(training.digits, kind="stable")
    parts = [training[part] for part in np.array_split(by_digit, devices)]  # each has one digit or two

    def device(number: int) -> None:
        with client.parameter_set("digits").worker(f"device-{number}") as weights:
            for each in range(rounds):
                parameters = {name: np.array(value) for name, value in weights.pull().items()}
                at_home(parameters, parts[number], epochs, seed=each)
                weights.push(parameters, samples=len(parts[number]))

    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        start = digits.initial_parameters(seed=0)
        weights = client.create_parameter_set("digits", start, **(presets.fedavg(devices) | {"pushes": "parameters"}))
        with ThreadPoolExecutor(devices) as pool:
            list(pool.map(device, range(devices)))
        accuracy = digits.accuracy(weights.pull(), test)
    print(f"{accuracy:.1%} read correctly after {rounds} rounds of {devices} devices with one digit or two each")
    return accuracy


if __name__ == "__main__":
    main()
