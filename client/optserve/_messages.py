"""SDK values to protobuf messages and back: the control part of the wire. Tensor bytes are in `_wire`."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from optserve._dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from optserve._errors import (
    STATUS_NUMBERS,
    InvalidArgument,
    InvalidHyperparameter,
    InvalidState,
    InvalidTensor,
    InvalidTransform,
    Refusal,
)
from optserve._policy_messages import decode_policy, encode_policy, seconds_of, set_seconds
from optserve._results import (
    Change,
    Description,
    Durability,
    GroupDescription,
    Outcome,
    Position,
    Receipt,
    Summary,
    Worker,
)
from optserve._rows import Constant, Indices, Initial, Normal, Uniform, decode_rows, encode_rows
from optserve._specification import Holds, Journal, ParameterSetSpec, Pushes, StateFormat, TensorSpec
from optserve._state import MOST, Outline, Part
from optserve._transforms import (
    EMA,
    REFUSE,
    SWA,
    Average,
    Clip,
    ClipAdaptive,
    ClipGlobalNorm,
    ClipNorm,
    ClipValue,
    Lookahead,
    SkipNonFinite,
    Transforms,
)
from optserve._treatments import Treatment
from optserve.formats import BFloat16, Float16, Format, Int8, TopK
from optserve.optim import Group, Optimizer, from_hyperparameters
from optserve.optim._optimizer import as_number
from optserve.schedules import Schedule, from_arguments
from optserve.v1 import optimizer_pb2, parameter_set_pb2, state_pb2, step_pb2, tensor_pb2, transforms_pb2

T = TypeVar("T")

LARGEST_SCHEDULE = 1024  # bytes; 1000 changes, of every hyperparameter each, fit into a message

_ENCODINGS = {
    type(None): tensor_pb2.ENCODING_UNSPECIFIED,
    BFloat16: tensor_pb2.ENCODING_BFLOAT16,
    Float16: tensor_pb2.ENCODING_FLOAT16,
    Int8: tensor_pb2.ENCODING_INT8,
    TopK: tensor_pb2.ENCODING_TOP_K,
}
_STATUS_NAMES = {number: name for name, number in STATUS_NUMBERS.items()}
_HOLDS = {Holds.PARAMETERS: parameter_set_pb2.HOLDS_PARAMETERS, Holds.MOMENTS: parameter_set_pb2.HOLDS_MOMENTS}
_STATES = {
    StateFormat.FULL: parameter_set_pb2.STATE_FORMAT_FULL,
    StateFormat.BFLOAT16: parameter_set_pb2.STATE_FORMAT_BFLOAT16,
    StateFormat.INT8: parameter_set_pb2.STATE_FORMAT_INT8,
}
_JOURNALS = {
    Journal.OFF: parameter_set_pb2.JOURNAL_OFF,
    Journal.EVERYSEC: parameter_set_pb2.JOURNAL_EVERYSEC,
    Journal.ALWAYS: parameter_set_pb2.JOURNAL_ALWAYS,
}
_PUSHES = {
    Pushes.GRADIENTS: parameter_set_pb2.PUSHES_GRADIENTS,
    Pushes.DELTAS: parameter_set_pb2.PUSHES_DELTAS,
    Pushes.PARAMETERS: parameter_set_pb2.PUSHES_PARAMETERS,
}
_TREATMENTS = {
    Treatment.AVERAGE: parameter_set_pb2.TREATMENT_AVERAGE,
    Treatment.REPLACE: parameter_set_pb2.TREATMENT_REPLACE,
    Treatment.FREEZE: parameter_set_pb2.TREATMENT_FREEZE,
    Treatment.OPTIMIZE: parameter_set_pb2.TREATMENT_OPTIMIZE,
}

_DTYPES = {
    FLOAT32: tensor_pb2.DTYPE_FLOAT32,
    FLOAT64: tensor_pb2.DTYPE_FLOAT64,
    BFLOAT16: tensor_pb2.DTYPE_BFLOAT16,
    FLOAT16: tensor_pb2.DTYPE_FLOAT16,
}
_OUTCOMES = {
    Outcome.APPLIED: step_pb2.OUTCOME_APPLIED,
    Outcome.ACCUMULATED: step_pb2.OUTCOME_ACCUMULATED,
    Outcome.SKIPPED: step_pb2.OUTCOME_SKIPPED,
    Outcome.REFUSED: step_pb2.OUTCOME_REFUSED,
    Outcome.DISCARDED: step_pb2.OUTCOME_DISCARDED,
}
_CONVENTIONS = {
    "torch": transforms_pb2.CONVENTION_TORCH,
    "optax": transforms_pb2.CONVENTION_OPTAX,
    "keras": transforms_pb2.CONVENTION_KERAS,
}
_DURABILITY = {
    Durability.MEMORY: parameter_set_pb2.DURABILITY_MEMORY,
    Durability.JOURNAL: parameter_set_pb2.DURABILITY_JOURNAL,
    Durability.CHECKPOINT: parameter_set_pb2.DURABILITY_CHECKPOINT,
}


def encode_value(value: Any) -> optimizer_pb2.Value:
    """A hyperparameter's value as a message; raises InvalidHyperparameter for a type that does not travel."""
    match as_number(value):
        case None:
            return optimizer_pb2.Value(null="NULL_VALUE")
        case bool(flag):
            return optimizer_pb2.Value(boolean=flag)
        case int(number) if -(2**63) <= number < 2**63:
            return optimizer_pb2.Value(integer=number)
        case float() | np.floating() as number:
            return optimizer_pb2.Value(number=float(number))
        case str():
            return optimizer_pb2.Value(text=value)
        case list() | tuple():
            return optimizer_pb2.Value(list=optimizer_pb2.ValueList(values=map(encode_value, value)))
        case Schedule():
            return optimizer_pb2.Value(schedule=encode_schedule(value))
    raise InvalidHyperparameter(
        f"expected a number, a flag, a text, a list of these, a schedule, or None; got {type(value).__name__}: {value!r}"
    )


