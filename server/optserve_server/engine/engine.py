"""All parameter sets of a server, by id."""

import itertools
import math
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from optserve._errors import (
    ParameterSetExists,
    ParameterSetNotFound,
    ServerBusy,
    SpecificationMismatch,
)
from optserve._specification import Holds, ParameterSetSpec, TensorSpec
from optserve_server.engine.buffers import Allocate, private
from optserve_server.engine.outlines import Start
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import Threads


class Engine:
    """Parameter sets by id, the threads that update them, where their parameters' memory comes from, and for how many seconds
    nothing may be heard of a worker until it is counted as gone."""

    def __init__(self, threads: int | None = None, allocate: Allocate = private, lease: float = math.inf) -> None:
        self._allocate = allocate
        self._lease = lease
        self.threads = Threads(threads)
        self._sets: dict[str, ParameterSet] = {}
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, "optserve-compiler")

    def get(self, set_id: str) -> ParameterSet:
        """The set of that id; raises ParameterSetNotFound."""
        try:
            return self._sets[set_id]
        except KeyError:
            known = ", ".join(repr(each) for each in sorted(self._sets)[:10]) or "none"
            raise ParameterSetNotFound(
                f"expected the id of a parameter set on this server ({known}); got {set_id!r}"
            ) from None

    def list(self) -> list[ParameterSet]:
        """All sets, ordered by id."""
        return [present for _, present in sorted(self._sets.copy().items())]

    def existing(self, spec: ParameterSetSpec, *, exist_ok: bool) -> ParameterSet | None:
        """The set of the specification's id, if any; raises ParameterSetExists, or SpecificationMismatch with `exist_ok`."""
        present = self._sets.get(spec.id)
        if present is None:
            return None
        if not exist_ok:
            raise ParameterSetExists(
                f"parameter set {spec.id!r} exists, at version {present.position.version}; delete it, choose another id, or "
                "pass exist_ok=True to attach to it"
            )
        for name in (
            "tensors", "optimizer", "groups", "holds", "guard", "policy", "transforms", "state", "tables", "journal", "pushes",
            "buffers",
        ):  # fmt: skip
            expected, came = getattr(present.spec, name), getattr(spec, name)
            if expected != came:
                if name == "tensors":
                    expected, came = _first_difference(expected, came)
                raise SpecificationMismatch(
                    f"parameter set {spec.id!r} exists with other {name}: expected {expected}; got {came}"
                )
        return present

    def stage(self, tensors: Sequence[TensorSpec]) -> Staging:
        """Room for tensors on their way in."""
        return Staging(tensors, self.threads)

    def new(self, spec: ParameterSetSpec) -> ParameterSet:
        """A set that is not here yet, to be filled and then added; raises ServerBusy."""
        try:
            return ParameterSet(spec, _new_incarnation(), self.threads, self._allocate, self._lease)
        except (MemoryError, OSError):
            raise ServerBusy(
                f"there is no memory for parameter set {spec.id!r}; delete others, or make it smaller"
            ) from None

    def create(self, spec: ParameterSetSpec, values: Staging, start: Start | None = None) -> ParameterSet:
        """A new set, to be added, with those initial values, or what came for its start; raises ServerBusy."""
        created = self.new(spec)
        if start is not None:
            created.resume(start, values)
        elif spec.holds is Holds.PARAMETERS:
            created.load(values)
        created.compile()
        return created

    def compile_beside(self, parameter_set: ParameterSet) -> None:
        """Compile a set's loops in a thread, while it is being read from a disk."""
        self._compiler.submit(parameter_set.compile)

    def add(self, parameter_set: ParameterSet) -> None:
        """Let a set be here, instead of another of its id, if there is one."""
        with self._lock:
            self._sets[parameter_set.spec.id] = parameter_set

    def delete(self, set_id: str) -> None:
        """Remove a set; raises ParameterSetNotFound."""
        with self._lock:
            self.get(set_id).delete()
            del self._sets[set_id]

    def drain(self) -> None:
        """Let no worker wait for others any more."""
        for each in self.list():
            each.drain()

    def close(self) -> None:
        """Wait for running updates and end the threads."""
        self._compiler.shutdown(cancel_futures=True)
        self.threads.close()


def _first_difference(expected: Sequence[TensorSpec], came: Sequence[TensorSpec]) -> tuple[str, str]:
    for left, right in itertools.zip_longest(expected, came):
        if left != right:
            return str(left or f"{len(expected)} tensors"), str(right or f"{len(came)} tensors")
    return "", ""


def _new_incarnation() -> int:
    """Random, so that two servers that never met don't issue the same; never 0, which stands for none."""
    return secrets.randbits(63) | 1
