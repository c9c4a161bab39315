"""Handwritten digits, and a network of three layers that reads them: NumPy, with the backward pass written by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from sklearn.datasets import load_digits

Array = NDArray[np.floating[Any]]

SIDE = 8  # pixels
WIDTHS = (SIDE * SIDE, 256, 128, 10)  # pixels, two hidden layers, classes
TEST_IMAGES = 360  # of 1797
SPLIT_SEED = 0  # the same for every run, so that accuracies compare


@dataclass(frozen=True, slots=True)
class Images:
    """Scans as rows of pixels around zero, (n, 64), and the digits they show, (n,)."""

    pixels: Array
    digits: NDArray[np.integer[Any]]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: NDArray[np.integer[Any]]) -> "Images":
        return Images(self.pixels[rows], self.digits[rows])


def load() -> tuple[Images, Images]:
    """Images to train on, each also moved by one pixel in four directions, and images to test on."""
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits))
    scans = pixels[order].reshape(-1, SIDE, SIDE)
    digits = digits[order]
    test, training = scans[:TEST_IMAGES], scans[TEST_IMAGES:]
    framed = np.pad(training, ((0, 0), (1, 1), (1, 1)))
    corners = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    moved = np.concatenate([framed[:, y : y + SIDE, x : x + SIDE] for y, x in corners])
    return (
        Images(_scaled(moved), np.tile(digits[TEST_IMAGES:], len(corners))),
        Images(_scaled(test), digits[:TEST_IMAGES]),
    )


def initial_parameters(seed: int, dtype: DTypeLike = np.float32, widths: Sequence[int] = WIDTHS) -> dict[str, Array]:
    """Weights, (inputs, outputs), with He's variance 2 / inputs, and biases of zero."""
    random = np.random.default_rng(seed)
    parameters: dict[str, Array] = {}
    for layer, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        weight = random.normal(scale=np.sqrt(2 / inputs), size=(inputs, outputs))
        parameters[f"layer{layer}/weight"] = weight.astype(dtype)
        parameters[f"layer{layer}/bias"] = np.zeros(outputs, dtype)
    return parameters


def loss_and_gradients(parameters: Mapping[str, Array], images: Images) -> tuple[float, dict[str, Array]]:
    """Mean cross-entropy of the softmax, in nats, and its gradient by each parameter."""
    *activations, logits = _forward(parameters, images.pixels)
    loss, delta = _cross_entropy(logits, images.digits)
    gradients: dict[str, Array] = {}
    for layer in range(len(activations), 0, -1):
        inputs = activations[layer - 1]
        gradients[f"layer{layer}/weight"] = inputs.T @ delta
        gradients[f"layer{layer}/bias"] = delta.sum(axis=0)
        if layer > 1:
            delta = (delta @ parameters[f"layer{layer}/weight"].T) * (inputs > 0)
    return loss, gradients


def loss(parameters: Mapping[str, Array], images: Images) -> float:
    """Mean cross-entropy of the softmax, in nats."""
    return _cross_entropy(_forward(parameters, images.pixels)[-1], images.digits)[0]


def accuracy(parameters: Mapping[str, Array], images: Images) -> float:
    """Fraction of the images that the network reads correctly."""
    return float(np.mean(_forward(parameters, images.pixels)[-1].argmax(axis=1) == images.digits))


def _scaled(scans: Array) -> Array:
    """Grey levels 0 to 16, of mean 4.9 and standard deviation 6.0, as rows of numbers around zero."""
    return ((scans.reshape(-1, SIDE * SIDE) - 5) / 6).astype(np.float32)


def _forward(parameters: Mapping[str, Array], pixels: Array) -> list[Array]:
    """What enters each layer, (n, inputs), then the logits, (n, 10)."""
    layers = len(WIDTHS) - 1
    activations = [pixels]
    for layer in range(1, layers + 1):
        outputs = activations[-1] @ parameters[f"layer{layer}/weight"] + parameters[f"layer{layer}/bias"]
        activations.append(np.maximum(outputs, 0) if layer < layers else outputs)
    return activations


def _cross_entropy(logits: Array, digits: NDArray[np.integer[Any]]) -> tuple[float, Array]:
    """The mean loss, and its gradient by the logits, (n, 10): (softmax − one-hot) / n."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    truth = np.arange(len(digits)), digits
    delta = np.exp(logarithms)
    delta[truth] -= 1
    return -float(logarithms[truth].mean()), delta / len(digits)