def decode_value(message: optimizer_pb2.Value) -> Any:
    """A hyperparameter's value from its message; an empty message is None. Raises InvalidHyperparameter for a schedule."""
    match message.WhichOneof("kind"):
        case "list":
            return [decode_value(value) for value in message.list.values]
        case "schedule":
            return decode_schedule(message.schedule)
        case None | "null":
            return None
        case kind:
            return getattr(message, kind)


def encode_values(values: Mapping[str, Any]) -> dict[str, optimizer_pb2.Value]:
    """Hyperparameters by name as messages; raises InvalidHyperparameter."""
    return {name: encode_value(value) for name, value in values.items()}


def decode_values(messages: Mapping[str, optimizer_pb2.Value]) -> dict[str, Any]:
    """Hyperparameters by name from their messages."""
    return {name: decode_value(message) for name, message in messages.items()}


def encode_schedule(schedule: Schedule) -> optimizer_pb2.Schedule:
    """A schedule as a message; raises InvalidHyperparameter if it is too large to travel."""
    return _bounded(optimizer_pb2.Schedule(name=type(schedule).__name__, arguments=encode_values(schedule.arguments)))


def decode_schedule(message: optimizer_pb2.Schedule) -> Schedule:
    """A schedule from its message; raises InvalidHyperparameter."""
    return from_arguments(message.name, decode_values(_bounded(message).arguments))


def encode_optimizer(optimizer: Optimizer) -> optimizer_pb2.Optimizer:
    """An optimizer with all of its hyperparameters as a message."""
    return optimizer_pb2.Optimizer(rule=optimizer.rule, hyperparameters=encode_values(optimizer.hyperparameters))


def decode_optimizer(message: optimizer_pb2.Optimizer) -> Optimizer:
    """An optimizer from its message; raises UnknownRule or InvalidHyperparameter."""
    return from_hyperparameters(message.rule, decode_values(message.hyperparameters))


