"""Verification: a data directory read as a restart would read it, without a server, and while one uses it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from optserve._errors import InvalidArgument
from optserve_server.storage import checkpoint, files, journal
from optserve_server.storage.tensors import Damaged

ATTEMPTS = 5  # at a journal to which a server may be writing
Progress = Callable[[int, int], None]  # bytes read, and bytes that there are
Note = Callable[[int], None]  # more bytes that were read

_DAMAGE = (Damaged, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A checkpoint, or a set without any, and what the journal has after it.

    `set_id` is None, and so are `version` and `event`, if nothing says them; `undone` is as in a State.
    `unfinished` is the first event that a crash cut short, which is no damage; `damage` is why a restart could not come
    back here.
    """

    directory: Path
    set_id: str | None = None
    version: int | None = None
    event: int | None = None
    undone: tuple[tuple[int, int], ...] = ()
    events: int = 0
    unfinished: int | None = None
    damage: str | None = None


def verify(path: Path, progress: Progress = lambda read, total: None) -> Iterator[Finding]:
    """What there is of every set below a path, the newest checkpoint of each first; raises OSError.

    Nothing is written or locked.
    """
    sets = path / "sets"
    if not sets.is_dir():
        raise NotADirectoryError(f"expected a server's data directory, with {sets.name!r} in it; got {path}")
    homes = [home for home in sorted(sets.iterdir()) if not home.name.endswith(files.CONDEMNED)]
    total, read = sum(map(_nbytes, homes)), 0

    def note(nbytes: int) -> None:
        nonlocal read
        read = min(read + nbytes, total)
        progress(read, total)

    for home in homes:
        yield from _set(home, note)
    progress(total, total)


def _set(home: Path, note: Note) -> list[Finding]:
    """What there is of a set; looked at again if it seems damaged, and a server has written a checkpoint meanwhile."""
    findings: list[Finding] = []
    for _ in range(ATTEMPTS):
        present = checkpoint.present(home)
        findings = _findings(home, present, note) if present else [_without(home)]
        sound = findings and all(each.damage is None for each in findings)
        if sound or checkpoint.present(home)[:1] == present[:1]:
            break
        note = _ignore
    return findings if home.exists() else []  # it was deleted


def _findings(home: Path, present: list[Path], note: Note) -> list[Finding]:
    found = [_checkpoint(path, note) for path in present]
    set_id, undone = next(((each.set_id, each.undone) for each in found if each.set_id is not None), (None, ()))
    findings = []
    for finding in found:
        after = checkpoint.event_of(finding.directory)
        until = min((last for _, last in undone if last >= after), default=None)  # history went back, and left a gap
        repeated = _journal(home, after, until, note if finding is found[-1] else _ignore)
        if finding.directory.exists():  # else a server has removed it since, and what came after it
            findings.append(
                replace(
                    finding,
                    set_id=set_id,
                    event=after,
                    events=repeated.events,
                    unfinished=repeated.unfinished,
                    damage=finding.damage or repeated.damage,
                )
            )
    return findings


def _checkpoint(path: Path, note: Note) -> Finding:
    try:
        state = checkpoint.read(path).state
    except InvalidArgument as error:  # another version's, or with a rule of one's own that is not known here
        return Finding(directory=path, damage=f"not readable here: {error}")
    except _DAMAGE as error:
        return Finding(directory=path, damage=_said(error))
    damage = None
    try:
        for nbytes in checkpoint.check(path):
            note(nbytes)
    except _DAMAGE as error:
        damage = _said(error)
    return Finding(
        directory=path, set_id=state.spec.id, version=state.position.version, undone=state.undone, damage=damage
    )


def _journal(home: Path, after: int, until: int | None, note: Note) -> Finding:
    """What the journal has after an event, until another if history went back then.

    Damage counts when it is found at the same place again: what is being written is not there whole.
    """
    finding, before = Finding(directory=home), None
    for _ in range(ATTEMPTS):
        finding = _journal_once(home, after, until, note)
        if finding.damage is None or finding == before:
            break
        before, note = finding, _ignore
    return finding


def _journal_once(home: Path, after: int, until: int | None, note: Note) -> Finding:
    events, unfinished, damage = 0, None, None

    def passed_over(path: Path, number: int) -> None:
        nonlocal unfinished
        unfinished = number

    try:
        for event in journal.read(home, after, passed_over) if after != until else ():
            events += 1
            if event.content is not None:
                note(sum(memoryview(part).nbytes for each in event.content.received for part in each.data))
            if event.number == until:
                break
    except _DAMAGE as error:
        damage = f"journal: {_said(error)}"
    return Finding(directory=home, events=events, unfinished=unfinished, damage=damage)


def _without(home: Path) -> Finding:
    """A set whose first checkpoint was never finished, which is no damage unless something happened to it since."""
    finding = _journal(home, 0, None, _ignore)
    damage = finding.damage or (
        f"no checkpoint, but {finding.events} events in its journal" if finding.events else None
    )
    return Finding(directory=home, events=finding.events, unfinished=finding.unfinished, damage=damage)


def _ignore(nbytes: int) -> None:
    """For what was counted before."""


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _nbytes(home: Path) -> int:
    kept = [file for path in checkpoint.present(home) for file in path.glob("*")]
    return sum(map(_size, kept + [path for _, path in journal.segments(home)]))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a server has removed it since
        return 0
