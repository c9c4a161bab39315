"""The client: a connection, and the calls that are about parameter sets as a whole."""

import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from optserve._choice import Choice, Via
from optserve._errors import InvalidArgument, InvalidHyperparameter
from optserve._failover import connect_all
from optserve._heart import Heart
from optserve._identity import Identity
from optserve._messages import decode_holds, decode_position, decode_summary, encode_outline, encode_spec
from optserve._parameter_set import ParameterSet
from optserve._policies import ASYNC, Policy
from optserve._results import Position, Summary
from optserve._retry import retried
from optserve._rows import Initial, Table, as_mapping
from optserve._specification import (
    Holds,
    Journal,
    ParameterSetSpec,
    Pushes,
    StateFormat,
    TensorSpec,
    as_arrays,
    check_client_id,
    check_set_id,
)
from optserve._state import State
from optserve._transforms import PLAIN, Transforms
from optserve._treatments import Treatment
from optserve._wire import Frame, Progress, bytes_of, noted, pack
from optserve.formats import BFloat16, Float16, Format
from optserve.optim import Group, Optimizer
from optserve.v1 import optimizer_service_pb2 as pb

DEFAULT_TIMEOUT = 120.0  # seconds; long enough for a server to restart


class Client:
    """A connection to a server at `host:port` or `unix:/path`, or to an engine in this process at `:memory:`.

    Of several addresses, in a sequence or with commas between them, calls go to the server that serves: to the next one while
    one can't be reached, is draining, restoring, or a standby.

    `timeout`, in seconds, bounds every call, including the attempts after a lost connection. `transport` is how tensors
    travel: "shared_memory", which needs a server on this host that runs as the same user, "stream", or "auto" for the first
    of these that can be had. Threads may share a client.
    """

    def __init__(
        self, address: str | Sequence[str], *, timeout: float = DEFAULT_TIMEOUT, transport: str = "auto"
    ) -> None:
        if transport not in {each.value for each in Via}:
            raise InvalidArgument(f"expected transport to be 'auto', 'stream' or 'shared_memory'; got {transport!r}")
        self._via = Via(transport)
        self._transport, self.address = connect_all(address)
        self._timeout = timeout
        self._handles: weakref.WeakSet[ParameterSet] = weakref.WeakSet()
        self._heart = Heart()

    def __repr__(self) -> str:
        return f"Client({self.address!r})"

    def create_parameter_set(
        self,
        id: str,
        parameters: Mapping[str, ArrayLike | Table] | State,
        optimizer: Optimizer | None = None,
        *,
        groups: Sequence[Group] = (),
        holds: Holds | str = Holds.PARAMETERS,
        guard: bool = True,
        policy: Policy = ASYNC,
        transforms: Transforms = PLAIN,
        state: StateFormat | str = StateFormat.FULL,
        journal: Journal | str = Journal.OFF,
        pushes: Pushes | str = Pushes.GRADIENTS,
        buffers: Mapping[str, Treatment | str] = MappingProxyType({}),
        exist_ok: bool = False,
        client_id: str | None = None,
        push_format: Format | None = None,
        pull_format: BFloat16 | Float16 | None = None,
        replay_window_bytes: int = 0,
        progress: Progress | None = None,
    ) -> ParameterSet:
        """Create a parameter set from initial values by name: arrays of float32, float64, bfloat16 or float16, or a `Table`.

        From a `State`, which brings its optimizer and groups, the set goes on where that stands.

        `holds="moments"` keeps optimizer state only: the arrays then give shapes and dtypes, and steps return updates.
        `guard=False` trusts every worker: gradients are applied unread, so nothing refuses NaN or measures a norm. `policy`
        says when pushes become an update: each by itself (`Async()`), the mean of one from each worker (`Sync(workers)`), each
        by itself with nobody far ahead (`BoundedStaleness(bound)`), or the mean of several (`Buffered(pushes)`). `pushes` says
        what workers push: "gradients"; "deltas", to be added to the parameters; or "parameters", trained from those that they
        pulled last, of which the server then keeps a copy for each version that a worker has. `buffers`, by name or pattern,
        are tensors that no rule touches, such as the running statistics of a batch normalization: of what is pushed of them
        they become the mean ("average"), the last ("replace"), or nothing ("freeze"); "optimize" says that a tensor only has
        such a name.
        `transforms` are what happens around the rule: clipping, accumulation, averages. `state="bfloat16"` and `"int8"` keep
        averages of gradients and of their squares in 2 bytes an element, or in about 1. `journal` says what of a push survives
        a crash: what the last checkpoint has ("off"); all but a second of acknowledged pushes, if the machine fails
        ("everysec"); every acknowledged push ("always"); the last two need a server with a data directory. With `exist_ok`,
        attach to an existing set of the same specification, whose values stay as they are. `client_id`, the formats and the
        replay window are as in `parameter_set`. `progress` is called with the number of bytes that were sent so far.

        Raises InvalidName, InvalidTensor, InvalidGroup, InvalidHyperparameter, InvalidPolicy, InvalidTransform, InvalidState,
        NonFiniteValue, NoDataDirectory, ParameterSetExists, or with `exist_ok` SpecificationMismatch.
        """
        choice, holds = Choice(self._via, push_format, pull_format), Holds(holds)
        window = _check_window(replay_window_bytes)
        outline, initial = None, dict[str, Initial]()
        if isinstance(parameters, State):
            if optimizer is not None or groups:
                raise InvalidArgument(
                    f"expected a state alone, which has its optimizer and groups; got {optimizer} beside it"
                )
            specs, optimizer, groups = parameters.tensors, parameters.optimizer, parameters.creation_groups()
            outline, arrays = parameters.packed(parameters=holds is Holds.PARAMETERS)
        else:
            tables = {name: each for name, each in as_mapping(parameters).items() if isinstance(each, Table)}
            named = as_arrays({name: each for name, each in parameters.items() if not isinstance(each, Table)})
            specs = tuple(
                TensorSpec.of(name, named[name]) if name in named else _table_spec(name, tables[name])
                for name in parameters
            )
            initial = {name: table.initial for name, table in tables.items()}
            none = np.empty(0, np.uint8)  # of tables, no row
            arrays = [named.get(name, none) for name in parameters] if holds is Holds.PARAMETERS else []
        if not isinstance(optimizer, Optimizer):
            raise InvalidHyperparameter(f"expected an optimizer, such as optim.Adam(lr=1e-3); got {optimizer!r}")
        spec = ParameterSetSpec(
            id,
            specs,
            optimizer,
            tuple(groups),
            holds,
            guard,
            policy,
            transforms,
            StateFormat(state),
            initial,
            Journal(journal),
            Pushes(pushes),
            {pattern: Treatment(each) for pattern, each in as_mapping(buffers).items()},
        )
        first = pb.CreateParameterSetRequest(spec=encode_spec(spec), exist_ok=exist_ok)
        if outline is not None:
            first.state.CopyFrom(encode_outline(outline, specs))
        response = self._transport.call(
            "CreateParameterSet", noted(_creation(first, arrays), progress), self._timeout, wait=True
        )
        base = decode_position(response.parameter_set.position) if response.created else None
        return self._handle(spec.id, spec.holds, client_id, choice, base, replay_window_bytes=window)

    def parameter_set(
        self,
        id: str,
        *,
        client_id: str | None = None,
        identity: Identity | None = None,
        push_format: Format | None = None,
        pull_format: BFloat16 | Float16 | None = None,
        replay_window_bytes: int = 0,
    ) -> ParameterSet:
        """A handle on an existing parameter set; raises ParameterSetNotFound or InvalidFormat.

        `client_id` names the worker, unique among all; by default it is random. A worker that starts again under the same
        name takes over from the one before. `push_format` and `pull_format`, from `optserve.formats`, are how this worker's
        gradients and parameters travel if not as they are; with a format they go over the stream, not through shared memory.

        With an `identity`, which `ParameterSet.identity` was before, the worker goes on where that was. A push that it repeats
        is not applied again: its receipt is the first one, of which the server keeps 16, and a step has the parameters of now.
        It raises SequenceReused if it is not of the same bytes.

        `replay_window_bytes` bounds copies, of which each push makes one, that the handle keeps until the server says that they
        are on stable storage. If the server comes back from an older state, the handle sends again what it lost of this
        worker's pushes, logs that, and goes on. It raises RolledBack only if some are not in the window any more, or if the set
        was rewound.
        """
        choice, window = Choice(self._via, push_format, pull_format), _check_window(replay_window_bytes)
        if identity is not None and not isinstance(identity, Identity):
            raise InvalidArgument(f"expected an Identity, such as `weights.identity`; got {identity!r}")
        if identity is not None and client_id not in (None, identity.client_id):
            raise InvalidArgument(f"expected the identity of client {client_id!r}; got that of {identity.client_id!r}")
        client_id = identity.client_id if identity is not None else client_id
        request = pb.GetParameterSetRequest(id=check_set_id(id))
        response = retried(lambda left: self._transport.call("GetParameterSet", request, left), self._timeout)
        holds = decode_holds(response.parameter_set.spec.holds)
        return self._handle(id, holds, client_id, choice, identity=identity, replay_window_bytes=window)

    def list_parameter_sets(self) -> list[Summary]:
        """All parameter sets on the server, ordered by id."""
        request = pb.ListParameterSetsRequest()
        response = retried(lambda left: self._transport.call("ListParameterSets", request, left), self._timeout)
        return [decode_summary(message) for message in response.parameter_sets]

    def close(self) -> None:
        """Close every handle and the connection."""
        for handle in list(self._handles):
            handle.close()
        self._heart.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _handle(
        self,
        set_id: str,
        holds: Holds,
        client_id: str | None,
        choice: Choice,
        base: Position | None = None,
        *,
        identity: Identity | None = None,
        replay_window_bytes: int,
    ) -> ParameterSet:
        client_id = check_client_id(client_id) if client_id is not None else f"worker-{secrets.token_hex(8)}"
        moments_only = holds is Holds.MOMENTS
        handle = ParameterSet(
            self._transport,
            set_id,
            client_id,
            self._timeout,
            choice=choice,
            moments_only=moments_only,
            base=base,
            identity=identity,
            replay_window_bytes=replay_window_bytes,
            heart=self._heart,
        )
        self._handles.add(handle)
        return handle


def _check_window(nbytes: int) -> int:
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise InvalidArgument(f"expected replay_window_bytes to be a whole number of at least 0; got {nbytes!r}")
    return nbytes


def _table_spec(name: str, table: Table) -> TensorSpec:
    return TensorSpec(name, table.dtype, (table.capacity, *table.shape))


def _creation(
    first: pb.CreateParameterSetRequest, arrays: Sequence[np.ndarray[Any, Any]]
) -> Iterator[Frame[pb.CreateParameterSetRequest]]:
    yield Frame(first)
    for payload in pack((k, bytes_of(array), array.itemsize) for k, array in enumerate(arrays)):
        yield Frame(pb.CreateParameterSetRequest(), payload)
