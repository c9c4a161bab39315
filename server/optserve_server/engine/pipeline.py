"""The pipeline of a set: what becomes of pushes, from their gradients to parameters, planned before anything changes.

mean over workers and pushes (`mean`), clipping (`clipping`), the rule (`update` or `whole`), averages (`averages`)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optserve._errors import InvalidHyperparameter, TensorMismatch
from optserve._policies import Buffered, Policy, Sync, in_rounds
from optserve._specification import Holds, ParameterSetSpec, Pushes
from optserve._state import AVERAGE
from optserve._transforms import ClipAdaptive, Transforms
from optserve._treatments import Treatment
from optserve.aggregation import Aggregation
from optserve.optim import Group
from optserve.staleness import DelayCompensation, GapAware
from optserve_server.engine import aggregation, averages, bases, clipping, rows, slot_formats
from optserve_server.engine.arena import Arena, Layout, Place
from optserve_server.engine.bases import Bases
from optserve_server.engine.clipping import Clipping
from optserve_server.engine.folding import Folded
from optserve_server.engine.groups import TensorGroup
from optserve_server.engine.loops import Compensation, guard_loop
from optserve_server.engine.mean import Compensated, Gathered, Gradients, Mean, Replaced, Term, dtype_of
from optserve_server.engine.push import Push
from optserve_server.engine.rows import Carried, SparseGradient, merged
from optserve_server.engine.rules import Memory, TensorRule, preparation, rule_for
from optserve_server.engine.slot_formats import EncodedLayout
from optserve_server.engine.staleness import compensation, learning_rate_divisor, weight
from optserve_server.engine.tables import NewRows, Table
from optserve_server.engine.threads import Threads
from optserve_server.engine.update import Factors, Planner, Read
from optserve_server.engine.whole import WholePlanner
from optserve_server.engine.work import COMPUTED, Arenas, Update, Work


@dataclass(slots=True)
class Progress:
    """How far a set has come, beside its arenas.

    `steps`, int64 [tensors], are the updates that each tensor has had, `memory` the rule's values for each, `group_memory`
    its values for each group, float64; `accumulated` says how many pushes wait in the mean for more, `accumulating` which
    tensors they have, and `samples` how many samples, each divided by `divisor`; `skipped` counts those that were not finite
    since the last that was. `changed`, int64 [tensors], is the version at which each tensor last changed, as far as that is
    known, and `staleness` counts pushes by theirs.
    """

    steps: NDArray[np.int64]
    memory: list[Memory]
    group_memory: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    accumulated: int = 0
    accumulating: tuple[int, ...] = ()
    skipped: int = 0
    samples: float = 0.0
    divisor: float = 0.0
    staleness: dict[int, int] = field(default_factory=dict)
    changed: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.changed = np.zeros(len(self.steps), np.int64)

    def copy(self) -> "Progress":
        """The same in memory of its own."""
        copied = replace(
            self,
            steps=self.steps.copy(),
            memory=list(self.memory),
            group_memory={name: values.copy() for name, values in self.group_memory.items()},
            staleness=self.staleness.copy(),
        )
        copied.changed[:] = self.changed
        return copied


class Pushed(NamedTuple):
    """A push as a part of an update: its staleness, and the parameters that it was computed at, None if those are of no
    matter."""

    push: Push
    staleness: int | None = None
    base: Arena | None = None


class Pipeline:
    """Plans what pushes do to a set."""

    def __init__(self, spec: ParameterSetSpec, layout: Layout) -> None:
        self.rule = rule_for(spec.optimizer)
        self.slots = slot_layouts(spec, layout)
        self.mean: Mean | None = None
        self.bases = Bases(layout)
        self._spec = spec
        self._layout = layout
        self._treatments = spec.treatments
        self._compiled: set[Read] = set()
        self.make_room(spec.policy)
        self.follow(spec.policy)
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

    def make_room(self, policy: Policy, *, accumulated: int = 0) -> None:
        """Have memory for a mean, if a policy needs one, or pushes that were accumulated before; raises MemoryError."""
        if self.mean is None and (accumulated or gathers(self._spec, policy)):
            self.mean = Mean(self._spec.tensors, self._layout, self._treatments)

    def follow(self, policy: Policy, *, accumulated: int = 0) -> None:
        """Plan as a policy has it from now on; there is room for it."""
        self.policy = policy
        self._compiled = set()
        self._gathers = gathers(self._spec, policy)
        if not self.keeps_bases:
            self.bases.clear()
        self.bases.measure(policy.staleness)
        self._trigger = trigger_of(policy, self._spec.transforms)
        self.settle(accumulated)

    def settle(self, accumulated: int) -> None:
        """Let go of a mean that no policy needs any more, and in which nothing waits."""
        if not self._gathers and not accumulated:
            self.mean = None

    @property
    def accumulates(self) -> bool:
        """Whether pushes wait in the mean for later ones."""
        return self._trigger != Trigger(1)

    @property
    def rounds(self) -> bool:
        """Whether pushes of several workers are made one at a time."""
        return in_rounds(self.policy) is not None

    @property
    def keeps_bases(self) -> bool:
        """Whether parameters that workers have read are looked at when they push."""
        compensated = compensation(self.policy.staleness) is not Compensation.NONE
        return compensated or self._spec.pushes is Pushes.PARAMETERS

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
        self.bases.clear()
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
        self,
        groups: Sequence[TensorGroup],
        progress: Progress,
        pushes: Sequence[Pushed],
        updated: set[int],
        folded: Folded | None = None,
    ) -> Update:
        """What pushes that belong together do next, the progress included; raises InvalidArgument kinds.

        What was `folded` is in the mean's memory already. An update without memories is one of the mean alone.
        """
        first = pushes[0]
        if self.mean is None:
            gathered = Gathered(first.push.gradients, self._sparse(pushes, groups), first.push.parameters)
            return self._rule_update(groups, progress, gathered, self._factors(first), updated)
        if folded is not None:
            return self._plan_folded(groups, progress, first.push, folded, updated)
        self._check_added(first.push)
        self._check_accumulating(progress, first.push)
        samples, terms = self._terms(progress, pushes)
        gradients, gather = self._gather(terms, progress, samples)
        total, divisor = progress.samples + samples, self.divisor(progress, samples)
        sparse = self._sparse(pushes, groups)
        filled = self._trigger.filled(progress.accumulated + 1, total)
        if filled and total != divisor:
            gather.append(self.mean.scaled(gradients, divisor / total, {}))
        gathered = Gathered(gradients, sparse, first.push.parameters)
        planned = self.plan_gathered(groups, progress, gathered, updated, filled=filled)
        return replace(planned, gather=gather, gathered=gathered, recorded=self.records, samples=total, divisor=divisor)

    def _gather(self, terms: Sequence[Term], progress: Progress, counted: float) -> tuple[Gradients, list[Work]]:
        assert self.mean is not None
        begun, compensated = progress.accumulated > 0, self._compensated
        if self._aggregation is None:
            return self.mean.plan(terms, begun=begun, compensated=compensated)
        share = counted / self.divisor(progress, counted)
        return self.mean.plan_apart(terms, self._aggregation, share, begun=begun, compensated=compensated)

    @property
    def _aggregation(self) -> Aggregation | None:
        return self.policy.aggregation if isinstance(self.policy, Sync) else None

    @property
    def records(self) -> bool:
        """Whether history keeps what pushes were made of, since they alone don't say it."""
        return self.rounds or self.keeps_bases

    def fold(self, pushed: Pushed, folded: Folded) -> tuple[Sequence[Work], dict[int, SparseGradient]]:
        """The work of adding a push to what was folded before, and the sparse gradients after it; raises InvalidArgument."""
        assert self.mean is not None
        push = pushed.push
        self._check_added(push)
        term = self._term(pushed, push.samples / folded.divisor)
        _, gather = self.mean.plan([term], begun=folded.first is not None, compensated=self._compensated)
        factor = term.weight * term.factor
        before = folded.sparse
        sparse = {
            index: merged([before[index], each], [1.0, factor]) if before else merged([each], [factor])
            for index, each in push.sparse.items()
        }
        return gather, sparse

    def _plan_folded(
        self, groups: Sequence[TensorGroup], progress: Progress, push: Push, folded: Folded, updated: set[int]
    ) -> Update:
        assert self.mean is not None
        assert folded.first is not None
        if folded.sparse:
            self._check_sparse(folded.sparse, groups)
        gradients = self.mean.at(self.added(push))
        gather: list[Work] = []
        if folded.samples != folded.divisor:
            gather.append(self.mean.scaled(gradients, folded.divisor / folded.samples, folded.sparse))
        gathered = Gathered(gradients, folded.sparse, folded.first.parameters)
        planned = self.plan_gathered(groups, progress, gathered, updated, filled=True)
        return replace(planned, gather=gather, gathered=gathered, recorded=True)

    def plan_gathered(
        self,
        groups: Sequence[TensorGroup],
        progress: Progress,
        gathered: Gathered,
        updated: set[int],
        *,
        filled: bool,
    ) -> Update:
        """As `plan`, for gradients that are in the mean's memory by the time that the update runs, if it does now."""
        optimized = {index: each for index, each in gathered.gradients.items() if index not in self._treatments}
        sparse = gathered.sparse
        factors = dict.fromkeys([*optimized, *sparse], 1.0)
        ruled = self._rule_update(groups, progress, replace(gathered, gradients=optimized), factors, updated)
        if not filled:
            return Update((), {})
        clip = self._spec.transforms.clip
        work = list(ruled.work)
        if clip is not None and not clipping.bound(clip):
            work.insert(0, Clipping(clip, self._spec.tensors, optimized, self._layout, sparse))
        values = [index for index in gathered.gradients if index in self._treatments]
        if values:
            work.append(Replaced(values, self._layout, self.copies))
        memories = {**ruled.memories, **{index: progress.memory[index] for index in values}}
        return replace(ruled, work=work, memories=memories)

    def added(self, push: Push) -> tuple[int, ...]:
        """The tensors that a push adds to a mean."""
        return tuple(
            index for index, sparse in push.covers if not sparse and self._treatments.get(index) is not Treatment.FREEZE
        )

    def samples_of(self, progress: Progress, samples: Sequence[float]) -> float:
        """What pushes that were decided on together count towards the next update: a round one, but beside others."""
        alike = not progress.accumulated or self._spec.transforms.accumulate > 1
        return 1.0 if self.rounds and alike else sum(samples)

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
        compiled, mean = self._compiled, self.mean  # as they are now: the policy may change meanwhile
        if read in compiled:
            return
        alone = Threads(1)
        gradient = read[0]
        for dtype in filter(None, read):
            guard_loop(dtype)(np.empty((0, 4), np.int64), np.empty(0), np.empty(0, np.uint32))
        if mean is not None:
            mean.compile(gradient)
            if (compensated := self._compensated) is not None:
                mean.compile_compensated(gradient, compensated)
            if (robust := self._aggregation) is not None:
                aggregation.compile(self._layout, robust)
            gradient = dtype_of(gradient)
            guard_loop(gradient)(np.empty((0, 4), np.int64), np.empty(0), np.empty(0, np.uint32))
        if self._loops is not None:
            self._loops.compile((gradient, read[1]), group, arenas, alone)
        if self._averages:
            averages.compile(self._layout)
        if isinstance(self.policy.staleness, GapAware):
            bases.compile(self._layout)
        compiled.add(read)

    def _factors(self, pushed: Pushed) -> Factors:
        """What the gradients of a push are multiplied by."""
        push, scale = pushed.push, self._factor(pushed.push)
        scale *= weight(self.policy.staleness, pushed.staleness, alone=True)
        if not clipping.reads_norms(self._spec.transforms.clip):
            return dict.fromkeys([*push.gradients, *push.sparse], scale)
        norms = {index: norm * abs(scale) for index, norm in push.norms.items()}
        return {index: factor * scale for index, factor in clipping.factors(self._spec.transforms.clip, norms).items()}

    def _factor(self, push: Push) -> float:
        """What makes gradients of what was pushed."""
        return (-1.0 if self._spec.pushes is Pushes.DELTAS else 1.0) / push.loss_scale

    @property
    def _compensated(self) -> Compensated | None:
        if not self.keeps_bases:
            return None
        differences = self._spec.pushes is Pushes.PARAMETERS
        choice, steps = self.policy.staleness, self.bases.steps
        match choice:
            case DelayCompensation(scale):
                return Compensated(Compensation.DELAY, scale, differences=differences)
            case GapAware():
                correction, squares = (steps.correction, steps.squares) if steps is not None else (0.0, None)
                return Compensated(Compensation.GAP, correction, squares, differences)
            case _:
                return Compensated(Compensation.NONE, 0.0, differences=differences)

    def _term(self, pushed: Pushed, share: float) -> Term:
        stale = weight(self.policy.staleness, pushed.staleness, alone=self._alone)
        return Term(pushed.push.gradients, share * stale, share, self._factor(pushed.push), pushed.base)

    def _terms(self, progress: Progress, pushes: Sequence[Pushed]) -> tuple[float, list[Term]]:
        """What each of some pushes adds to the mean, and how much all of them count."""
        samples = [each.push.samples for each in pushes]
        counted = self.samples_of(progress, samples)
        total, divisor = sum(samples) / counted, self.divisor(progress, counted)
        return counted, [self._term(each, n / total / divisor) for each, n in zip(pushes, samples, strict=True)]

    def divisor(self, progress: Progress, counted: float) -> float:
        """What each push is divided by as it is added to those that wait; the first of them counts so much."""
        return progress.divisor if progress.accumulated else self._trigger.divisor(counted)

    @property
    def _alone(self) -> bool:
        """Whether each push makes an update of its own."""
        return not self.rounds and self._trigger == Trigger(1)

    def learning_rate_divisor(self, stalenesses: Sequence[int | None]) -> int:
        """What the learning rate of an update is divided by, by the staleness of its pushes."""
        return learning_rate_divisor(self.policy.staleness, stalenesses[0], alone=self._alone)

    def _check_added(self, push: Push) -> None:
        """Raises TensorMismatch for a push of which nothing would be left."""
        if not self.added(push) and not push.sparse:
            raise TensorMismatch(
                f"set {self._spec.id!r}: expected at least one tensor that is not frozen; got {len(push.covers)} that are"
            )

    def _check_accumulating(self, progress: Progress, push: Push) -> None:
        """Raises TensorMismatch for a push that can't be averaged with those that were accumulated before."""
        if progress.accumulated and self.added(push) != progress.accumulating:
            raise TensorMismatch(
                f"set {self._spec.id!r}: expected gradients of the {len(progress.accumulating)} tensors that the pushes before "
                f"had, which this one is averaged with; got {len(self.added(push))}, or others. Push zeros for a tensor "
                "that is not used"
            )

    def _sparse(self, pushes: Sequence[Pushed], groups: Sequence[TensorGroup]) -> dict[int, SparseGradient]:
        """The row-sparse gradients of pushes, made one."""
        first = pushes[0].push.sparse
        if not first:
            return {}
        self._check_sparse(first, groups)
        if self.mean is None:
            return dict(first)
        total = sum(each.push.samples for each in pushes)
        terms = [self._term(each, each.push.samples / total) for each in pushes]
        weights = [term.weight * term.factor for term in terms]
        return {index: merged([each.push.sparse[index] for each in pushes], weights) for index in first}

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
        """Raises TensorMismatch or InvalidHyperparameter where rows without a gradient would change, or be looked at."""
        if buffers := [self._spec.tensors[index].name for index in sparse if index in self._treatments]:
            raise TensorMismatch(
                f"set {self._spec.id!r}: expected all values of {buffers[0]!r}, which no rule touches; got some rows"
            )
        if self._trigger != Trigger(1) or self.keeps_bases or self._aggregation is not None:
            raise TensorMismatch(
                f"set {self._spec.id!r}: its policy, {self.policy}, looks at all rows: expected a dense gradient; got a "
                "row-sparse one. Push all rows, or choose another policy"
            )
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


