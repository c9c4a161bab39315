"""A `torch.optim.Optimizer` whose state and arithmetic are a server's."""

import atexit
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from optserve._client import Client
from optserve._errors import FailedPrecondition, InvalidTransform, OptserveError, TensorMismatch
from optserve._parameter_set import Changes, ParameterSet
from optserve._results import GroupDescription, Parameters, Receipt
from optserve._rows import RowSparse
from optserve._specification import TensorSpec
from optserve._state import State
from optserve._transforms import PLAIN, ClipGlobalNorm
from optserve.interop import torch as interop
from optserve.interop._building import Array
from optserve.interop.torch import as_array
from optserve.optim import Optimizer
from optserve.schedules import Schedule
from optserve.torch._awaited import Arrival, may_be_awaited
from optserve.torch._groups import (
    creation_groups,
    group_names,
    hyperparameters_of,
    names_of,
    of_default,
    torch_defaults,
)
from optserve.torch._hooks import GradientHooks
from optserve.torch._ranks import of_all_ranks, own_rank
from optserve.torch._tensors import as_gradient, assign, digest

HANDLE = ("push_format", "pull_format", "replay_window_bytes")  # options of a worker's handle, not of the set
WORTH_AWAITING = 1 << 20  # bytes of parameters: below, a thread costs more than it saves
FAREWELL = 5.0  # seconds that a process which ends waits at most for a step under way

_open: "weakref.WeakSet[RemoteOptimizer]" = weakref.WeakSet()