def encode_changes(changes: Mapping[str, Mapping[str, Any]]) -> list[optimizer_pb2.GroupHyperparameters]:
    """New hyperparameters by group and name as messages; raises InvalidHyperparameter."""
    if not (isinstance(changes, Mapping) and all(isinstance(values, Mapping) for values in changes.values())):
        raise InvalidHyperparameter(
            f"expected hyperparameters by group and name, such as {{'default': {{'lr': 1e-4}}}}; got {changes!r}"
        )
    return [
        optimizer_pb2.GroupHyperparameters(group=group, hyperparameters=encode_values(values))
        for group, values in changes.items()
    ]


def decode_changes(messages: Iterable[optimizer_pb2.GroupHyperparameters]) -> dict[str, dict[str, Any]]:
    """New hyperparameters by group and name from their messages."""
    changes: dict[str, dict[str, Any]] = {}
    for message in messages:
        changes.setdefault(message.group or Group.DEFAULT, {}).update(decode_values(message.hyperparameters))
    return changes


def encode_change(change: Change) -> optimizer_pb2.Change:
    """A change that was made as a message."""
    return optimizer_pb2.Change(
        version=change.version, group=change.group, hyperparameters=encode_values(change.values)
    )


def decode_change(message: optimizer_pb2.Change) -> Change:
    """A change that was made from its message."""
    values = decode_values(message.hyperparameters)
    in_force = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Change(message.version, message.group, in_force)


def encode_tensors(tensors: Sequence[TensorSpec]) -> list[tensor_pb2.TensorSpec]:
    """Tensor specifications as messages."""
    return [tensor_pb2.TensorSpec(name=each.name, dtype=_DTYPES[each.dtype], shape=each.shape) for each in tensors]


def decode_tensor(message: tensor_pb2.TensorSpec) -> TensorSpec:
    """A tensor's specification from its message; raises InvalidName or InvalidTensor."""
    return TensorSpec(message.name, _decode_dtype(message.dtype), tuple(message.shape))


def encode_dtype(dtype: DType) -> tensor_pb2.DType:
    """An element type's number."""
    return _DTYPES[dtype]


def decode_smaller_dtype(message: tensor_pb2.DType) -> DType | None:
    """What a pull wants larger elements rounded to, if anything; raises InvalidTensor."""
    if message == tensor_pb2.DTYPE_UNSPECIFIED:
        return None
    dtype = _decode_dtype(message)
    if not dtype.is_half:
        raise InvalidTensor(f"expected a pull's dtype to be bfloat16 or float16; got {dtype.name}")
    return dtype


def encode_format(format: Format | None) -> tuple[tensor_pb2.Encoding, float]:
    """A format as its encoding and fraction."""
    fraction = format.fraction if isinstance(format, TopK) else 0.0
    return _ENCODINGS[type(format)], fraction


def decode_format(encoding: tensor_pb2.Encoding, fraction: float) -> Format | None:
    """A format from its encoding and fraction; raises InvalidArgument."""
    kinds = {number: kind for kind, number in _ENCODINGS.items()}
    if encoding not in kinds:
        raise InvalidArgument(f"expected an encoding of 0 to {max(kinds)}; got {encoding}")
    kind = kinds[encoding]
    if kind is type(None):
        return None
    return TopK(fraction) if kind is TopK else cast("type[Format]", kind)()


def encode_pushed_tensor(
    spec: TensorSpec, *, is_parameter: bool, format: Format | None, rows: Indices | None
) -> step_pb2.PushedTensor:
    """A tensor that is pushed as a message."""
    role = step_pb2.ROLE_PARAMETER if is_parameter else step_pb2.ROLE_GRADIENT
    encoding, fraction = encode_format(format)
    (tensor,) = encode_tensors([spec])
    encoded = encode_rows(rows) if rows is not None else None
    return step_pb2.PushedTensor(spec=tensor, role=role, encoding=encoding, fraction=fraction, rows=encoded)


def decode_pushed_tensor(message: step_pb2.PushedTensor) -> tuple[TensorSpec, bool, Format | None, Indices | None]:
    """Specification of a tensor that is pushed, whether it is a parameter, its format and its rows; raises InvalidArgument."""
    if message.role not in (step_pb2.ROLE_UNSPECIFIED, step_pb2.ROLE_GRADIENT, step_pb2.ROLE_PARAMETER):
        raise InvalidArgument(f"expected a role of 0, 1 or 2; got {message.role}")
    return (
        decode_tensor(message.spec),
        message.role == step_pb2.ROLE_PARAMETER,
        decode_format(message.encoding, message.fraction),
        decode_rows(message.rows) if message.HasField("rows") else None,
    )


