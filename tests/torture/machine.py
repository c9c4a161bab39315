"""A server without a network: engine, service and storage in this process, and the workers that use them.

Nothing happens but what is called: the schedule's threads are left out, and journals see a clock that is set by hand.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from optserve import Constant, Receipt, Sync, TensorSpec, Transforms, optim
from optserve._dtypes import FLOAT32
from optserve._messages import encode_changes, encode_spec
from optserve._specification import Journal, ParameterSetSpec
from optserve._wire import Frame, pack
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.push import Declared
from optserve_server.engine.state import State
from optserve_server.service import OptimizerService
from optserve_server.storage import journal, manifest
from optserve_server.storage.directory import DataDirectory

Array = np.ndarray[Any, Any]

GRAIN = 4096  # of journals here, so that they grow often, and some records are large
SHAPES = {"w": (33, 7), "b": (5,)}
OTHERS = {"table": SHAPES | {"rows": (64, 3)}, "large": {"w": (33, 70), "b": (5,)}}

SETS: dict[str, Mapping[str, Any]] = {
    "adam-always": {"optimizer": optim.Adam(lr=0.01), "journal": Journal.ALWAYS},
    "sgd-everysec": {"optimizer": optim.SGD(lr=0.01, momentum=0.9), "journal": Journal.EVERYSEC},
    "large": {"optimizer": optim.AdamW(lr=0.01), "journal": Journal.ALWAYS},  # its records are written page by page
    "adam-off": {"optimizer": optim.Adam(lr=0.01), "journal": Journal.OFF},
    "rounds": {"optimizer": optim.SGD(lr=0.01), "journal": Journal.ALWAYS, "policy": Sync(workers=2)},
    "accumulated": {
        "optimizer": optim.Adam(lr=0.01),
        "journal": Journal.EVERYSEC,
        "transforms": Transforms(accumulate=2),
    },
    "table": {"optimizer": optim.Adagrad(lr=0.01), "journal": Journal.ALWAYS, "tables": {"rows": Constant(0.5)}},
}


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """As of `time`."""
        return self.now


@contextmanager
def small_journals() -> Iterator[Clock]:
    """Let journals grow in small steps, and see the clock that this gives."""
    with mock.patch.multiple(journal, GRAIN=GRAIN, time=Clock()):
        yield journal.time  # type: ignore[attr-defined]


class Machine:
    """A server that was started on a data directory; raises OSError if it can't be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = Engine(1)
        with ExitStack() as acquired:
            acquired.callback(self.engine.close)
            self.directory = DataDirectory(path)
            acquired.callback(self.directory._lock.close)
            self.directory.restore(self.engine)
            acquired.pop_all()
        self.service = OptimizerService(self.engine, self.directory)

    def create(self, kind: str) -> None:
        """Create the set of that kind; raises StorageFailed or ParameterSetExists."""
        shapes = OTHERS.get(kind, SHAPES)
        tensors = tuple(TensorSpec(name, FLOAT32, shape) for name, shape in shapes.items())
        spec = ParameterSetSpec(kind, tensors, **SETS[kind])
        arrays = [gradient(spec, each.name, 0).reshape(-1) for each in spec.sent]
        payloads = pack((k, array.view(np.uint8).data, 4) for k, array in enumerate(arrays) if array.size)
        frames = [Frame(pb.CreateParameterSetRequest(), payload) for payload in payloads]
        frames[0].message.spec.CopyFrom(encode_spec(spec))
        self.service.call("CreateParameterSet", iter(frames))

    def push(
        self, kind: str, seed: int, *, bad: bool = False, again: bool = False, epoch: int = -1, sequence: int = 0
    ) -> list[Receipt]:
        """Push once, or once from each worker of a round; `again` with the sequence of the push before."""
        workers = 2 if kind == "rounds" else 1
        push = functools.partial(self._push, kind, bad=bad, again=again, epoch=epoch, sequence=sequence)
        if workers == 1:
            return [push("worker-0", seed)]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(push, [f"worker-{k}" for k in range(workers)], [2 * seed, 2 * seed + 1]))

    def _push(
        self, kind: str, client: str, seed: int, *, bad: bool, again: bool, epoch: int, sequence: int = 0
    ) -> Receipt:
        parameter_set, stream = self.engine.get(kind), object()
        if epoch < 0:
            epoch = next((each.epoch for each in self.state(kind).sessions if each.client_id == client), 0)
        session = parameter_set.open(client, epoch, stream)
        gradients, declared = {}, []
        for tensor in parameter_set.spec.tensors:
            rows = None
            if tensor.name in parameter_set.spec.tables:
                rows = np.array([seed % 50, (7 * seed) % 50, seed % 9], np.int64)
                tensor = replace(tensor, shape=(3, *tensor.shape[1:]))
            gradients[tensor.name] = gradient(parameter_set.spec, tensor.name, seed, tensor.shape)
            declared.append(Declared(tensor, rows=rows))
        if bad:
            gradients["b"][0] = np.nan
        push = parameter_set.begin(sequence or session.last_sequence + (not again), declared)
        for payload in pack(
            (k, array.reshape(-1).view(np.uint8).data, 4) for k, array in enumerate(gradients.values())
        ):
            push.add(payload.runs, payload.buffer, replace=False)
        push.finish()
        receipt, _ = parameter_set.push(session, stream, push, pull=False)
        return receipt

    def update(self, kind: str, lr: float) -> None:
        """Change a learning rate."""
        changes = encode_changes({"default": {"lr": lr}})
        self.service.call("UpdateParameterSet", pb.UpdateParameterSetRequest(id=kind, hyperparameters=changes))

    def checkpoint(self, kind: str) -> None:
        """Write a checkpoint."""
        self.service.call("CheckpointParameterSet", pb.CheckpointParameterSetRequest(id=kind))

    def delete(self, kind: str) -> None:
        """Delete a set."""
        self.service.call("DeleteParameterSet", pb.DeleteParameterSetRequest(id=kind))

    def rewind(self, kind: str, version: int) -> None:
        """Let a set be what it was; raises VersionNotKept."""
        self.service.call("RewindParameterSet", pb.RewindParameterSetRequest(id=kind, version=version))

    def sync(self) -> None:
        """What the schedule's thread does all the time."""
        for keeper in self.directory.keepers:
            keeper.sync_if_due()

    def state(self, kind: str) -> State:
        """All that a set is."""
        return self.engine.get(kind).capture()

    def sets(self) -> dict[str, ParameterSet]:
        """The sets that there are."""
        return {each.spec.id: each for each in self.engine.list()}

    def stop(self) -> None:
        """Stop as a server does, after a last checkpoint."""
        self.engine.drain()
        self.service.checkpoint_all()
        self.abandon()

    def abandon(self) -> None:
        """Let go of files and threads; nothing that matters is written."""
        self.directory.close()
        self.engine.close()

    def die(self) -> None:
        """Be gone as a process that was killed: nothing is written, and the lock is free."""
        self.directory._lock.close()
        self.engine.close()


