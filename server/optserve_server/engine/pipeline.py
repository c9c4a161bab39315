"""The pipeline of a set: what becomes of pushes, from their gradients to parameters, planned before anything changes.

mean over workers and pushes (`mean`), clipping (`clipping`), the rule (`update` or `whole`), averages (`averages`)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from optserve._errors import InvalidHyperparameter, TensorMismatch
from optserve._policies import Sync
from optserve._specification import Holds, ParameterSetSpec
from optserve._state import AVERAGE
from optserve._transforms import ClipAdaptive
from optserve.optim import Group
from optserve_server.engine import averages, clipping, rows, slot_formats
from optserve_server.engine.arena import Arena, Layout, Place
from optserve_server.engine.clipping import Clipping
from optserve_server.engine.groups import TensorGroup
from optserve_server.engine.loops import guard_loop
from optserve_server.engine.mean import Gathered, Gradients, Mean, dtype_of
from optserve_server.engine.push import Push
from optserve_server.engine.rows import Carried, SparseGradient, merged
from optserve_server.engine.rules import Memory, TensorRule, preparation, rule_for
from optserve_server.engine.slot_formats import EncodedLayout
from optserve_server.engine.tables import NewRows, Table
from optserve_server.engine.threads import Threads
from optserve_server.engine.update import Factors, Planner, Read
from optserve_server.engine.whole import WholePlanner
from optserve_server.engine.work import COMPUTED, Arenas, Update, Work


@dataclass(slots=True)
class Progress:
    """How far a set has come, beside its arenas.

    `steps`, int64 [tensors], are the updates that each tensor has had, `memory` the rule's values for each, `group_memory`
    its values for each group, float64; `accumulated` says how many pushes wait in the mean for more, and `accumulating`
    which tensors they have; `skipped` counts those that were not finite since the last that was.
    """

    steps: NDArray[np.int64]
    memory: list[Memory]
    group_memory: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    accumulated: int = 0
    accumulating: tuple[int, ...] = ()
    skipped: int = 0

    def copy(self) -> "Progress":
        """The same in memory of its own."""
        return replace(
            self,
            steps=self.steps.copy(),
            memory=list(self.memory),
            group_memory={name: values.copy() for name, values in self.group_memory.items()},
        )


class Pipeline:
    """Plans what pushes do to a set."""

    def __init__(self, spec: ParameterSetSpec, layout: Layout) -> None:
        self.rule = rule_for(spec.optimizer)
        self.slots = slot_layouts(spec, layout)
        self.mean = Mean(spec.tensors, layout) if gathers(spec) else None
        self._spec = spec
        self._layout = layout
        self._moments_only = spec.holds is Holds.MOMENTS
        self._loops: Planner | None = None
        self._whole: WholePlanner | None = None
        bound = clipping.bound(spec.transforms.clip)
        if isinstance(self.rule, TensorRule):
            own = {name: self.slots[name] for name in self.rule.slots}
            self._whole = WholePlanner(self.rule, spec.tensors, layout, own, bound)
        else:
            self._loops = Planner(
                self.rule, layout, moments_only=self._moments_only, bound=bound, formats=slot_formats.chosen(spec)
            )
        self.tables = {
            index: Table(tensor, spec.tables[tensor.name])
            for index, tensor in enumerate(spec.tensors)
            if tensor.name in spec.tables
        }
        self._averages = bool(averages.slots(spec.transforms))
        self._compiled: set[Read] = set()

    def begin(self) -> Progress:
        """Where a new set stands."""
        initial = tuple(self.rule.memory.values())
        if isinstance(self.rule, TensorRule):
            names = [group.name for group in self._spec.groups]
            memories = {name: np.array(initial) for name in (Group.DEFAULT, *names)}
            return Progress(np.zeros(len(self._spec.tensors), np.int64), [()] * len(self._spec.tensors), memories)
        return Progress(np.zeros(len(self._spec.tensors), np.int64), [initial] * len(self._spec.tensors))

    def allocate(self) -> dict[str, Arena]:
        """The slots of a new set; those that begin as the parameters do not yet."""
        initial = self.rule.initial(self._spec.optimizer.at(0))
        slots = {name: layout.allocate() for name, layout in self.slots.items()}
        for name, value in initial.items():
            for index, place in enumerate(self.slots[name].places):
                if value and index not in self.tables:  # whose rows come later
                    slots[name][place.compute][place.start : place.start + place.size] = value
        return slots

    def used(self, name: str) -> list[Place] | None:
        """What of an arena is in use, in a set with tables, whose rows are not all there; None: all of it."""
        if not self.tables:
            return None
        places = list(self.slots.get(name, self._layout).places)
        for index, table in self.tables.items():
            place = places[index]
            places[index] = replace(place, size=place.size // table.tensor.shape[0] * len(table.keys))
        return places

    def clear(self) -> None:
        """Let go of memory."""
        if self.mean is not None:
            self.mean.arena.clear()

    @property
    def copies(self) -> tuple[str, ...]:
        """Slots that begin as the parameters."""
        return (*self.rule.copies, *averages.slots(self._spec.transforms))

    @property
    def evaluation(self) -> str:
        """The slot with the parameters to evaluate, if there is one."""
        return AVERAGE if self._spec.transforms.average is not None else self.rule.evaluation

    def plan(
        self, groups: Sequence[TensorGroup], progress: Progress, pushes: Sequence[Push], updated: set[int]
    ) -> Update:
        """What pushes that belong together do next, the progress included; raises InvalidArgument kinds.

        An update without memories is one of the mean alone.
        """
        first = pushes[0]
        if self.mean is None:
            gathered = Gathered(first.gradients, self._sparse(pushes, groups), first.parameters)
            return self._rule_update(groups, progress, gathered, self._factors(first), updated)
        gradients, gather = self._mean(progress, pushes)
        gathered = Gathered(gradients, self._sparse(pushes, groups), first.parameters)
        return replace(self.plan_gathered(groups, progress, gathered, updated), gather=gather, gathered=gathered)

    def plan_gathered(
        self, groups: Sequence[TensorGroup], progress: Progress, gathered: Gathered, updated: set[int]
    ) -> Update:
        """As `plan`, for gradients that are in the mean's memory by the time that the update runs."""
        gradients, sparse = gathered.gradients, gathered.sparse
        factors = dict.fromkeys([*gradients, *sparse], 1.0)
        ruled = self._rule_update(groups, progress, gathered, factors, updated)
        if progress.accumulated + 1 < self._spec.transforms.accumulate:
            return Update((), {})
        clip = self._spec.transforms.clip
        if clip is None or clipping.bound(clip):
            return ruled
        return replace(ruled, work=[Clipping(clip, self._spec.tensors, gradients, self._layout, sparse), *ruled.work])

    def compile(self, push: Push, group: TensorGroup, arenas: Arenas) -> None:
        """Compile the loops that a push needs, by running them on nothing, unless that was done before."""
        if push.refusal is None:
            for dtype in push.sparse_dtypes:
                rows.compile(dtype)
                self.compile_for((COMPUTED[dtype.compute], None), group, arenas)
            parameters = push.parameters
            for index, gradient in push.gradients.items():
                parameter = parameters.get(index, gradient).spec.dtype
                self.compile_for((gradient.spec.dtype, parameter if self._moments_only else None), group, arenas)

    def compile_for(self, read: Read, group: TensorGroup, arenas: Arenas) -> None:
        """As `compile`, for gradients of a dtype (and parameters of one, in a set that holds moments only)."""
        if read in self._compiled:
            return
        alone = Threads(1)
        gradient = read[0]
        for dtype in filter(None, read):
            guard_loop(dtype)(np.empty((0, 4), np.int64), np.empty(0), np.empty(0, np.uint32))
        if self.mean is not None:
            self.mean.compile(gradient)
            gradient = dtype_of(gradient)
            guard_loop(gradient)(np.empty((0, 4), np.int64), np.empty(0), np.empty(0, np.uint32))
        if self._loops is not None:
            self._loops.compile((gradient, read[1]), group, arenas, alone)
        if self._averages:
            averages.compile(self._layout)
        self._compiled.add(read)

    def _factors(self, push: Push) -> Factors:
        """What the gradients of a push are multiplied by."""
        scale = 1.0 / push.loss_scale
        if not clipping.reads_norms(self._spec.transforms.clip):
            return dict.fromkeys([*push.gradients, *push.sparse], scale)
        norms = {index: norm * scale for index, norm in push.norms.items()}
        return {index: factor * scale for index, factor in clipping.factors(self._spec.transforms.clip, norms).items()}

    def _mean(self, progress: Progress, pushes: Sequence[Push]) -> tuple[Gradients, Sequence[Work]]:
        """The mean of pushes and of those that were accumulated before, and the work of making it."""
        assert self.mean is not None
        if progress.accumulated and tuple(pushes[0].gradients) != progress.accumulating:
            raise TensorMismatch(
                f"set {self._spec.id!r}: expected gradients of the {len(progress.accumulating)} tensors that the pushes before "
                f"had, which this one is averaged with; got {len(pushes[0].gradients)}, or others. Push zeros for a tensor "
                "that is not used"
            )
        share = 1.0 / (len(pushes) * self._spec.transforms.accumulate)
        weights = [share / push.loss_scale for push in pushes]
        return self.mean.plan([push.gradients for push in pushes], weights, begun=progress.accumulated > 0)

    def _sparse(self, pushes: Sequence[Push], groups: Sequence[TensorGroup]) -> dict[int, SparseGradient]:
        """The row-sparse gradients of pushes, made one."""
        first = pushes[0].sparse
        if not first:
            return {}
        self._check_sparse(first, groups)
        if self.mean is None:
            return dict(first)
        weights = [1.0 / (len(pushes) * push.loss_scale) for push in pushes]
        return {index: merged([push.sparse[index] for push in pushes], weights) for index in first}

    def _rule_update(
        self,
        groups: Sequence[TensorGroup],
        progress: Progress,
        gathered: Gathered,
        factors: Factors,
        updated: set[int],
    ) -> Update:
        """The rule's update, each gradient times its factor, and what follows it."""
        gradients, parameters = gathered.gradients, gathered.parameters
        self._check_parameters(gradients, parameters, groups)
        sparse, work = self._located(gathered.sparse, updated)
        if self._whole is not None:
            ruled = self._whole.plan(groups, gradients, progress.steps, progress.group_memory, sparse)
        else:
            assert self._loops is not None
            ruled = self._loops.plan(
                groups, gradients, parameters, progress.steps, progress.memory, factors, updated, sparse
            )
        after = averages.plan(self._spec.transforms, self._layout, gradients, progress.steps) if self._averages else ()
        return replace(ruled, work=[*work, *ruled.work, *after])

    def _located(
        self, gradients: Mapping[int, SparseGradient], updated: set[int]
    ) -> tuple[dict[int, SparseGradient], list[Work]]:
        """Row-sparse gradients with rows for their keys, and what must happen before they are applied."""
        if not gradients:
            return {}, []
        sparse = dict(gradients)
        work: list[Work] = [Carried([index for index in sparse if index not in updated], self._layout)]
        for index in sparse.keys() & self.tables.keys():
            table, keys = self.tables[index], sparse[index].rows
            found = table.find(keys)
            new = found < 0
            table.check_room(int(new.sum()))
            found[new] = len(table.keys) + np.arange(new.sum())
            sparse[index] = SparseGradient(found, sparse[index].values)
            fills = self.rule.initial(self._spec.optimizer.at(0))
            work.append(NewRows(table, keys[new], index, self._layout, self.slots, fills))
        return sparse, work

    def _check_sparse(self, sparse: Iterable[int], groups: Sequence[TensorGroup]) -> None:
        """Raises TensorMismatch or InvalidHyperparameter where rows without a gradient would change, too."""
        if not self.rule.lazy:
            raise TensorMismatch(
                f"set {self._spec.id!r}: {self._spec.optimizer.rule} changes rows that have no gradient as well; expected a "
                "dense gradient. Push all rows, or use SGD without momentum, Adagrad, RowWiseAdagrad, SparseAdam or FTRL"
            )
        for group in groups:
            prepared = preparation(group.optimizer)
            if (prepared.l2 or prepared.shrink) and any(index in group.members for index in sparse):
                raise InvalidHyperparameter(
                    f"set {self._spec.id!r}: weight decay changes rows that have no gradient as well; expected weight_decay=0 "
                    f"in group {group.name!r} for row-sparse gradients, or dense ones"
                )

    def _check_parameters(self, gradients: Gradients, parameters: Gradients, groups: Sequence[TensorGroup]) -> None:
        """In a set that holds moments only, weight decay needs the caller's parameters."""
        if not self._moments_only:
            return
        for group in groups:
            if group.optimizer.hyperparameters.get("weight_decay", 0.0) == 0.0:
                continue
            for index in group.members:
                if index in gradients and index not in parameters:
                    raise TensorMismatch(
                        f"set {self._spec.id!r} holds moments only and weight decay reads the parameters: expected those of "
                        f"{self._spec.tensors[index].name!r} beside its gradient; got none. Push parameters=..., or set "
                        "weight_decay=0"
                    )