class Trigger(NamedTuple):
    """What makes an update of accumulated pushes: so many, or so many samples."""

    pushes: int = 0
    samples: float = 0.0

    def __str__(self) -> str:
        return f"{self.samples:g} samples" if self.samples else f"{self.pushes} pushes"

    def divisor(self, first: float) -> float:
        """What pushes are divided by as they are added up, so that their sum is about the mean, if all are like the first."""
        return max(self.samples, first) if self.samples else self.pushes * first

    def filled(self, pushes: int, samples: float) -> bool:
        """Whether so many make an update."""
        return pushes >= self.pushes if self.pushes else samples >= self.samples


def trigger_of(policy: Policy, transforms: Transforms) -> Trigger:
    """What makes an update by a policy and transforms."""
    if isinstance(policy, Buffered):
        return Trigger(pushes=policy.pushes or 0, samples=policy.samples or 0.0)
    return Trigger(pushes=transforms.accumulate)


def gathers(spec: ParameterSetSpec, policy: Policy) -> bool:
    """Whether gradients are made one in memory of the set, before they are read."""
    return (
        in_rounds(policy) is not None
        or trigger_of(policy, spec.transforms) != Trigger(1)
        or compensation(policy.staleness) is not Compensation.NONE
        or spec.pushes is Pushes.PARAMETERS
        or bool(spec.treatments)
        or isinstance(spec.transforms.clip, ClipAdaptive)
        or isinstance(rule_for(spec.optimizer), TensorRule)
    )
