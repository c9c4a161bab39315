"""Checks: what a set can't be or do, found out before it is there."""

import os

from optserve._errors import InvalidHyperparameter, InvalidPolicy, InvalidTensor, InvalidTransform
from optserve._policies import Buffered, Policy, Sync
from optserve._specification import Holds, ParameterSetSpec, Pushes, StateFormat
from optserve._transforms import REFUSE
from optserve_server.engine import clipping, slot_formats
from optserve_server.engine.loops import Compensation
from optserve_server.engine.pipeline import gathers, slot_layouts
from optserve_server.engine.rows import check_transforms
from optserve_server.engine.rules import rule_for
from optserve_server.engine.staleness import compensation


def check(spec: ParameterSetSpec) -> None:
    """Raises InvalidArgument kinds for what a set can't do with what it holds, measures or is pushed."""
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
    _check_pushes(spec)
    check_policy(spec, spec.policy)


def _check_pushes(spec: ParameterSetSpec) -> None:
    if spec.holds is Holds.MOMENTS and (spec.treatments or spec.pushes is Pushes.PARAMETERS):
        raise InvalidTensor(
            f"parameter set {spec.id!r} holds moments only: expected gradients or deltas of tensors that are optimized; got "
            f"pushes={spec.pushes.value!r} and buffers {dict(spec.buffers)}. Let the server hold the parameters"
        )
    tables = {index for index, tensor in enumerate(spec.tensors) if tensor.name in spec.tables}
    if tables & spec.treatments.keys() or (tables and spec.pushes is Pushes.PARAMETERS):
        raise InvalidTensor(
            f"parameter set {spec.id!r}: expected gradients or deltas of some rows of tables; got "
            f"pushes={spec.pushes.value!r} and buffers {dict(spec.buffers)}"
        )


def check_policy(spec: ParameterSetSpec, policy: Policy) -> None:
    """Raises InvalidPolicy for a policy that a set can't follow."""
    if isinstance(policy, Buffered) and spec.transforms.accumulate > 1:
        raise InvalidPolicy(
            f"parameter set {spec.id!r} accumulates {spec.transforms.accumulate} pushes: expected a policy that does not; "
            f"got {policy}. Create the set without accumulate, or choose Async()"
        )
    compensates = compensation(policy.staleness) is not Compensation.NONE
    if compensates and spec.holds is Holds.MOMENTS:
        raise InvalidPolicy(
            f"parameter set {spec.id!r} holds moments only: expected a staleness that does not read parameters; got "
            f"{policy.staleness}"
        )
    if spec.tables and (compensates or isinstance(policy, Buffered)):
        raise InvalidPolicy(
            f"parameter set {spec.id!r} has tables, of which some rows are pushed: expected a policy that does not look at "
            f"all rows; got {policy}"
        )
    if isinstance(policy, Sync) and spec.tables and policy.aggregation is not None:
        raise InvalidPolicy(
            f"parameter set {spec.id!r} has tables: expected the mean of rows; got {policy.aggregation}"
        )
    if isinstance(policy, Sync) and policy.quarantine is not None and not spec.guard:
        raise InvalidPolicy(
            f"parameter set {spec.id!r} trusts every worker: expected guard=True, which measures norms, for {policy.quarantine}"
        )


def check_room(spec: ParameterSetSpec) -> None:
    """Raises InvalidTensor for a set that could never fit into this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    layout = slot_formats.layout(spec)
    arenas = [layout, *slot_layouts(spec, layout).values(), *([layout] if gathers(spec, spec.policy) else [])]
    needed = sum(each.nbytes for each in arenas)
    if needed > memory:
        raise InvalidTensor(
            f"parameter set {spec.id!r}: expected parameters and state to fit into {memory:,} bytes of memory; they "
            f"take {needed:,}"
        )
