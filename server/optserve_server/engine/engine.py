"""All parameter sets of a server, by id."""

import itertools
import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from optserve._errors import (
    InvalidHyperparameter,
    InvalidTensor,
    InvalidTransform,
    ParameterSetExists,
    ParameterSetNotFound,
    ServerBusy,
    SpecificationMismatch,
)
from optserve._specification import Holds, ParameterSetSpec, StateFormat, TensorSpec
from optserve._transforms import REFUSE
from optserve_server.engine import clipping, slot_formats
from optserve_server.engine.buffers import Allocate, private
from optserve_server.engine.outlines import Start
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.pipeline import gathers, slot_layouts
from optserve_server.engine.rows import check_transforms
from optserve_server.engine.rules import rule_for
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import Threads


class Engine:
    """Parameter sets by id, the threads that update them, and where their parameters' memory comes from."""

    def __init__(self, threads: int | None = None, allocate: Allocate = private) -> None:
        self._allocate = allocate
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
            "tensors", "optimizer", "groups", "holds", "guard", "policy", "transforms", "state", "tables", "journal",
        ):  # fmt: skip
            expected, came = getattr(present.spec, name), getattr(spec, name)
            if expected != came:
                if name == "tensors":
                    expected, came = _first_difference(expected, came)
                raise SpecificationMismatch(
                    f"parameter set {spec.id!r} exists with other {name}: expected {expected}; got {came}"
                )
        return present

    def check(self, spec: ParameterSetSpec) -> None:
        """Raises InvalidHyperparameter, InvalidTransform or InvalidTensor for what a set can't do with what it holds or
        measures."""
        rule, transforms = rule_for(spec.optimizer), spec.transforms
        if spec.holds is Holds.MOMENTS and rule.reads_parameters:
            raise InvalidHyperparameter(
                f"parameter set {spec.id!r}: expected an optimizer that only adds steps to parameters, in a set that does not "
                f"hold them; {spec.optimizer.rule} reads them. Let the server hold the parameters, or choose another"
            )
        if spec.holds is Holds.MOMENTS and transforms.reads_parameters:
            raise InvalidTransform(
                f"parameter set {spec.id!r}: averages, lookahead and adaptive clipping read the parameters; expected a set "
                "that holds them. Let the server hold the parameters, or leave these out"
            )
        if not spec.guard and (clipping.reads_norms(transforms.clip) or transforms.nonfinite != REFUSE):
            raise InvalidTransform(
                f"parameter set {spec.id!r}: clipping by norm and skipping what is not finite need the guard, which reads "
                "gradients first; expected guard=True with them"
            )
        if spec.tables:
            check_transforms(spec)
            if spec.holds is Holds.MOMENTS or not rule.lazy:
                raise InvalidHyperparameter(
                    f"parameter set {spec.id!r}: tables need a set that holds parameters and a rule that leaves rows without a "
                    f"gradient alone; expected SGD without momentum, Adagrad, RowWiseAdagrad, SparseAdam or FTRL; got "
                    f"{spec.optimizer.rule}"
                )
        if transforms.average is not None and rule.evaluation:
            raise InvalidTransform(
                f"parameter set {spec.id!r}: {spec.optimizer.rule} keeps parameters to evaluate itself; expected no average "
                "beside it"
            )
        if spec.state is not StateFormat.FULL:
            slot_formats.check(spec)

    def check_room(self, spec: ParameterSetSpec) -> None:
        """Raises InvalidTensor for a set that could never fit into this machine's memory."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        layout = slot_formats.layout(spec)
        arenas = [layout, *slot_layouts(spec, layout).values(), *([layout] if gathers(spec) else [])]
        needed = sum(each.nbytes for each in arenas)
        if needed > memory:
            raise InvalidTensor(
                f"parameter set {spec.id!r}: expected parameters and state to fit into {memory:,} bytes of memory; they "
                f"take {needed:,}"
            )

    def stage(self, tensors: Sequence[TensorSpec]) -> Staging:
        """Room for tensors on their way in."""
        return Staging(tensors, self.threads)

    def new(self, spec: ParameterSetSpec) -> ParameterSet:
        """A set that is not here yet, to be filled and then added; raises ServerBusy."""
        try:
            return ParameterSet(spec, _new_incarnation(), self.threads, self._allocate)
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