class RemoteOptimizer(torch.optim.Optimizer):  # type: ignore[misc]  # torch is Any to who has not installed it
    """An optimizer of a training script that runs on a server: `step` pushes gradients, and pulls parameters.

    `params` are `model.named_parameters()`, or parameter groups of such; tensors without a name get a number. `server` is an
    address, or a `Client`; `id` names the parameter set there, which is created with the rule and the present parameters. If
    there is one, of the same specification, the parameters become what it has: so several workers begin alike, and a run that
    was interrupted goes on. `creation` is what else `Client.create_parameter_set` takes, such as `policy` or `transforms`.

    What a parameter group says of hyperparameters, or a scheduler writes there, travels with the next step. The worker keeps
    no optimizer state: `state_dict` asks the server for it, in the form of the `torch.optim` optimizer of the same name, and
    `load_state_dict` takes what either has saved. Under torchrun, the worker's name is its rank (`RANK`).

    With `overlap`, gradients are sent while backward computes others, and parameters come back while the script goes on: each
    torch function that reads one waits for it. `max_norm` clips gradients on the server, by their global norm: what the script
    changes after backward can't be sent before.

    Raises what `create_parameter_set` raises.
    """

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: ParamsT,
        server: str | Sequence[str] | Client,
        id: str,
        optimizer: Optimizer,
        *,
        client_id: str | None = None,
        overlap: bool = True,
        max_norm: float | None = None,
        **creation: Any,
    ) -> None:
        self._weights: ParameterSet | None = None
        self._overlap = overlap
        self._hooks: GradientHooks | None = None
        self._arrival: Arrival | None = None  # of the last step's parameters
        self._order: list[str] | None = None  # in which forward uses them, once that is known
        self._sent: dict[str, dict[str, Any]] = {}  # by group and name
        self._schedules: dict[str, Mapping[str, Schedule]] = {}  # the set's own, by group and name
        self._given: bytes | None = None  # the digest of the last state_dict, if no step has been made since
        self._receipt: Receipt | None = None
        self._optimizer = optimizer
        super().__init__(params, torch_defaults(optimizer))
        self._id = id
        self._client_id = client_id or (f"rank-{os.environ['RANK']}" if "RANK" in os.environ else None)
        self._creation = creation if max_norm is None else _clipping(max_norm, **creation)
        self._client = server if isinstance(server, Client) else Client(server)
        self._owns_client = self._client is not server
        try:
            self._names = names_of(self.param_groups)
            self._attach(
                self._client.create_parameter_set(
                    id,
                    {name: as_array(tensor) for name, tensor in self._tensors.items()},
                    of_default(self.param_groups[0], optimizer),
                    groups=creation_groups(self.param_groups, self._names, optimizer),
                    exist_ok=True,
                    client_id=self._client_id,
                    **self._creation,
                )
            )
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def __repr__(self) -> str:
        return f"RemoteOptimizer({self._id!r}, {self._optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"expected no copy of {self}: its state is a server's. Keep its state_dict(), or make another one with the same id"
        )

    @property
    def weights(self) -> ParameterSet:
        """The handle on the parameter set."""
        if self._weights is None:
            raise FailedPrecondition("expected an optimizer that has a parameter set; this one could not create it")
        return self._weights

    @property
    def receipt(self) -> Receipt | None:
        """That of the last step that pushed anything: `receipt.outcome` says what became of it."""
        return self._receipt

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Push the gradients that there are, and take over the parameters; raises what `ParameterSet.push` raises."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._end_arrival()
        tensors = self._tensors
        gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        if gradients:
            self._given = None
            changes, pushed = self._changes(), self._pushed(gradients)
            self._receipt = self._exchange(tensors, pushed, changes)
            if self._hooks is not None:
                self._hooks.accepted(pushed)
            for group, values in changes.items():
                self._sent[group].update(values)
        return loss

    def no_push(self) -> AbstractContextManager[None]:
        """Backward passes in this context only accumulate: their gradients are not sent ahead, as a later one adds to them."""
        return self._hooks.paused() if self._hooks is not None else nullcontext()

    def wait(self) -> None:
        """Wait until all parameters of the last step are there, for who reads them past torch; raises what keeps them away."""
        if self._arrival is not None:
            self._arrival.wait()
            self._end_arrival()

    def pull(self) -> None:
        """Let the parameters be what the server has, without a push."""
        self._end_arrival()
        self._take(self.weights.pull())

    def state_dict(self) -> dict[str, Any]:
        """As that of the `torch.optim` optimizer of the same name, with the state that the server has."""
        self.wait()
        tensors = list(self._tensors.values())
        state = interop.state_dict(self.weights.state(), *self._names)["state"]
        kept = {tensors[index]: values for index, values in state.items()}
        self.state.update(kept)
        try:
            given = dict(super().state_dict())
            self._given = digest(given["state"], self._packed_groups(), self._tensors)
            return given
        finally:
            for tensor in kept:
                self.state.pop(tensor, None)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what this or a `torch.optim` optimizer has saved, with the present parameters: the set is made anew.

        What this one gave after its last step is there already, so that nothing is done. With `torch.distributed`, all ranks
        are to load, and one of them makes the set; other workers are to attach again. Raises InvalidState, and then nothing has
        changed.
        """
        loaded: dict[Any, Any] = {}

        def take_state(_: object, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(given["state"])
            return {**given, "state": {}}

        groups, hook = self.param_groups, self.register_load_state_dict_pre_hook(take_state)  # it is the last one
        try:
            super().load_state_dict(state_dict)
            state = interop.from_state_dict(
                {"state": loaded, "param_groups": self._packed_groups()}, self._tensors, type(self._optimizer)
            )
        except BaseException:
            self.param_groups = groups
            raise
        finally:
            hook.remove()
        given = self._given is not None and self._given == digest(loaded, self._packed_groups(), self._tensors)
        if all(of_all_ranks(given)):
            return  # accelerate gives an optimizer its own state: workers that train by now are not to lose their set
        self._recreate(lambda: replace(state, groups=tuple(map(self._scheduled, state.groups))))

    def close(self) -> None:
        """End the connection, if the optimizer has made it; raises what keeps the last step's parameters away."""
        _open.discard(self)
        try:
            self.wait()
        finally:
            if self._hooks is not None:
                self._hooks.remove()
            if self._weights is not None:
                self._weights.close()
            if self._owns_client:
                self._client.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; once there is a set, it is made anew with more tensors, as by `load_state_dict`."""
        super().add_param_group(param_group)
        if self._weights is None:
            return
        known, group = self._names, self.param_groups[-1]
        try:
            self._names, (*_, group_name) = (
                [*known, names_of(self.param_groups)[-1]],  # the set has those, whatever a state dict called them since
                group_names(self.param_groups),
            )
            added = dict(zip(self._names[-1], map(as_array, group["params"]), strict=True))
            description = GroupDescription(
                group_name, tuple(added), self._optimizer.at(0).replace(**hyperparameters_of(group, self._optimizer))
            )
            specs = [TensorSpec.of(name, array) for name, array in added.items()]
            self._recreate(lambda: _extended(self.weights.state(), description, specs, added))
        except BaseException:
            self._names = known
            self.param_groups.pop()
            raise

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """The parameters by name, in torch's order."""
        return {
            name: tensor
            for names, group in zip(self._names, self.param_groups, strict=True)
            for name, tensor in zip(names, group["params"], strict=True)
        }

    def _recreate(self, made: Callable[[], State]) -> None:
        """Make the set anew; of ranks that have the same one, the first makes it for all, when none pushes any more."""
        incarnations = of_all_ranks(self.weights.describe().position.incarnation)
        first, failure = incarnations.index(incarnations[own_rank()]), None
        if first == own_rank():
            try:
                state = made()
                self.weights.delete()
                created = self._client.create_parameter_set(
                    self._id, state, client_id=self._client_id, **self._creation
                )
            except OptserveError as error:
                failure = error
        failures = of_all_ranks(str(failure or ""))
        if failure is not None:
            raise failure
        if failures[first]:
            raise FailedPrecondition(f"expected rank {first} to make the set anew; there, {failures[first]}")
        if first != own_rank():
            self.weights.close()
            options = {name: value for name, value in self._creation.items() if name in HANDLE}
            created = self._client.parameter_set(self._id, client_id=self._client_id, **options)
        self._attach(created)

    def _scheduled(self, group: GroupDescription) -> GroupDescription:
        """The group with the schedules that it follows on the server."""
        return replace(group, optimizer=group.optimizer.replace(**self._schedules.get(group.name, {})))

    def _attach(self, weights: ParameterSet) -> None:
        """Take over a set: what its groups have is known to be sent."""
        self._end_arrival()
        self._weights, self._receipt, self._order = weights, None, None
        if self._hooks is not None:
            self._hooks.remove()
        if self._overlap:
            stage = weights.stage
            self._hooks = GradientHooks(self._tensors, lambda gradients, expected: stage(gradients, expected=expected))
        description = weights.describe()
        self._schedules = {group.name: group.schedules for group in description.groups}
        self._sent = {
            group.name: {
                name: value for name, value in group.optimizer.hyperparameters.items() if name not in group.schedules
            }
            for group in description.groups
        }
        self._take(weights.pull())

    def _changes(self) -> dict[str, dict[str, Any]]:
        """What parameter groups say of hyperparameters that the server has not heard; schedules of its own it follows."""
        changes = {}
        for name, group in zip(group_names(self.param_groups), self.param_groups, strict=True):
            sent = self._sent[name]
            values = hyperparameters_of(group, self._optimizer)
            if changed := {key: value for key, value in values.items() if key in sent and value != sent[key]}:
                changes[name] = changed
        return changes

    def _pushed(self, gradients: Mapping[str, torch.Tensor]) -> Mapping[str, Array | RowSparse]:
        """Gradients as a push takes them; with overlap, most of them are on the server already."""
        if self._hooks is not None:
            return self._hooks.pushed(gradients)
        return {name: as_gradient(gradient) for name, gradient in gradients.items()}

    def _exchange(
        self, tensors: Mapping[str, torch.Tensor], gradients: Mapping[str, Array | RowSparse], changes: Changes
    ) -> Receipt | None:
        """Push and pull; parameters that are worth it come back while the script goes on."""
        large = sum(map(_nbytes, tensors.values())) >= WORTH_AWAITING
        if not (self._overlap and large and may_be_awaited(tensors.values())):
            pulled = self.weights.step(gradients, hyperparameters=changes, copy=False)
            self._take(pulled)
            return pulled.receipt
        self._arrival = arrival = Arrival(tensors, self._order or tensors, learns=self._order is None)
        step = functools.partial(
            self.weights.step,
            gradients,
            hyperparameters=changes,
            tensors=arrival.order,
            copy=False,
            listener=arrival,
        )
        try:
            threading.Thread(target=_arrive, args=(arrival, step), name="optserve-arrival", daemon=True).start()
        except BaseException as error:
            arrival.finish(error)
            raise
        return arrival.receipt()

    def _end_arrival(self) -> None:
        """Let the last step end, and parameters be ordinary ones again; remember in which order they were used."""
        if self._arrival is not None:
            self._arrival.forget()
            if self._arrival.learns and self._arrival.used:
                self._order = list(dict.fromkeys([*self._arrival.used, *self._arrival.order]))
            self._arrival = None

    def _take(self, pulled: Parameters) -> None:
        tensors = self._tensors
        for name, array in pulled.items():
            if name not in tensors or isinstance(array, RowSparse):
                raise TensorMismatch(
                    f"expected a set of this optimizer's {len(tensors)} parameters; {name!r} is not one of them"
                )
            assign(tensors[name].detach(), array)
            torch.autograd.graph.increment_version(tensors[name])

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The parameter groups as in a state_dict, with numbers in the place of parameters, without what is a scheduler's."""
        count, packed = 0, []
        for name, group in zip(group_names(self.param_groups), self.param_groups, strict=True):
            numbers = list(range(count, count + len(group["params"])))
            count += len(numbers)
            packed.append({**hyperparameters_of(group, self._optimizer), "name": name, "params": numbers})
        return packed