def encode_spec(spec: ParameterSetSpec) -> parameter_set_pb2.ParameterSetSpec:
    """A parameter set's specification as a message."""
    return parameter_set_pb2.ParameterSetSpec(
        id=spec.id,
        tensors=encode_tensors(spec.tensors),
        optimizer=encode_optimizer(spec.optimizer),
        groups=[
            optimizer_pb2.Group(
                name=group.name, tensors=group.tensors, hyperparameters=encode_values(group.hyperparameters)
            )
            for group in spec.groups
        ],
        holds=_HOLDS[spec.holds],
        unguarded=not spec.guard,
        policy=encode_policy(spec.policy),
        transforms=_encode_transforms(spec.transforms),
        tables={name: _encode_initial(initial) for name, initial in spec.tables.items()},
        state=_STATES[spec.state],
        journal=_JOURNALS[spec.journal],
        pushes=_PUSHES[spec.pushes],
        buffers={pattern: _TREATMENTS[treatment] for pattern, treatment in spec.buffers.items()},
    )


def decode_spec(message: parameter_set_pb2.ParameterSetSpec) -> ParameterSetSpec:
    """A parameter set's specification from its message; raises InvalidArgument kinds."""
    return ParameterSetSpec(
        id=message.id,
        tensors=tuple(map(decode_tensor, message.tensors)),
        optimizer=decode_optimizer(message.optimizer),
        groups=tuple(
            Group(group.name, *group.tensors, **decode_values(group.hyperparameters)) for group in message.groups
        ),
        holds=decode_holds(message.holds),
        guard=not message.unguarded,
        policy=decode_policy(message.policy),
        transforms=_decode_transforms(message.transforms),
        tables={name: _decode_initial(initial) for name, initial in message.tables.items()},
        state=_decode_choice("state", _STATES, StateFormat.FULL, message.state),
        journal=_decode_choice("journal", _JOURNALS, Journal.OFF, message.journal),
        pushes=_decode_choice("pushes", _PUSHES, Pushes.GRADIENTS, message.pushes),
        buffers={
            pattern: _decode_choice("a treatment", _TREATMENTS, Treatment.OPTIMIZE, each)
            for pattern, each in message.buffers.items()
        },
    )


def encode_position(position: Position) -> parameter_set_pb2.Position:
    """A position as a message."""
    return parameter_set_pb2.Position(
        incarnation=position.incarnation, version=position.version, durable_version=position.durable_version
    )


def decode_position(message: parameter_set_pb2.Position) -> Position:
    """A position from its message."""
    return Position(message.incarnation, message.version, message.durable_version)


def encode_refusal(refusal: Refusal) -> step_pb2.Refusal:
    """A refusal as a message."""
    return step_pb2.Refusal(code=STATUS_NUMBERS[refusal.code], reason=refusal.reason, message=refusal.message)


def decode_refusal(message: step_pb2.Refusal) -> Refusal:
    """A refusal from its message."""
    return Refusal(_STATUS_NAMES.get(message.code, "UNKNOWN"), message.reason, message.message)


def encode_receipt(receipt: Receipt) -> step_pb2.Receipt:
    """A receipt as a message."""
    message = step_pb2.Receipt(
        sequence=receipt.sequence,
        position=encode_position(receipt.position),
        outcome=_OUTCOMES[receipt.outcome],
        duplicate=receipt.duplicate,
        staleness=receipt.staleness,
        gradient_norm=receipt.gradient_norm,
        learning_rates=receipt.learning_rates,
        durability=_DURABILITY[receipt.durability],
        durable_sequence=receipt.durable_sequence,
    )
    if refusal := receipt.refusal:
        message.refusal.CopyFrom(encode_refusal(refusal))
    return message


