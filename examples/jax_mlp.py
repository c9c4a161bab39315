"""JAX: a network of two layers reads digits; optax clips, and a server keeps the moments.

Needs optserve[demo,jax]: `python examples/jax_mlp.py`.
"""

import jax
import jax.numpy as jnp
import optax

import optserve
from optserve import optim, schedules
from optserve.jax import remote
from optserve_server import Config, Server
from optserve_server.demo import digits

BATCH, WIDTH = 64, 128


def loss(parameters, pixels, shown):
    """Mean cross entropy."""
    hidden = jax.nn.relu(pixels @ parameters["first"]["kernel"] + parameters["first"]["bias"])
    outputs = hidden @ parameters["second"]["kernel"] + parameters["second"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, shown).mean(), outputs


def initial(key):
    """Weights with He's variance, and biases of zero."""
    widths = {"first": (digits.SIDE**2, WIDTH), "second": (WIDTH, 10)}
    return {
        name: {"kernel": jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5, "bias": jnp.zeros(shape[1])}
        for name, shape in widths.items()
    }


def main(steps: int = 400) -> float:
    """Train; returns the fraction of test images that are read correctly."""
    training, test = digits.load()
    pixels, shown = jnp.asarray(training.pixels, jnp.float32), jnp.asarray(training.digits)
    rate = schedules.WarmupCosine(peak_value=5e-3, warmup_steps=steps // 10, decay_steps=steps)
    with Server(Config(listen="127.0.0.1:0")) as server, optserve.Client(server.address) as client:
        transformation = optax.chain(optax.clip_by_global_norm(1.0), remote(client, "digits", optim.AdamW(lr=rate)))

        @jax.jit
        def train(parameters, state, key):
            batch = jax.random.randint(key, (BATCH,), 0, len(shown))
            gradients, _ = jax.grad(loss, has_aux=True)(parameters, pixels[batch], shown[batch])
            updates, state = transformation.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        parameters = initial(jax.random.key(0))
        state = transformation.init(parameters)
        for step in range(steps):
            parameters, state = train(parameters, state, jax.random.key(step))
        jax.block_until_ready(parameters)
    _, outputs = loss(parameters, jnp.asarray(test.pixels, jnp.float32), jnp.asarray(test.digits))
    accuracy = float((outputs.argmax(1) == jnp.asarray(test.digits)).mean())
    print(f"{accuracy:.1%} read correctly after {steps} steps")
    return accuracy


if __name__ == "__main__":
    main()
