"""Keras: a network reads digits with `compile` and `fit` as ever; a server clips, and keeps variables and moments.

Needs optserve[demo,jax,keras]: `KERAS_BACKEND=jax python examples/keras_digits.py`; or with torch, both ways.
"""

import sys

import keras

import optserve
from optserve import optim
from optserve.keras import RemoteOptimizer
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH, WIDTH = 64, 128


def network() -> keras.Model:
    """Two layers; names that do not count the models of a process, so that other workers find the same ones."""
    layers = [keras.layers.Dense(WIDTH, "relu", name="first"), keras.layers.Dense(10, name="second")]
    return keras.Sequential([keras.Input((digits.SIDE**2,)), *layers], name="reader")


def main(epochs: int = 5) -> float:
    """Train; returns the fraction of test images that are read correctly."""
    keras.utils.set_random_seed(0)
    training, test = digits.load()
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        model, transforms = network(), optserve.Transforms(clip=optserve.ClipGlobalNorm(1.0))
        optimizer = RemoteOptimizer(client, "digits", optim.AdamW(lr=3e-3), transforms=transforms)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate)
        model.fit(training.pixels, training.digits, BATCH, epochs, verbose=0, callbacks=[halve])
        updates, rate = optimizer.receipt.version, optimizer.receipt.learning_rate
    _, accuracy = model.evaluate(test.pixels, test.digits, verbose=0)
    print(f"{accuracy:.1%} read correctly after {updates} updates; the last one's learning rate was {rate:g}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