def decode_receipt(message: step_pb2.Receipt) -> Receipt:
    """A receipt from its message."""
    return Receipt(
        sequence=message.sequence,
        position=decode_position(message.position),
        outcome=Outcome(message.outcome),
        duplicate=message.duplicate,
        staleness=message.staleness if message.HasField("staleness") else None,
        gradient_norm=message.gradient_norm,
        learning_rates=dict(message.learning_rates),
        durability=Durability(message.durability or Durability.MEMORY),
        refusal=decode_refusal(message.refusal) if message.HasField("refusal") else None,
        durable_sequence=message.durable_sequence,
    )


def encode_description(description: Description) -> parameter_set_pb2.ParameterSet:
    """A parameter set's description as a message."""
    message = parameter_set_pb2.ParameterSet(
        spec=encode_spec(description.spec),
        position=encode_position(description.position),
        groups=encode_group_states(description.groups),
        state_bytes=description.state_bytes,
        element_count=description.element_count,
        changes=map(encode_change, description.changes),
        policy=encode_policy(description.policy),
        staleness=description.staleness,
    )
    message.create_time.FromDatetime(description.create_time)
    return message


def decode_description(message: parameter_set_pb2.ParameterSet) -> Description:
    """A parameter set's description from its message."""
    return Description(
        spec=decode_spec(message.spec),
        position=decode_position(message.position),
        groups=decode_group_states(message.groups),
        create_time=message.create_time.ToDatetime(datetime.UTC),
        state_bytes=message.state_bytes,
        element_count=message.element_count,
        changes=tuple(map(decode_change, message.changes)),
        policy=decode_policy(message.policy),
        staleness=dict(sorted(message.staleness.items())),
    )


def encode_group_states(groups: Iterable[GroupDescription]) -> list[parameter_set_pb2.GroupState]:
    """Groups with the hyperparameters in force as messages."""
    return [
        parameter_set_pb2.GroupState(
            name=group.name,
            tensors=group.tensors,
            optimizer=encode_optimizer(group.optimizer),
            schedules={name: encode_schedule(schedule) for name, schedule in group.schedules.items()},
        )
        for group in groups
    ]


def decode_group_states(messages: Iterable[parameter_set_pb2.GroupState]) -> tuple[GroupDescription, ...]:
    """Groups with the hyperparameters in force from their messages."""
    return tuple(
        GroupDescription(
            group.name,
            tuple(group.tensors),
            decode_optimizer(group.optimizer),
            {name: decode_schedule(schedule) for name, schedule in group.schedules.items()},
        )
        for group in messages
    )


def encode_outline(outline: Outline, tensors: Sequence[TensorSpec]) -> state_pb2.State:
    """A state's outline as a message."""
    return state_pb2.State(
        version=outline.version,
        steps=outline.steps,
        memory=[
            state_pb2.TensorMemory(name=name, tensors=values, values=values.values())
            for name, values in outline.memory.items()
        ],
        group_memory=[
            state_pb2.GroupMemory(group=group, values=values) for group, values in outline.group_memory.items()
        ],
        parts=[_encode_part(part, tensors) for part in outline.parts],
        accumulated=outline.accumulated,
        skipped=outline.skipped,
        samples=outline.samples,
        divisor=outline.divisor,
    )


def decode_outline(message: state_pb2.State, tensors: Sequence[TensorSpec]) -> Outline:
    """A state's outline from its message; raises InvalidState for what is not one of these tensors."""
    for count in (message.version, message.accumulated, message.skipped, *message.steps):
        if count > MOST:
            raise InvalidState(f"expected at most 2**53 updates or pushes; got {count}")
    return Outline(
        version=message.version,
        steps=tuple(message.steps),
        memory={
            each.name: dict(zip(_decode_indices(each.tensors, tensors, len(each.values)), each.values, strict=True))
            for each in message.memory
        },
        group_memory={each.group: dict(each.values) for each in message.group_memory},
        parts=tuple(_decode_part(part, tensors) for part in message.parts),
        accumulated=message.accumulated,
        skipped=message.skipped,
        samples=message.samples,
        divisor=message.divisor,
    )


