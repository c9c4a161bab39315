"""Decisions: what became of pushes that were decided on together, as an event of the set's history."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optserve._results import Receipt
from optserve._specification import Run, TensorSpec
from optserve_server.engine.commit import Commit
from optserve_server.engine.history import Content, Event, Pushed
from optserve_server.engine.mean import Gathered
from optserve_server.engine.push import Declared
from optserve_server.engine.rounds import merged_changes
from optserve_server.engine.staging import Received, StagedTensor, memory
from optserve_server.engine.work import COMPUTED, Update


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of some commits, one by itself or a round; `update` is what they do, None if nothing."""

    number: int
    version: int
    commits: Sequence[Commit]
    receipts: Sequence[Receipt]
    update: Update | None

    def event(self, tensors: Sequence[TensorSpec]) -> Event:
        """The event; if what was gathered is recorded, which must have happened by now, it has that."""
        pushes = [
            Pushed(commit.session.client_id, commit.session.epoch, commit.push.digest, receipt, commit.push.samples)
            for commit, receipt in zip(self.commits, self.receipts, strict=True)
        ]
        if self.update is None:
            return Event(self.number, self.version, pushes)
        changes = merged_changes(commit.push.changes for commit in self.commits)
        if self.update.recorded:
            assert self.update.gathered is not None
            content = _gathered(tensors, self.update.gathered)
        else:
            push = self.commits[0].push
            content = Content(push.declared, push.received, push.loss_scale)
        return Event(self.number, self.version, pushes, content, changes)


def _gathered(tensors: Sequence[TensorSpec], gathered: Gathered) -> Content:
    declared: list[Declared] = []
    received: list[Received] = []
    for role, staged in ((False, gathered.gradients), (True, gathered.parameters)):
        for index, tensor in staged.items():
            received.append(_read(len(declared), tensor))
            declared.append(Declared(replace(tensor.spec, name=tensors[index].name), is_parameter=role))
    for index, sparse in gathered.sparse.items():
        shape = (len(sparse.rows), *tensors[index].shape[1:])
        values = sparse.values.reshape(-1)
        received.append(Received([Run(len(declared), 0, values.size)], [values.data], replace=False))
        declared.append(Declared(TensorSpec(tensors[index].name, COMPUTED[values.dtype], shape), rows=sparse.rows))
    return Content(declared, [each for each in received if each.runs and each.runs[0].size], gathered=True)


def _read(index: int, tensor: StagedTensor) -> Received:
    """The elements of a staged tensor, where they lie."""
    itemsize = tensor.spec.dtype.itemsize
    runs = [Run(index, piece.offset, piece.size) for piece in tensor.pieces]
    data = [memory(piece.address + piece.skip * itemsize, piece.size * itemsize) for piece in tensor.pieces]
    return Received(runs, data, replace=False)
