"""What a worker holds: a handle on one parameter set."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike

from optserve._buffers import Buffers
from optserve._carriers import Chunks
from optserve._choice import Choice
from optserve._compression import Compressor
from optserve._errors import InvalidArgument, InvalidFormat, InvalidHyperparameter, OutcomeUnknown, TensorMismatch
from optserve._exchange import Listener, OutgoingPull, OutgoingPush
from optserve._heart import Heart
from optserve._identity import LARGEST, Identity
from optserve._messages import (
    decode_description,
    decode_group_states,
    decode_outline,
    decode_position,
    decode_spec,
    decode_worker,
    encode_changes,
    encode_optimizer,
)
from optserve._policies import Policy, check_samples
from optserve._policy_messages import encode_policy
from optserve._results import Description, Parameters, Position, Receipt, Worker
from optserve._retry import retried
from optserve._rows import RowSparse, as_indices, as_mapping, check_count, split
from optserve._session import Session
from optserve._specification import as_arrays, check_client_id, check_set_id
from optserve._state import State, assembled
from optserve._transforms import check_loss_scale
from optserve._transport import Transport
from optserve._wire import Frame, Progress, noted
from optserve.optim import Group, Optimizer
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1 import step_pb2

Changes = Mapping[str, Mapping[str, Any]]


class ParameterSet:
    """A worker's handle on a parameter set, with an identity and a stream of its own.

    Get one from `Client.create_parameter_set` or `Client.parameter_set`. Threads may share it; their calls take turns. Every
    call raises ParameterSetNotFound once the set is deleted, ServerUnavailable or DeadlineExceeded if the client's timeout
    passes, RolledBack, once, if the set has gone back to an older state, SessionSuperseded if another handle has taken over
    under this client id, and ClientClosed after `close`.
    """

    def __init__(
        self,
        transport: Transport,
        set_id: str,
        client_id: str,
        timeout: float,
        *,
        choice: Choice,
        moments_only: bool,
        base: Position | None = None,
        identity: Identity | None = None,
        replay_window_bytes: int = 0,
        joins: bool = False,
        heart: Heart,
    ) -> None:
        self._transport = transport
        self._timeout = timeout
        self._choice = choice
        self._heart = heart
        self._joins = joins
        self._session = Session(
            transport,
            set_id,
            client_id,
            timeout,
            choice,
            base,
            moments_only=moments_only,
            identity=identity,
            replay_window_bytes=replay_window_bytes,
            joins=joins,
            heart=heart,
        )
        self._compressor = Compressor(choice.push_format) if choice.push_format is not None else None
        self._moments_only = moments_only
        self.id = set_id
        self.client_id = client_id

    def __repr__(self) -> str:
        return f"ParameterSet({self.id!r})"

    @property
    def identity(self) -> Identity:
        """Who this worker is and how far its pushes are, for `Client.parameter_set` to go on from in another process.

        Save it with the worker's own checkpoint. Asks the server if this handle has not been used yet.
        """
        return self._session.identity()

    def step(
        self,
        gradients: Mapping[str, ArrayLike | RowSparse],
        *,
        parameters: Mapping[str, ArrayLike] | None = None,
        hyperparameters: Changes | None = None,
        loss_scale: float = 1.0,
        samples: float = 1.0,
        tensors: Sequence[str] = (),
        rows: Mapping[str, ArrayLike] | None = None,
        copy: bool = True,
        listener: Listener | None = None,
    ) -> Parameters:
        """Push gradients and pull the result in one round trip; `.receipt` says what became of the push.

        Arguments are those of `push` and `pull`. Without `copy`, the arrays are read-only and may lie in memory shared with
        the server: they stay as they are until this handle's next step, push or pull, or until its connection ends. In a set
        that holds moments only, the result is what to add to the parameters. A `listener` hears of the receipt, and of tensors
        that come one by one, while others are still on their way. Raises what `push` raises.
        """
        push = self._outgoing(gradients, parameters, hyperparameters, loss_scale, samples)
        receipt, pulled = self._session.exchange(push, self._pull(tensors, rows, copy=copy, listener=listener))
        assert receipt is not None
        assert pulled is not None
        if not copy:
            for array in pulled.values():
                (array.values if isinstance(array, RowSparse) else array).flags.writeable = False
        if self._moments_only and pulled.position.newer_than(receipt.position):
            raise OutcomeUnknown(
                f"push {receipt.sequence} to {self.id!r} was applied as version {receipt.version}, but its updates were gone "
                f"when the connection came back: the set is at version {pulled.version}"
            )
        return pulled

    def push(
        self,
        gradients: Mapping[str, ArrayLike | RowSparse],
        *,
        parameters: Mapping[str, ArrayLike] | None = None,
        hyperparameters: Changes | None = None,
        loss_scale: float = 1.0,
        samples: float = 1.0,
    ) -> Receipt:
        """Send gradients, one array of the registered shape and dtype for each tensor that has one.

        A tensor without a gradient is left alone; so are the other rows of one whose gradient is a `RowSparse`. `parameters`
        are the caller's current ones, for weight decay in a set that holds moments only. `hyperparameters`, by group and name,
        change with this push and stay changed: `{"default": {"lr": 1e-4}}`; what follows a schedule takes no other value from
        a push. `loss_scale` is what the loss was multiplied by; the server divides gradients by it. `samples` is how many
        samples or tokens they are the mean of: how much they weigh where the policy makes one update of several. In a set that
        was created with `pushes="deltas"` or `"parameters"`, these are what is pushed instead of gradients; of its `buffers`
        values are pushed in any case. Arrays are sent from where
        they are, more than once if the connection breaks: they must not change until this returns.

        Raises TensorMismatch, InvalidTensor, NonFiniteValue, InvalidGroup or InvalidHyperparameter if the push is refused, in
        which case nothing changed; OutcomeUnknown if no receipt came in time. As transforms and policy have it, a push may also
        be accumulated, skipped or discarded: `receipt.outcome` says so.
        """
        receipt, _ = self._session.exchange(
            self._outgoing(gradients, parameters, hyperparameters, loss_scale, samples), None
        )
        assert receipt is not None
        return receipt

    @overload
    def pull(self, *, newer_than: None = None, tensors: Sequence[str] = (), evaluation: bool = False) -> Parameters: ...

    @overload
    def pull(
        self,
        *,
        newer_than: "int | Position | Parameters",
        tensors: Sequence[str] = (),
        rows: Mapping[str, ArrayLike] | None = None,
        evaluation: bool = False,
    ) -> Parameters | None: ...

    def pull(
        self,
        *,
        newer_than: "int | Position | Parameters | None" = None,
        tensors: Sequence[str] = (),
        rows: Mapping[str, ArrayLike] | None = None,
        evaluation: bool = False,
    ) -> Parameters | None:
        """Fetch parameters, or the tensors named, in that order; None if nothing is newer than `newer_than`.

        A version alone stands for one in the history that this handle last saw. `rows` asks for some rows of tensors by index,
        or of tables by key, and for nothing else unless `tensors` says what; a table that is pulled whole comes as a
        `RowSparse` with the keys that it has. With `evaluation`, fetch the parameters to evaluate: the set's average (`EMA`,
        `SWA`), or what its rule keeps for that (as `optim.ASGD` does). Raises TensorMismatch for an unknown name,
        InvalidTransform where there is nothing to evaluate but the parameters.
        """
        if isinstance(newer_than, int):
            newer_than = self._session.position_at(newer_than)
        elif isinstance(newer_than, Parameters):
            newer_than = newer_than.position
        _, pulled = self._session.exchange(None, self._pull(tensors, rows, newer_than, evaluation=evaluation))
        return pulled

    def stage(self, gradients: Mapping[str, ArrayLike], *, expected: Sequence[str]) -> None:
        """Send gradients ahead of the `step` or `push` that they are part of, while others are still being computed.

        `expected` names the tensors that the push will have, in its order. The arrays must not change until then, or be staged
        again; the push is given all of them, and sends what was not staged, or is another array. What is staged has no effect
        before the push. Nothing is sent ahead before the first call of this handle, nor where gradients are compressed: then
        the push sends it all. Raises TensorMismatch for what is not a tensor of the set.
        """
        if self._compressor is None:
            self._session.stage(as_arrays(gradients), expected)

    def gradient_buffers(self) -> dict[str, "np.ndarray[Any, Any]"]:
        """An array for the gradient of each tensor, to be filled and given to `step` or `push`, which then copies nothing.

        They lie in memory shared with the server, if it is on this host, and are this handle's own. After the connection
        broke they still work, but are copied until this is called again.
        """
        return self._session.gradient_buffers()

    def settle(self) -> Receipt | None:
        """What became of the push for which OutcomeUnknown was raised: its receipt, or None if it was not applied.

        Raises OutcomeUnknown if the server has forgotten, or another handle has taken over. It may be asked again after
        DeadlineExceeded, as a round that the push is part of may take longer than the client's timeout, and after RolledBack,
        if the server came back from an older state.
        """
        return self._session.settle()

    def update(
        self, /, *, group: str = Group.DEFAULT, policy: Policy | None = None, **hyperparameters: Any
    ) -> Description:
        """Change hyperparameters of a group, to values or schedules, or the policy, for every worker, from the next update on.

        What is given for a hyperparameter that follows a schedule replaces the schedule. With another policy, a round that is
        under way is given up, and those who wait push again. Raises InvalidGroup, InvalidHyperparameter or InvalidPolicy; then
        nothing changed.
        """
        changes = encode_changes({group: hyperparameters} if hyperparameters else {})
        request = pb.UpdateParameterSetRequest(id=self.id, hyperparameters=changes)
        if policy is not None:
            request.policy.CopyFrom(encode_policy(policy))
        response = retried(lambda left: self._transport.call("UpdateParameterSet", request, left), self._timeout)
        return decode_description(response.parameter_set)

    def describe(self) -> Description:
        """The set as it is now: specification, version, groups with the hyperparameters in force."""
        request = pb.GetParameterSetRequest(id=self.id)
        response = retried(lambda left: self._transport.call("GetParameterSet", request, left), self._timeout)
        return decode_description(response.parameter_set)

    def worker(self, client_id: str | None = None, *, identity: Identity | None = None) -> "ParameterSet":
        """A handle for a worker that is a member of the set while a block lasts: `with weights.worker("gpu-3") as worker:`.

        A member is waited for, as the policy has it: from when the block is entered (others are from their first push) until
        it is left, or until the lease ends during which the server hears nothing of the worker. A worker that comes back under
        its name, or its `identity`, goes on.
        """
        client_id = identity.client_id if identity is not None and client_id is None else client_id
        return ParameterSet(
            self._transport,
            self.id,
            check_client_id(client_id) if client_id is not None else f"worker-{secrets.token_hex(8)}",
            self._timeout,
            choice=self._choice,
            moments_only=self._moments_only,
            identity=identity,
            joins=True,
            heart=self._heart,
        )

    def workers(self) -> list[Worker]:
        """The members of the set, ordered by client id."""
        request = pb.ListWorkersRequest(id=self.id)
        response = retried(lambda left: self._transport.call("ListWorkers", request, left), self._timeout)
        return list(map(decode_worker, response.workers))

    def barrier(self) -> None:
        """Wait until all members of the set have come to a barrier; this handle is one of them from now on.

        Who leaves, or whose lease ends, is waited for no more. Raises RoundIncomplete if the others take longer than the
        policy's deadline, 60 seconds if it has none.
        """
        self._session.barrier()

    def state(self, *, progress: Progress | None = None) -> State:
        """All that the set is now, to go on from in another set (`Client.create_parameter_set`) or library (`interop`).

        `progress` is called with the number of bytes that have come so far, which begins again if the connection breaks.
        """
        request = pb.ExportParameterSetRequest(id=self.id)

        def received(left: float) -> State:
            return _received(noted(self._transport.download("ExportParameterSet", request, left), progress))

        return retried(received, self._timeout)

    def checkpoint(self) -> Position:
        """Write the set to the server's stable storage now; raises NoDataDirectory if the server has none."""
        request = pb.CheckpointParameterSetRequest(id=self.id)
        response = retried(lambda left: self._transport.call("CheckpointParameterSet", request, left), self._timeout)
        return decode_position(response.position)

    def rewind(self, version: int) -> Position:
        """Let the set go back to an earlier version, for everyone, as if the updates since had never been.

        Other handles raise RolledBack once, and go on from there. Raises NoDataDirectory, or VersionNotKept for a version that
        neither the server's checkpoints nor a journal lead to.
        """
        request = pb.RewindParameterSetRequest(id=self.id, version=_check_version(version))
        response = self._transport.call("RewindParameterSet", request, self._timeout, wait=True)
        position = decode_position(response.position)
        self._session.rewound(position, response.rewinds)
        return position

    def fork(self, id: str, version: int | None = None, optimizer: Optimizer | None = None) -> "ParameterSet":
        """Create a set from what this one is, or was at an earlier version, bit for bit.

        With another optimizer, in no groups, it goes on with the state if that rule keeps the same, else with the parameters
        alone, from version 0. Raises ParameterSetExists, and as `rewind` does.
        """
        begin = None if version is None else _check_version(version)
        request = pb.ForkParameterSetRequest(id=self.id, new_id=check_set_id(id), version=begin)
        if optimizer is not None:
            if not isinstance(optimizer, Optimizer):
                raise InvalidHyperparameter(f"expected an optimizer, such as optim.Adam(lr=1e-3); got {optimizer!r}")
            request.optimizer.CopyFrom(encode_optimizer(optimizer))
        self._transport.call("ForkParameterSet", request, self._timeout, wait=True)
        client_id = f"worker-{secrets.token_hex(8)}"
        return ParameterSet(
            self._transport,
            id,
            client_id,
            self._timeout,
            choice=self._choice,
            moments_only=self._moments_only,
            heart=self._heart,
        )

    def delete(self) -> None:
        """Remove the set from the server, for everyone."""
        self._transport.call("DeleteParameterSet", pb.DeleteParameterSetRequest(id=self.id), self._timeout, wait=True)
        self.close()

    def close(self) -> None:
        """End this handle's stream; nobody waits for it any more."""
        self._session.close()

    def __enter__(self) -> Self:
        if self._joins:
            self._session.join()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _pull(
        self,
        tensors: Sequence[str],
        rows: Mapping[str, ArrayLike] | None,
        newer_than: Position | None = None,
        *,
        copy: bool = True,
        evaluation: bool = False,
        listener: Listener | None = None,
    ) -> OutgoingPull:
        indices = {name: as_indices(each) for name, each in as_mapping(rows or {}).items()}
        check_count(indices.values())
        return OutgoingPull(tuple(tensors), newer_than, copy, evaluation, indices, listener)

    def _outgoing(
        self,
        gradients: Mapping[str, ArrayLike | RowSparse],
        parameters: Mapping[str, ArrayLike] | None,
        hyperparameters: Changes | None,
        loss_scale: float,
        samples: float,
    ) -> OutgoingPush:
        values, rows = split(gradients)
        scale, weight = check_loss_scale(loss_scale), check_samples(samples)
        if rows and self._compressor is not None:
            raise InvalidFormat(
                "expected a handle without push_format for row-sparse gradients, which travel as they are"
            )
        arrays = as_arrays(values)
        compressed = self._compressor.begin(arrays) if self._compressor is not None else None
        outgoing = OutgoingPush(
            arrays, as_arrays(parameters or {}), hyperparameters or {}, compressed, scale, rows, weight
        )
        if not outgoing.gradients:
            raise TensorMismatch(f"expected the gradient of at least one tensor of set {self.id!r}; got none")
        _ = outgoing.declared  # what can't travel is refused here, before anything is sent
        encode_changes(outgoing.changes)
        return outgoing


def _check_version(value: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise InvalidArgument(f"expected a version as a whole number of at least 0; got {value!r}")
    return int(value)


def _received(frames: Iterator[Frame[pb.ExportParameterSetResponse]]) -> State:
    """The state that comes in frames; raises what the server says, or InvalidChunk."""
    first, second = next(frames).message, next(frames).message
    tensors = decode_spec(first.spec).tensors
    outline = decode_outline(second.state, tensors)
    elements = outline.elements(tensors)
    everything = step_pb2.Parameters(tensors=range(len(elements)))
    arrays = Chunks(elements, Buffers()).receive(everything, frames, {}, copy=True)
    return assembled(tensors, decode_group_states(first.groups), outline, map(np.asarray, arrays))