def encode_summary(summary: Summary) -> parameter_set_pb2.ParameterSetSummary:
    """A parameter set's entry in a list as a message."""
    message = parameter_set_pb2.ParameterSetSummary(
        id=summary.id,
        rule=summary.rule,
        holds=_HOLDS[summary.holds],
        position=encode_position(summary.position),
        tensor_count=summary.tensor_count,
        element_count=summary.element_count,
        state_bytes=summary.state_bytes,
        journal=_JOURNALS[summary.journal],
    )
    message.create_time.FromDatetime(summary.create_time)
    return message


def decode_summary(message: parameter_set_pb2.ParameterSetSummary) -> Summary:
    """A parameter set's entry in a list from its message."""
    return Summary(
        id=message.id,
        rule=message.rule,
        holds=decode_holds(message.holds),
        position=decode_position(message.position),
        tensor_count=message.tensor_count,
        element_count=message.element_count,
        state_bytes=message.state_bytes,
        create_time=message.create_time.ToDatetime(datetime.UTC),
        journal=_decode_choice("journal", _JOURNALS, Journal.OFF, message.journal),
    )


def encode_worker(worker: Worker) -> parameter_set_pb2.Worker:
    """A member of a set as a message."""
    message = parameter_set_pb2.Worker(
        client_id=worker.client_id,
        pushes=worker.pushes,
        staleness=worker.staleness,
        waiting=worker.waiting,
        quarantined=worker.quarantined,
    )
    message.join_time.FromDatetime(worker.join_time)
    set_seconds(message.idle, worker.idle)
    return message


def decode_worker(message: parameter_set_pb2.Worker) -> Worker:
    """A member of a set from its message."""
    return Worker(
        client_id=message.client_id,
        join_time=message.join_time.ToDatetime(datetime.UTC),
        idle=seconds_of(message.idle),
        pushes=message.pushes,
        staleness=message.staleness if message.HasField("staleness") else None,
        waiting=message.waiting,
        quarantined=message.quarantined,
    )


def _bounded(message: optimizer_pb2.Schedule) -> optimizer_pb2.Schedule:
    if (size := message.ByteSize()) > LARGEST_SCHEDULE:
        raise InvalidHyperparameter(
            f"expected a schedule of at most {LARGEST_SCHEDULE} bytes, some 50 boundaries; got {message.name} of {size}"
        )
    return message


def _encode_transforms(transforms: Transforms) -> transforms_pb2.Transforms:
    message = transforms_pb2.Transforms(accumulate=transforms.accumulate)
    if isinstance(transforms.nonfinite, SkipNonFinite):
        message.skip_nonfinite.at_most = transforms.nonfinite.at_most or 0
    if transforms.clip is not None:
        message.clip.CopyFrom(_encode_clip(transforms.clip))
    if transforms.lookahead is not None:
        message.lookahead.every, message.lookahead.alpha = transforms.lookahead.every, transforms.lookahead.alpha
    match transforms.average:
        case EMA(decay):
            message.average.ema_decay = decay
        case SWA(start, every):
            message.average.swa.start, message.average.swa.every = start, every
    return message


def _decode_transforms(message: transforms_pb2.Transforms) -> Transforms:
    skips, lookahead = message.HasField("skip_nonfinite"), message.lookahead
    return Transforms(
        nonfinite=SkipNonFinite(message.skip_nonfinite.at_most or None) if skips else REFUSE,
        accumulate=message.accumulate or 1,
        clip=_decode_clip(message.clip) if message.HasField("clip") else None,
        lookahead=Lookahead(lookahead.every, lookahead.alpha) if message.HasField("lookahead") else None,
        average=_decode_average(message.average) if message.HasField("average") else None,
    )


def _encode_clip(clip: Clip) -> transforms_pb2.Clip:
    match clip:
        case ClipGlobalNorm(largest, convention):
            return transforms_pb2.Clip(global_norm=largest, convention=_CONVENTIONS[convention])
        case ClipNorm(largest, convention):
            return transforms_pb2.Clip(norm=largest, convention=_CONVENTIONS[convention])
        case ClipValue(largest):
            return transforms_pb2.Clip(value=largest)
        case ClipAdaptive(clipping, eps, convention):
            return transforms_pb2.Clip(adaptive=clipping, eps=eps, convention=_CONVENTIONS[convention])