def gradient(spec: ParameterSetSpec, tensor: str, seed: int, shape: tuple[int, ...] | None = None) -> Array:
    """Elements that follow from the numbers given."""
    place = [each.name for each in spec.tensors].index(tensor)
    shape = spec.sent[place].shape if shape is None else shape
    return np.random.default_rng([seed, place]).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Print:
    """A fingerprint: two states that have the same have the same bits, and have taken in the same pushes."""

    event: int
    content: bytes


def fingerprint(state: State, *, everywhere: bool = False) -> Print:
    """The fingerprint of a state without what a restart changes; or what another run of the same has in common with it."""
    pushed = sorted((each for each in state.sessions if each.receipts), key=lambda each: each.client_id)
    bare = replace(state, arenas={}, sessions=pushed, forgotten=0, position=replace(state.position, incarnation=1))
    with mock.patch.object(manifest.metadata, "version", return_value=""):  # which reads files
        record = json.loads(manifest.to_bytes(manifest.Manifest(bare, {})).splitlines()[0])
    if everywhere:
        record["create_time"] = ""
        for session in record["sessions"]:
            session["epoch"] = 0
            for _, receipt, _ in session["receipts"]:
                receipt["position"]["incarnation"] = ""
    found = hashlib.blake2b(json.dumps(record, sort_keys=True).encode())
    arrays = itertools.chain.from_iterable(each.values() for each in state.entries().values())
    for array in [*arrays, *state.key_arrays.values()]:
        found.update(np.ascontiguousarray(array).tobytes())
    return Print(state.events, found.digest())
