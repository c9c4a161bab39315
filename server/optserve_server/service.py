"""The service: decode, call the engine, encode. Errors are raised; `interceptor` turns them into status codes."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import structlog

from optserve import optim
from optserve._errors import (
    InvalidArgument,
    InvalidChunk,
    InvalidPolicy,
    InvalidTensor,
    MessageOrder,
    NoDataDirectory,
    ServerUnavailable,
    StorageFailed,
)
from optserve._messages import (
    decode_changes,
    decode_optimizer,
    decode_outline,
    decode_spec,
    encode_description,
    encode_group_states,
    encode_outline,
    encode_position,
    encode_spec,
    encode_summary,
    encode_value,
    encode_worker,
)
from optserve._policies import Policy, Sync
from optserve._policy_messages import decode_policy
from optserve._specification import Holds, Journal, ParameterSetSpec, TensorSpec, check_set_id
from optserve._wire import Frame, bytes_of, pack
from optserve.v1 import optimizer_pb2
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.standby_pb2 import FollowRequest, FollowResponse
from optserve.v1.step_pb2 import StepRequest, StepResponse
from optserve_server.engine import checks, forks, outlines
from optserve_server.engine.engine import Engine
from optserve_server.engine.outlines import Start
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.rules import known, rule_for
from optserve_server.engine.staging import Staging
from optserve_server.gate import Gate
from optserve_server.pair import Pair
from optserve_server.replication.follower import Follower
from optserve_server.shared_memory import SharedMemory
from optserve_server.stalls import Watch
from optserve_server.step import StepStream
from optserve_server.storage.checkpoint import WITHOUT_STATE, Shared
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.schedule import Schedule

CreationFrames = Iterable[Frame[pb.CreateParameterSetRequest]]
ExportFrames = Iterator[Frame[pb.ExportParameterSetResponse]]

log = structlog.get_logger()

ALWAYS_ANSWERED = frozenset({"GetServerStatus", "PromoteServer"})
LARGEST_SPECIFICATION = 4 << 20  # bytes; descriptions, which repeat names, stay below the 16 MiB of a message


class OptimizerService:
    """The methods of `optimizer_service.proto`, free of any transport."""

    def __init__(
        self,
        engine: Engine,
        storage: DataDirectory | None = None,
        *,
        max_streams: int = sys.maxsize,
        max_bytes_in_flight: int = sys.maxsize,
        shared_memory: SharedMemory | None = None,
        pair: Pair | None = None,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._storing = threading.Lock()  # a checkpoint and a deletion of one set must not overtake each other
        self._shared_memory = shared_memory
        self._primary = pair.primary if pair is not None else None
        self._pair = pair
        self.streams = Gate("streams", max_streams)
        self.pushes = Gate("bytes of tensors in flight", max_bytes_in_flight)
        self._methods: dict[str, Callable[[Any], Any]] = {
            "CreateParameterSet": self.create_parameter_set,
            "GetParameterSet": self.get_parameter_set,
            "ExportParameterSet": self.export_parameter_set,
            "ListParameterSets": self.list_parameter_sets,
            "UpdateParameterSet": self.update_parameter_set,
            "ListWorkers": self.list_workers,
            "DeleteParameterSet": self.delete_parameter_set,
            "CheckpointParameterSet": self.checkpoint_parameter_set,
            "RewindParameterSet": self.rewind_parameter_set,
            "ForkParameterSet": self.fork_parameter_set,
            "GetServerStatus": self.get_server_status,
            "PromoteServer": self.promote_server,
            "ListRules": self.list_rules,
        }
        self.schedule: Schedule | None = None
        self.status = pb.GetServerStatusResponse(phase=pb.PHASE_SERVING)

    def call(self, method: str, request: Any) -> Any:
        """Call a method that is not Step, by its name in the contract; one that answers with a stream gives its frames."""
        if method in ALWAYS_ANSWERED:
            return self._methods[method](request)
        self._check_serving()
        response = self._methods[method](request)
        self._check_serving()  # what happened must not be acknowledged if another server may serve by now
        return response

    def step(self, frames: Iterator[Frame[StepRequest]], watch: Watch | None = None) -> Generator[Frame[StepResponse]]:
        """Serve one Step stream."""
        self._check_serving()
        with self.streams.room():
            stream = StepStream(self._engine, self.pushes, watch or Watch(), self._shared_memory)
            yield from stream.serve(frames)

    def _check_serving(self) -> None:
        status = self.status
        if status.phase == pb.PHASE_RESTORING:
            raise ServerUnavailable(
                f"the server is restoring: {status.bytes_read:,} of {status.bytes_total:,} bytes read; try again later"
            )
        if status.phase == pb.PHASE_STANDBY:
            raise ServerUnavailable(
                f"this is a standby of {status.primary}; ask the primary, or promote this server if that is gone "
                "(optserve promote)"
            )
        if self._primary is not None:
            self._primary.check()

    @property
    def _following(self) -> Follower | None:
        """What follows the primary, if this is a standby."""
        standby = self._pair is not None and self.status.phase == pb.PHASE_STANDBY
        return self._pair.follower if self._pair is not None and standby else None

    def follow(self, requests: Iterator[FollowRequest]) -> Iterator[FollowResponse]:
        """Serve one stream of a standby."""
        phase = self.status.phase
        if self._primary is None:
            raise NoDataDirectory("expected a primary started with --data-dir: a standby gets what that has")
        if phase not in (pb.PHASE_SERVING, pb.PHASE_STANDBY):
            raise ServerUnavailable(f"the server does not serve: {pb.Phase.Name(phase)}; try again later")
        yield from self._primary.follow(requests)

    def get_server_status(self, request: pb.GetServerStatusRequest) -> pb.GetServerStatusResponse:
        status = pb.GetServerStatusResponse()
        status.CopyFrom(self.status)
        if (follower := self._following) is not None:
            status.promotable, status.lag = follower.promotable, follower.lag
        elif self._primary is not None and status.phase == pb.PHASE_SERVING:
            status.standby, status.lag = self._primary.standby, self._primary.lag
            if self._primary.deposed or self._primary.lapsed:
                status.phase = pb.PHASE_DEPOSED if self._primary.deposed else pb.PHASE_LAPSED
        return status

    def promote_server(self, request: pb.PromoteServerRequest) -> pb.PromoteServerResponse:
        if (follower := self._following) is not None:
            return pb.PromoteServerResponse(promoted=True, deposed=follower.promote())
        claimed = self._primary is not None and self._primary.claim()
        return pb.PromoteServerResponse(promoted=claimed)

    def create_parameter_set(self, frames: CreationFrames) -> pb.CreateParameterSetResponse:
        with self.streams.room():  # an upload is a stream, and occupies a thread as one
            return self._create(iter(frames))

    def _create(self, frames: Iterator[Frame[pb.CreateParameterSetRequest]]) -> pb.CreateParameterSetResponse:
        first = next(frames, None)
        if first is None or not first.message.HasField("spec"):
            raise MessageOrder("expected `spec` in the first message of CreateParameterSet")
        if (size := first.message.spec.ByteSize()) > LARGEST_SPECIFICATION:
            raise InvalidTensor(f"expected a specification of at most {LARGEST_SPECIFICATION} bytes; got {size}")
        spec, exist_ok = decode_spec(first.message.spec), first.message.exist_ok
        if present := self._engine.existing(spec, exist_ok=exist_ok):
            return pb.CreateParameterSetResponse(parameter_set=encode_description(present.describe()), created=False)
        self._check_free(spec)
        start: Start | None = None
        tensors: Sequence[TensorSpec] = spec.sent if spec.holds is Holds.PARAMETERS else ()
        if first.message.HasField("state"):
            outline = decode_outline(first.message.state, spec.tensors)
            start, tensors = outlines.start(spec, outline), outline.elements(spec.tensors)
        with self.pushes.room(max(1, sum(tensor.nbytes for tensor in tensors))):
            values = self._receive(tensors, first, frames)
            made, created = self._add(self._engine.create(spec, values, start), exist_ok=exist_ok)
        return pb.CreateParameterSetResponse(parameter_set=encode_description(made.describe()), created=created)

    def _check_free(self, spec: ParameterSetSpec) -> None:
        """Raises ParameterSetExists or InvalidArgument kinds for a set that can't be here."""
        if self._storage is not None:
            self._storage.check_free(spec.id)
        elif spec.journal is not Journal.OFF:
            raise NoDataDirectory(
                f"parameter set {spec.id!r}: expected a server started with --data-dir, for a journal; this one has none"
            )
        checks.check(spec)
        checks.check_room(spec)
        self._check_policy(spec, spec.policy)

    def _add(self, created: ParameterSet, *, exist_ok: bool, shared: Shared | None = None) -> tuple[ParameterSet, bool]:
        """Let a set be here, and durable if it is to be, unless there is one of its id by now."""
        spec = created.spec
        with self._storing:
            if present := self._engine.existing(spec, exist_ok=exist_ok):
                return present, False
            if self._storage is not None:
                self._keep(self._storage, created, shared)
            self._engine.add(created)
        if self.schedule is not None:
            self.schedule.wake()
        return created, True

    def _keep(self, storage: DataDirectory, created: ParameterSet, shared: Shared | None) -> None:
        set_id = created.spec.id
        try:
            storage.add(created)
            if created.spec.journal is not Journal.OFF or shared is not None:
                storage.checkpoint(set_id, shared)  # from which the journal goes on
        except (OSError, StorageFailed) as error:
            with contextlib.suppress(StorageFailed):
                storage.delete(set_id)
            raise StorageFailed(f"parameter set {set_id!r} was not created: {error}") from error

    def _check_policy(self, spec: ParameterSetSpec, policy: Policy) -> None:
        """Raises InvalidPolicy if a round's pushes could never all be here."""
        if not isinstance(policy, Sync):
            return
        keeps = policy.keeps or spec.transforms.accumulate > 1
        workers, nbytes = policy.workers or 1, sum(tensor.nbytes for tensor in spec.tensors)
        for gate, each in ((self.streams, 1), (self.pushes, nbytes if keeps else 0)):
            if workers * each > gate.limit:
                raise InvalidPolicy(
                    f"parameter set {spec.id!r}: a round of {workers} workers takes {workers * each:,} {gate.what} at a time; "
                    f"expected at most {gate.limit:,}. Start the server with room for more, choose fewer workers, or a policy "
                    "that does not keep them all"
                )

    def _receive(
        self, tensors: Sequence[TensorSpec], first: Frame[pb.CreateParameterSetRequest], frames: CreationFrames
    ) -> Staging:
        """The initial values of a set, or the elements of its state, all of them."""
        values = self._engine.stage(tensors)
        for frame in itertools.chain((first,), frames) if first.payload else frames:
            if frame is not first and (frame.message.HasField("spec") or frame.message.HasField("state")):
                raise MessageOrder("expected `spec` and `state` in the first message only")
            if frame.payload is None:
                raise InvalidChunk("expected a chunk of initial values; got a message without one")
            values.add(frame.payload.runs, frame.payload.buffer, replace=frame.payload.replace)
        values.finish()
        return values

    def get_parameter_set(self, request: pb.GetParameterSetRequest) -> pb.GetParameterSetResponse:
        return pb.GetParameterSetResponse(parameter_set=encode_description(self._engine.get(request.id).describe()))

    def export_parameter_set(self, request: pb.ExportParameterSetRequest) -> ExportFrames:
        parameter_set = self._engine.get(request.id)
        outlines.check_movable(parameter_set.spec)
        with self.streams.room(), self.pushes.room(parameter_set.state_bytes):
            state = parameter_set.capture()
            outline, elements = outlines.outlined(state)
            spec = encode_spec(state.spec)
            groups = encode_group_states(state.groups)
            yield Frame(pb.ExportParameterSetResponse(spec=spec, groups=groups))
            yield Frame(pb.ExportParameterSetResponse(state=encode_outline(outline, state.spec.tensors)))
            for payload in pack((k, bytes_of(each), each.itemsize) for k, each in enumerate(elements)):
                yield Frame(pb.ExportParameterSetResponse(), payload)

    def list_parameter_sets(self, request: pb.ListParameterSetsRequest) -> pb.ListParameterSetsResponse:
        summaries = [encode_summary(each.summarize()) for each in self._engine.list()]
        return pb.ListParameterSetsResponse(parameter_sets=summaries)

    def update_parameter_set(self, request: pb.UpdateParameterSetRequest) -> pb.UpdateParameterSetResponse:
        parameter_set = self._engine.get(request.id)
        policy = decode_policy(request.policy) if request.HasField("policy") else None
        if policy is not None:
            self._check_policy(parameter_set.spec, policy)
        parameter_set.update(decode_changes(request.hyperparameters), policy)
        return pb.UpdateParameterSetResponse(parameter_set=encode_description(parameter_set.describe()))

    def list_workers(self, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(workers=map(encode_worker, self._engine.get(request.id).workers()))

    def delete_parameter_set(self, request: pb.DeleteParameterSetRequest) -> pb.DeleteParameterSetResponse:
        with self._storing:
            self._engine.get(request.id)
            if self._storage is not None:
                self._storage.delete(request.id)
            self._engine.delete(request.id)
        return pb.DeleteParameterSetResponse()

    def checkpoint_parameter_set(self, request: pb.CheckpointParameterSetRequest) -> pb.CheckpointParameterSetResponse:
        parameter_set = self._engine.get(request.id)
        self._durable().checkpoint(request.id)
        return pb.CheckpointParameterSetResponse(position=encode_position(parameter_set.position))

    def rewind_parameter_set(self, request: pb.RewindParameterSetRequest) -> pb.RewindParameterSetResponse:
        storage = self._durable()
        if not request.HasField("version"):
            raise InvalidArgument("expected the version to go back to; got a request without one")
        with self._storing:
            self._engine.get(request.id)
            rewound = storage.rewind(self._engine, request.id, request.version)
        return pb.RewindParameterSetResponse(position=encode_position(rewound.position), rewinds=rewound.rewinds)

    def fork_parameter_set(self, request: pb.ForkParameterSetRequest) -> pb.ForkParameterSetResponse:
        source = self._engine.get(request.id)
        optimizer = decode_optimizer(request.optimizer) if request.HasField("optimizer") else None
        spec = forks.specification(source.spec, check_set_id(request.new_id), optimizer)
        self._engine.existing(spec, exist_ok=False)
        self._check_free(spec)
        version = request.version if request.HasField("version") else None
        shared: Shared | None = None
        if self._storage is None and version in (None, source.position.version):
            state = source.capture()
        else:
            earlier, shared = self._durable().earlier(self._engine, request.id, version)
            if shared is not None and not forks.keeps_state(source.spec, spec):
                shared = shared._replace(names=WITHOUT_STATE)
            state = earlier.capture()
            earlier.clear()
        forked, _ = self._add(forks.fork(self._engine, state, spec), exist_ok=False, shared=shared)
        return pb.ForkParameterSetResponse(parameter_set=encode_description(forked.describe()))

    def _durable(self) -> DataDirectory:
        if self._storage is None:
            raise NoDataDirectory("expected a server started with --data-dir; this one keeps everything in memory only")
        return self._storage

    def checkpoint_all(self) -> None:
        """Write every set that can be written; without a data directory, nothing."""
        for parameter_set in self._engine.list() if self._storage is not None else ():
            try:
                assert self._storage is not None
                self._storage.checkpoint(parameter_set.spec.id)
            except Exception as error:
                log.error("not written", parameter_set=parameter_set.spec.id, exc_info=error)

    def list_rules(self, request: pb.ListRulesRequest) -> pb.ListRulesResponse:
        return pb.ListRulesResponse(rules=[_describe(each) for each in known()])


def _describe(optimizer: type[optim.Optimizer]) -> optimizer_pb2.RuleDescription:
    summary, text = optim.documentation(optimizer)
    return optimizer_pb2.RuleDescription(
        rule=optimizer.__name__,
        summary=summary,
        documentation=text,
        hyperparameters=[
            optimizer_pb2.HyperparameterDescription(
                name=name,
                default_value=encode_value(default),
                documentation=described.documentation,
                live=described.live,
            )
            for name, described, default in optimizer.described()
        ],
        slots=rule_for(optimizer()).slots,
    )