def _decode_clip(message: transforms_pb2.Clip) -> Clip:
    conventions = {number: name for name, number in _CONVENTIONS.items()}
    convention = conventions.get(message.convention, "torch")
    match message.WhichOneof("kind"):
        case "global_norm":
            return ClipGlobalNorm(message.global_norm, convention)
        case "norm":
            return ClipNorm(message.norm, convention)
        case "value":
            return ClipValue(message.value)
        case "adaptive":
            return ClipAdaptive(message.adaptive, message.eps, convention)
        case _:
            raise InvalidTransform("expected a clip to be global_norm, norm, value or adaptive; got none of them")


def _encode_initial(initial: Initial) -> parameter_set_pb2.Initial:
    match initial:
        case Constant(value):
            return parameter_set_pb2.Initial(constant=value)
        case Uniform(low, high, seed):
            return parameter_set_pb2.Initial(uniform=parameter_set_pb2.Uniform(low=low, high=high, seed=seed))
        case Normal(std, seed):
            return parameter_set_pb2.Initial(normal=parameter_set_pb2.Normal(std=std, seed=seed))


def _decode_initial(message: parameter_set_pb2.Initial) -> Initial:
    match message.WhichOneof("kind"):
        case "uniform":
            return Uniform(message.uniform.low, message.uniform.high, message.uniform.seed)
        case "normal":
            return Normal(message.normal.std, message.normal.seed)
        case "constant":
            return Constant(message.constant)
        case _:
            raise InvalidTensor("expected a table's initial rows as constant, uniform or normal; got none of them")


def _decode_average(message: transforms_pb2.Average) -> Average:
    match message.WhichOneof("kind"):
        case "ema_decay":
            return EMA(message.ema_decay)
        case "swa":
            return SWA(message.swa.start, message.swa.every)
        case _:
            raise InvalidTransform("expected an average to be ema_decay or swa; got neither")


def _encode_part(part: Part, tensors: Sequence[TensorSpec]) -> state_pb2.StatePart:
    own = tuple(tensors[index].shape for index in part.tensors)
    shapes = [] if part.shapes == own else [state_pb2.StateShape(sizes=shape) for shape in part.shapes]
    return state_pb2.StatePart(name=part.name, tensors=part.tensors, shapes=shapes)


def _decode_part(message: state_pb2.StatePart, tensors: Sequence[TensorSpec]) -> Part:
    indices = _decode_indices(message.tensors, tensors, len(message.shapes) or len(message.tensors))
    shapes = tuple(tuple(shape.sizes) for shape in message.shapes)
    return Part(message.name, indices, shapes or tuple(tensors[index].shape for index in indices))


def _decode_indices(indices: Sequence[int], tensors: Sequence[TensorSpec], count: int) -> tuple[int, ...]:
    if len(indices) != count or len(set(indices)) != count or max(indices, default=0) >= len(tensors):
        raise InvalidState(
            f"expected {count} tensors among the set's {len(tensors)}, each once; got {len(indices)} indices"
            + (f" up to {max(indices)}" if indices else "")
        )
    return tuple(indices)


def _decode_dtype(value: int) -> DType:
    for dtype, number in _DTYPES.items():
        if number == value:
            return dtype
    raise InvalidTensor(f"expected a DType among {', '.join(dtype.name for dtype in _DTYPES)}; got code {value}")


def decode_holds(value: int) -> Holds:
    return _decode_choice("holds", _HOLDS, Holds.PARAMETERS, value)


def _decode_choice(name: str, numbers: Mapping[T, int], default: T, value: int) -> T:
    """What a number of an enum stands for, 0 for the default; raises InvalidArgument for one that is not there."""
    meanings = {0: default} | {number: meaning for meaning, number in numbers.items()}
    if value not in meanings:
        *most, last = meanings
        raise InvalidArgument(f"expected {name} to be {', '.join(map(str, most))} or {last}; got {value}")
    return meanings[value]