@atexit.register
def _close_all() -> None:
    """Connections that are receiving when the interpreter ends would take it down."""
    for optimizer in list(_open):
        if optimizer._arrival is None or optimizer._arrival.wait_over(FAREWELL):
            with contextlib.suppress(OptserveError):
                optimizer.close()


def _arrive(arrival: Arrival, step: Callable[[], Parameters]) -> None:
    """Make a step, and let its parameters be taken over one after the other."""
    try:
        for name, array in step().items():
            arrival.arrived(name, array)
    except BaseException as error:  # for whoever waits
        arrival.finish(error)
    else:
        arrival.finish()


def _clipping(max_norm: float, **creation: Any) -> dict[str, Any]:
    """What a set is created with that clips gradients by their norm."""
    transforms = creation.get("transforms", PLAIN)
    if transforms.clip is not None:
        raise InvalidTransform(
            f"expected either max_norm or transforms that clip; got {max_norm:g} and {transforms.clip}"
        )
    return {**creation, "transforms": replace(transforms, clip=ClipGlobalNorm(max_norm))}


def _extended(
    state: State, group: GroupDescription, tensors: Sequence[TensorSpec], parameters: Mapping[str, Array]
) -> State:
    """The state with a group of tensors more, which have had no update."""
    return replace(
        state,
        tensors=(*state.tensors, *tensors),
        groups=(*state.groups, group),
        parameters={**state.parameters, **parameters},
        steps={**state.steps, **dict.fromkeys(parameters, 0)},
    )


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())
