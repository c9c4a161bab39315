"""Updates by rules that need whole tensors: one call for the tensors of a group, on arrays of their shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optserve._specification import TensorSpec
from optserve.optim import Optimizer
from optserve_server.engine.arena import Arena, Layout
from optserve_server.engine.groups import TensorGroup
from optserve_server.engine.rows import SparseGradient
from optserve_server.engine.rules import Preparation, Tensor, TensorRule, preparation
from optserve_server.engine.staging import StagedTensor
from optserve_server.engine.threads import Threads
from optserve_server.engine.work import Arenas, Update, check_computable

Memories = Mapping[str, NDArray[np.float64]]  # of groups, by name


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a group: where it lies in the set's arenas and in those of its slots, and its update number."""

    spec: TensorSpec
    index: int
    t: int
    gradient: SparseGradient | None  # for some rows only; None: the gathered one


@dataclass(frozen=True, slots=True)
class GroupWork:
    """An update of a group's tensors by a rule, from gradients that were gathered in the arena."""

    rule: TensorRule
    optimizer: Optimizer
    preparation: Preparation
    members: Sequence[Member]
    memory: NDArray[np.float64]
    layout: Layout
    slots: Mapping[str, Layout]

    def run(self, arenas: Arenas, threads: Threads) -> None:
        with np.errstate(all="ignore"):  # what is not finite stays so, as in the loops
            whole = [self._whole(member, arenas) for member in self.members]
            tensors = [self._some_rows(*each) for each in zip(self.members, whole, strict=True)]
            for tensor in tensors:
                self._prepare(tensor)
            self.rule.update(self.optimizer, tensors, self.memory)
            for member, tensor, part in zip(self.members, whole, tensors, strict=True):
                if member.gradient is not None:
                    tensor.parameter[member.gradient.rows] = part.parameter
                    for name, slot in tensor.slots.items():
                        slot[member.gradient.rows] = part.slots[name]

    def _whole(self, member: Member, arenas: Arenas) -> Tensor:
        parameter = _array(arenas.after, self.layout, member)
        if arenas.before is not arenas.after:
            parameter[...] = _array(arenas.before, self.layout, member)
        slots = {
            name: _array(arenas.slots[name], layout, member, self.rule.slots[name](member.spec))
            for name, layout in self.slots.items()
        }
        return Tensor(parameter, _array(arenas.gradient, self.layout, member), slots, member.t)

    def _some_rows(self, member: Member, tensor: Tensor) -> Tensor:
        """Copies of the rows that have a gradient, if only some have one."""
        if member.gradient is None:
            return tensor
        rows, values = member.gradient.rows, member.gradient.values
        slots = {name: slot[rows] for name, slot in tensor.slots.items()}
        return Tensor(tensor.parameter[rows], values.reshape(-1, *tensor.parameter.shape[1:]), slots, tensor.t)

    def _prepare(self, tensor: Tensor) -> None:
        parameter, gradient = tensor.parameter, tensor.gradient
        scale, bound, l2, shrink = self.preparation
        if scale != 1:
            gradient *= scale
        if bound:
            np.clip(gradient, -bound, bound, out=gradient)
        if l2:
            gradient += l2 * parameter
        if shrink:
            parameter -= shrink * parameter


class WholePlanner:
    """Plans updates of one set by a rule for whole tensors."""

    def __init__(
        self, rule: TensorRule, tensors: Sequence[TensorSpec], layout: Layout, slots: Mapping[str, Layout], bound: float
    ) -> None:
        self._rule = rule
        self._tensors = tensors
        self._layout = layout
        self._slots = slots
        self._bound = bound

    def plan(
        self,
        groups: Sequence[TensorGroup],
        gradients: Mapping[int, StagedTensor],
        steps: NDArray[np.int64],
        memories: Memories,
        sparse: Mapping[int, SparseGradient],
    ) -> Update:
        """The update that gathered gradients of these tensors make, and sparse ones; changes nothing.

        Raises InvalidHyperparameter.
        """
        work = []
        for group in groups:
            members = [
                Member(self._tensors[index], index, int(steps[index]) + 1, sparse.get(index))
                for index in group.members
                if (index in gradients or index in sparse) and self._tensors[index].size
            ]
            prepared = preparation(group.optimizer, 1.0, self._bound)
            numbers = list(_numbers(group.optimizer.hyperparameters.values()))
            for member in members:
                check_computable((*prepared, *numbers), member.spec.dtype.compute)
            if members:
                work.append(
                    GroupWork(
                        self._rule, group.optimizer, prepared, members, memories[group.name], self._layout, self._slots
                    )
                )
        return Update(work, dict.fromkeys([*gradients, *sparse], ()))


def _numbers(values: Iterable[Any]) -> Iterator[float]:
    """Those among hyperparameters, of pairs and triples each."""
    for value in values:
        if isinstance(value, tuple):
            yield from _numbers(value)
        elif isinstance(value, float):
            yield value


def _array(arena: Arena, layout: Layout, member: Member, shape: tuple[int, ...] | None = None) -> NDArray[np.floating]:
    """A tensor's place in an arena as an array of its shape, or of another."""
    return layout.elements(arena, member.index).reshape(member.spec.shape if shape is None else shape)
