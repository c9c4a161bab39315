"""The engine without any transport: sets, sessions and pushes as the service makes them."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optserve import Position, Receipt, StateFormat, TensorSpec, Transforms, optim
from optserve._policies import ASYNC, Policy
from optserve._specification import Holds, ParameterSetSpec, as_arrays
from optserve._transforms import PLAIN
from optserve._wire import pack
from optserve_server.engine.commit import Commit
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared, Push
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import Threads
from optserve_server.storage import manifest
from optserve_server.storage.directory import DataDirectory

Array = np.ndarray[Any, Any]


class DirectSet:
    """A parameter set and one session on it."""

    def __init__(
        self,
        parameters: Mapping[str, Array],
        optimizer: optim.Optimizer,
        *,
        threads: int = 2,
        chunk_bytes: int = 1 << 20,
        holds: Holds = Holds.PARAMETERS,
        transforms: Transforms = PLAIN,
        groups: Sequence[optim.Group] = (),
        state: StateFormat = StateFormat.FULL,
        policy: Policy = ASYNC,
    ) -> None:
        self.chunk_bytes = chunk_bytes
        specs = tuple(TensorSpec.of(name, array) for name, array in parameters.items())
        spec = ParameterSetSpec(
            "direct", specs, optimizer, tuple(groups), holds, policy=policy, transforms=transforms, state=state
        )
        self._threads = Threads(threads)
        self.set = ParameterSet(spec, incarnation=1, threads=self._threads)
        if holds is Holds.PARAMETERS:
            self.set.load(self._staged(parameters))
        self.session = self.set.open("direct", 0, self)
        self._sequence = itertools.count(1)

    def push(
        self,
        gradients: Mapping[str, Array],
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        loss_scale: float = 1.0,
    ) -> Receipt:
        """Apply gradients; returns the receipt, of a refusal too."""
        push = self._finished(gradients, changes, loss_scale)
        receipt, _ = self.set.push(self.session, self, push, pull=False)
        return receipt

    def push_together(self, gradients: Sequence[Mapping[str, Array]], *, base: Position | None = None) -> list[Receipt]:
        """Apply several in one pass, as if they had waited for each other, all computed at one base."""
        commits = [
            Commit(self.session, self, self._finished(each, base=base), pull=False, held=None) for each in gradients
        ]
        sessions = [self.set.open(f"direct-{k}", 0, self) for k in range(len(commits))]
        for commit, session in zip(commits, sessions, strict=True):
            commit.session, commit.push.sequence = session, 1
        with self.set._lock:
            self.set._apply(commits)
        receipts = [commit.receipt for commit in commits if commit.receipt is not None and commit.receipt.applied]
        assert len(receipts) == len(commits)
        return receipts

    def arrive(self, gradients: Mapping[str, Mapping[str, Array]], samples: Mapping[str, float] | None = None) -> None:
        """Let pushes of several clients, which wait for each other, arrive in this order; they must make a round."""
        commits = []
        for client, each in gradients.items():
            session = self.set._sessions.resume(client, 1)
            push = self._finished(each, samples=(samples or {}).get(client, 1.0), sequence=session.last_sequence + 1)
            commits.append(Commit(session, session.stream, push, pull=False, held=None))
            with self.set._lock:
                self.set._apply(commits[-1:])
        assert all(commit.receipt is not None and commit.receipt.applied for commit in commits)

    def restored(self) -> "DirectSet":
        """Another set, from what this one would leave in a checkpoint."""
        state = self.set.capture()
        other = copy.copy(self)
        other.set = ParameterSet(state.spec, incarnation=2, threads=self._threads)
        entries = state.entries()
        described = manifest.from_bytes(manifest.to_bytes(manifest.Manifest(state, {})))
        other.set.restore(described.state.with_keys(state.key_arrays))
        with other.set.frozen() as restored:
            for name, arrays in restored.entries().items():
                for tensor, array in arrays.items():
                    array[...] = entries[name][tensor]
        other.session = other.set.open("direct", self.session.epoch, other)
        return other

    def stored(self, path: Path) -> "DirectSet":
        """Another set, from what this one leaves in a data directory."""
        directory = DataDirectory(path)
        directory.add(self.set).checkpoint()
        directory.close()
        other = copy.copy(self)
        other.set = restored(path, self._threads.count)
        other.session = other.set.open("direct", self.session.epoch, other)
        return other

    def _finished(
        self,
        gradients: Mapping[str, Array],
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        loss_scale: float = 1.0,
        samples: float = 1.0,
        sequence: int | None = None,
        base: Position | None = None,
    ) -> Push:
        declared = [Declared(TensorSpec.of(name, array)) for name, array in gradients.items()]
        sequence = sequence or next(self._sequence)
        push = self.set.begin(sequence, declared, base=base, changes=changes, loss_scale=loss_scale, samples=samples)
        for payload in pack(self._views(gradients), self.chunk_bytes):
            push.add(payload.runs, payload.buffer, replace=False)
        push.finish()
        return push

    def pull(self, *, evaluation: bool = False) -> dict[str, Array]:
        """The parameters, or those to evaluate."""
        snapshot = self.set.snapshot(pinned=False, evaluation=evaluation)
        assert snapshot is not None
        return {
            spec.name: snapshot.data[index].view(spec.dtype.array_dtype).reshape(spec.shape)
            for index, spec in enumerate(self.set.spec.tensors)
            if index in snapshot.tensors
        }

    def slot(self, tensor: str, name: str) -> Array:
        """What a rule keeps for every element of a tensor."""
        index = [spec.name for spec in self.set.spec.tensors].index(tensor)
        spec, place = self.set.spec.tensors[index], self.set.layout.places[index]
        arena = self.set.capture().arenas[name][place.compute]
        return arena[place.start : place.start + spec.size].reshape(spec.shape)

    def _staged(self, tensors: Mapping[str, Array]) -> Staging:
        staging = Staging(self.set.spec.tensors, self._threads)
        for payload in pack(self._views(tensors), self.chunk_bytes):
            staging.add(payload.runs, payload.buffer)
        staging.finish()
        return staging

    def _views(self, tensors: Mapping[str, Array]) -> list[tuple[int, memoryview, int]]:
        arrays = as_arrays(tensors).values()
        return [(k, array.reshape(-1).view(np.uint8).data, array.itemsize) for k, array in enumerate(arrays)]


def restored(path: Path, threads: int = 2) -> ParameterSet:
    """The only set that a data directory has, as a server would bring it back."""
    (parameter_set,) = all_restored(path, threads)
    return parameter_set


def all_restored(path: Path, threads: int = 2) -> list[ParameterSet]:
    """All sets that a data directory has, ordered by id."""
    engine, directory = Engine(threads), DataDirectory(path)
    directory.restore(engine)
    directory.close()
    return engine.list()
