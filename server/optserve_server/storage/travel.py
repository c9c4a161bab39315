"""Time travel: a set as it was, from a checkpoint that was made before and the journal since."""

from collections.abc import Iterator
from pathlib import Path

import structlog

from optserve._errors import InvalidState, StorageFailed, VersionNotKept
from optserve._specification import Journal
from optserve_server.engine.engine import Engine
from optserve_server.engine.parameter_set import ParameterSet
from optserve_server.engine.state import State
from optserve_server.storage import checkpoint, journal
from optserve_server.storage.checkpoint import Shared
from optserve_server.storage.manifest import Manifest
from optserve_server.storage.tensors import Damaged

log = structlog.get_logger()


def earlier(home: Path, engine: Engine, version: int | None) -> tuple[ParameterSet, Shared | None]:
    """The set that a directory has, at a version or in its newest checkpoint, and that checkpoint if the set is equal to one.

    Of several events at one version, it is the first that is kept. Raises VersionNotKept, StorageFailed or ServerBusy.
    """
    try:
        described = list(_described(home))
        if not described:
            raise VersionNotKept("it has no checkpoint yet")
        newest = described[0][1].state
        path, base = _base(described, newest, version)
        parameter_set = read(path, base, engine)
        if version is None or parameter_set.position.version == version:
            return parameter_set, Shared(path, base, frozenset(base.files))
        _repeat_until(home, parameter_set, newest, version)
    except (Damaged, InvalidState, OSError) as error:
        raise StorageFailed(f"an earlier state can't be read: {error}") from error
    return parameter_set, None


def read(path: Path, described: Manifest, engine: Engine) -> ParameterSet:
    """The set that a checkpoint has, not published; raises Damaged, OSError or ServerBusy."""
    parameter_set = engine.new(described.state.spec)
    parameter_set.restore(described.state)
    for _ in checkpoint.fill(path, described, parameter_set):
        pass
    return parameter_set


def _described(home: Path) -> Iterator[tuple[Path, Manifest]]:
    """The sound manifests that there are, the newest first."""
    for path in checkpoint.present(home):
        try:
            yield path, checkpoint.read(path)
        except Damaged as error:
            log.error("checkpoint is damaged; trying the one before", path=str(path), error=str(error))


def _base(described: list[tuple[Path, Manifest]], newest: State, version: int | None) -> tuple[Path, Manifest]:
    """The last checkpoint from which what was not undone since leads to the first state at a version; or to the first that
    is kept."""
    if version is None:
        return described[0]
    before = [
        (path, each)
        for path, each in described
        if each.state.position.version <= version and not newest.is_undone(each.state.events)
    ]
    there = [found for found in before if found[1].state.position.version == version]
    if there and newest.spec.journal is Journal.OFF:
        return there[-1]
    for path, each in before:
        if each.state.position.version < version or _is_first(each.state):
            return path, each
    if before:
        return before[-1]
    raise VersionNotKept(
        f"expected a version from {min(each.state.position.version for _, each in described)} on of {newest.spec.id!r}, since "
        f"which checkpoints are kept; got {version}. Start the server with a larger --checkpoints-kept to go back further"
    )


def _repeat_until(home: Path, parameter_set: ParameterSet, newest: State, version: int) -> None:
    for event in journal.read(home, parameter_set.events):
        if newest.is_undone(event.number):
            break
        parameter_set.repeat(event)
        if event.version == version:
            return
    raise VersionNotKept(
        f"expected a version of {newest.spec.id!r} that a checkpoint or a journal leads to; got {version}, and the last one "
        f"that can be had is {parameter_set.position.version}"
    )


def _is_first(state: State) -> bool:
    """Whether nothing that changes a state has happened since its last update."""
    progress, version = state.progress, state.position.version
    changed = version == state.policy_since or any(each.version == version for each in state.changes)
    return not (progress.accumulated or progress.skipped or changed)
