"""Replay: what an event of a set's history brought, staged once more."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optserve_server.engine.arena import Layout
from optserve_server.engine.filling import fill
from optserve_server.engine.history import Content, Event
from optserve_server.engine.mean import Gathered, Mean
from optserve_server.engine.push import Push
from optserve_server.engine.rows import SparseGradient, gathered
from optserve_server.engine.staging import StagedTensor, Staging
from optserve_server.engine.threads import Threads


def pushed(event: Event, content: Content, begin: Callable[..., Push]) -> Push:
    """A push as it came."""
    push = begin(
        event.pushes[0].receipt.sequence,
        content.declared,
        changes=event.changes,
        loss_scale=content.loss_scale,
        samples=event.pushes[0].samples,
    )
    for received in content.received:
        push.add(received.runs, _joined(received.data), replace=received.replace)
    push.finish()
    return push


def round_of(
    content: Content, indices: Mapping[str, int], mean: Mean, layout: Layout, threads: Threads
) -> tuple[Gathered, Staging]:
    """What a round gathered, in its place again, and what keeps the rest of it."""
    staging = Staging([each.spec for each in content.declared], threads, guard=False)
    for received in content.received:
        staging.add(received.runs, _joined(received.data))
    staging.finish()
    gradients: dict[int, StagedTensor] = {}
    parameters: dict[int, StagedTensor] = {}
    sparse: dict[int, SparseGradient] = {}
    for declared, tensor in zip(content.declared, staging.tensors, strict=True):
        index = indices[declared.spec.name]
        if declared.rows is not None:
            sparse[index] = gathered(declared.rows, tensor)
        else:
            (parameters if declared.is_parameter else gradients)[index] = tensor
    fill(mean.arena, layout, gradients, threads)
    return Gathered(mean.at(gradients), sparse, parameters), staging


def _joined(data: Sequence[Any]) -> Any:
    return data[0] if len(data) == 1 else b"".join(data)
