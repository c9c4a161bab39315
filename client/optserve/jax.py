"""JAX: steps on pytrees, and an optax transformation whose state is a server's.

Leaves are tensors by the names of their paths: `{"dense": {"kernel": ...}}` has the tensor `dense/kernel`.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import io_callback

from optserve._client import Client
from optserve._errors import InvalidTensor, TensorMismatch
from optserve._parameter_set import ParameterSet
from optserve._results import Parameters, Receipt
from optserve._rows import RowSparse
from optserve._specification import Holds
from optserve.optim import Optimizer

__all__ = ["Pytree", "RemoteState", "named", "remote"]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their paths; raises InvalidTensor if two have the same, or one has none."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name or name in leaves:
            raise InvalidTensor(f"expected a path of its own for each leaf, such as 'dense/kernel'; got {name!r}")
        leaves[name] = leaf
    return leaves


class Pytree:
    """A parameter set as a pytree: `parameters = pytree.step(gradients)`.

    `like` is a tree with the leaves of the set's tensors, such as its initial parameters; what is pushed may leave some out
    (None). Trees have JAX arrays, on the default device. Raises TensorMismatch for a set of other tensors.

        weights = client.create_parameter_set("model", optserve.jax.named(parameters), optim.AdamW())
        pytree = optserve.jax.Pytree(weights, parameters)
    """

    def __init__(self, weights: ParameterSet, like: Any) -> None:
        self.weights = weights
        self._names = list(named(like))
        self._structure = jax.tree_util.tree_structure(like)
        self._receipt: Receipt | None = None
        known = {tensor.name for tensor in weights.describe().spec.tensors}
        if odd := sorted(known.symmetric_difference(self._names)):
            raise TensorMismatch(
                f"expected a pytree with the {len(known)} tensors of set {weights.id!r}; {odd[0]!r} is only in one of the two"
            )

    @property
    def receipt(self) -> Receipt | None:
        """That of the last step."""
        return self._receipt

    def step(self, gradients: Any, **options: Any) -> Any:
        """Push gradients, and pull the parameters; takes the options of `ParameterSet.step`, and raises what it raises."""
        pulled = self.weights.step(_arrays(gradients), **options)
        self._receipt = pulled.receipt
        return self._tree(pulled)

    def pull(self) -> Any:
        """The parameters as they are now."""
        return self._tree(self.weights.pull())

    def _tree(self, pulled: Parameters) -> Any:
        return jax.tree_util.tree_unflatten(self._structure, [jax.numpy.asarray(pulled[name]) for name in self._names])


class RemoteState(NamedTuple):
    """What a program keeps of a `remote` transformation: how often it was applied; the rest is the server's."""

    count: Any


def remote(client: Client, id: str, optimizer: Optimizer, **creation: Any) -> optax.GradientTransformation:
    """A transformation that any optax program can use; its moments are kept, and its rule is applied, by a server.

    `init` creates the parameter set, which holds moments only, or attaches to one of the same specification; `update` makes a
    step of it, also under `jax.jit`, and gives what to add to the parameters. Each is one push: under `jax.vmap` or on several
    devices there is none, and a step that JAX repeats, as `jax.checkpoint` may, is another one. `creation` is what else
    `Client.create_parameter_set` takes. Raises what `create_parameter_set` and `step` raise; under `jax.jit`, as JAX's error.
    """
    attached: list[ParameterSet] = []

    def init(params: Any) -> RemoteState:
        shapes = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named(params).items()}
        attached[:] = [
            client.create_parameter_set(id, shapes, optimizer, holds=Holds.MOMENTS, exist_ok=True, **creation)
        ]
        return RemoteState(jax.numpy.zeros((), jax.numpy.int32))

    def update(updates: Any, state: RemoteState, params: Any = None) -> tuple[Any, RemoteState]:
        shapes = jax.tree_util.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), updates)
        stepped = io_callback(functools.partial(_stepped, attached[-1]), shapes, updates, params, ordered=True)
        return stepped, RemoteState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _stepped(weights: ParameterSet, gradients: Any, parameters: Any) -> Any:
    """What to add to the parameters: nothing, where the push made no update."""
    pushed = _arrays(gradients)
    pulled = weights.step(pushed, parameters=_arrays(parameters) if parameters is not None else None)
    updates = [pulled[name] if name in pulled else np.zeros_like(array) for name, array in pushed.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(gradients), updates)


def _arrays(tree: Any) -> dict[str, Any]:
    """Leaves in the memory of the host."""
    return {name: leaf if isinstance(leaf, RowSparse) else np.asarray(leaf) for name, leaf in named(tree).items()}