def slot_layouts(spec: ParameterSetSpec, layout: Layout) -> dict[str, Layout]:
    """How each slot of a set is laid out, by name, in a set whose parameters are laid out in a certain way."""
    rule, averaged = rule_for(spec.optimizer), averages.slots(spec.transforms)
    if isinstance(rule, TensorRule):
        shaped = {
            name: Layout([replace(tensor, shape=shape(tensor)) for tensor in spec.tensors])
            for name, shape in rule.slots.items()
        }
        return shaped | dict.fromkeys(averaged, layout)
    encoded = {name: EncodedLayout(layout, format) for name, format in slot_formats.chosen(spec).items()}
    return dict.fromkeys((*rule.slots, *averaged), layout) | encoded


def slot_shapes(spec: ParameterSetSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The shape that each slot of a set has for each of its tensors, by the slot's name."""
    rule, averaged = rule_for(spec.optimizer), averages.slots(spec.transforms)
    own = tuple(tensor.shape for tensor in spec.tensors)
    if isinstance(rule, TensorRule):
        shaped = {name: tuple(map(shape, spec.tensors)) for name, shape in rule.slots.items()}
        return shaped | dict.fromkeys(averaged, own)
    return dict.fromkeys((*rule.slots, *averaged), own)


def gathers(spec: ParameterSetSpec) -> bool:
    """Whether gradients are made one in memory of the set, before they are read."""
    return (
        (isinstance(spec.policy, Sync) and spec.policy.workers > 1)
        or spec.transforms.accumulate > 1
        or isinstance(spec.transforms.clip, ClipAdaptive)
        or isinstance(rule_for(spec.optimizer), TensorRule)
    )
