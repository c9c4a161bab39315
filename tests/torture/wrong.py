"""`python -m tests.torture.wrong`: servers and workers that are wrong on purpose, and the checks that must see it.

Each entry changes one function of ours, in every child process of its check. The check must pass without the change, and fail
with it: else it would not find the mistake if somebody made it. Further entries are further rows of the table.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import dropped_acks, restarts
from tests.torture import rounds as orders
from tests.torture.children import call
from tests.torture.script import report

from optserve import _session
from optserve_server.engine import engine, rounds, sessions
from optserve_server.storage import checkpoint, journal
from optserve_server.storage import directory as storage


@dataclass(frozen=True)
class Wrong:
    """A mistake, by what it says: `apply` makes it in this process; `check` gets a directory, and the mistake's name."""

    says: str
    apply: Callable[[], None]
    check: Callable[..., None]


def check_rounds(directory: Path, *, wrong: str | None = None) -> None:
    call(orders.check, wrong=wrong)


def check_dropped_acks(directory: Path, *, wrong: str | None = None) -> None:
    dropped_acks.run(8, directory, wrong=wrong).check()


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let a function be another one, made from it."""
    setattr(owner, name, make(getattr(owner, name)))


def forget_sessions() -> None:
    replace(
        sessions.Sessions, "restore", lambda restore: lambda self, sessions, forgotten: restore(self, [], forgotten)
    )


def keep_the_incarnation() -> None:
    replace(engine, "_new_incarnation", lambda new: lambda: 1)


def forget_pushes_of_the_journal() -> None:
    def resume(self: Any, client_id: str, epoch: int) -> Any:
        return sessions.Session(client_id, epoch)

    replace(sessions.Sessions, "resume", lambda _: resume)


def ignore_the_journal() -> None:
    replace(storage, "_repeat", lambda repeat: lambda home, parameter_set, note: None)


def write_after_acknowledging() -> None:
    """Each event is written when the next one comes."""

    def append_the_one_before(append: Callable[..., None]) -> Callable[..., None]:
        def changed(self: Any, new: Any) -> None:
            if before := vars(self).get("before"):
                append(self, before)
            self.before = new

        return changed

    def wait_for_the_one_before(wait: Callable[..., None]) -> Callable[..., None]:
        return lambda self, number: wait(self, min(number, self._last))

    replace(journal.Journal, "append", append_the_one_before)
    replace(journal.Journal, "wait", wait_for_the_one_before)


def keep_too_little_of_the_journal() -> None:
    def changed(remove: Callable[..., None]) -> Callable[..., None]:
        return lambda home, event: remove(home, checkpoint.event_of(checkpoint.present(home)[0]))

    replace(journal, "remove_before", changed)


def send_again_as_new() -> None:
    def changed(adopt: Callable[..., Any]) -> Callable[..., Any]:
        def adopt_without_receipt(self: Any, opened: Any, exchange: Any) -> Any:
            missing = adopt(self, opened, exchange)
            exchange.receipt = None
            return missing

        return adopt_without_receipt

    replace(_session.Session, "_adopt", changed)


def apply_duplicates() -> None:
    def changed(admit: Callable[..., Any]) -> Callable[..., Any]:
        def admit_duplicate(self: Any, sequence: int, digest: bytes) -> Any:
            return None if sequence in self.receipts else admit(self, sequence, digest)

        return admit_duplicate

    replace(sessions.Session, "admit", changed)


def accept_gaps() -> None:
    def changed(admit: Callable[..., Any]) -> Callable[..., Any]:
        def admit_later(self: Any, sequence: int, digest: bytes) -> Any:
            return None if sequence > self.last_sequence else admit(self, sequence, digest)

        return admit_later

    replace(sessions.Session, "admit", changed)


def reduce_as_they_come() -> None:
    def take(self: Any) -> list[Any]:
        together = list(self._waiting.values())
        self._waiting.clear()
        return together

    replace(rounds.Rounds, "_take", lambda _: take)


WRONG = {
    "forgotten-sessions": Wrong(
        "a checkpoint has the parameters, but not who pushed what", forget_sessions, restarts.check_without_journal
    ),
    "same-incarnation": Wrong(
        "a server that came back with less does not say so", keep_the_incarnation, restarts.check_that_readers_are_told
    ),
    "journal-ignored": Wrong("the journal is not repeated", ignore_the_journal, restarts.check_with_journal),
    "journal-without-sessions": Wrong(
        "the journal is repeated, but not who pushed what", forget_pushes_of_the_journal, restarts.check_with_journal
    ),
    "journal-behind": Wrong(
        "a push is acknowledged before it is in the journal", write_after_acknowledging, restarts.check_with_journal
    ),
    "journal-too-short": Wrong(
        "the journal is kept since the newest checkpoint only",
        keep_too_little_of_the_journal,
        restarts.check_with_damage,
    ),
    "new-sequence": Wrong("a push is sent again as a new one", send_again_as_new, check_dropped_acks),
    "duplicates-applied": Wrong("a push that comes again is applied again", apply_duplicates, check_dropped_acks),
    "gaps-accepted": Wrong(
        "a push is taken though others before it are missing",
        accept_gaps,
        restarts.check_that_counting_workers_are_told,
    ),
    "order-of-arrival": Wrong("a round adds up pushes as they come", reduce_as_they_come, check_rounds),
}


def seen(name: str) -> str:
    """How the check of an entry fails with its change; raises AssertionError if it does not, or if it does without."""
    entry = WRONG[name]
    with tempfile.TemporaryDirectory(prefix="optserve-right-") as directory:
        entry.check(Path(directory))
    with tempfile.TemporaryDirectory(prefix="optserve-wrong-") as directory:
        try:
            entry.check(Path(directory), wrong=name)
        except AssertionError as failure:
            return str(failure)
    raise AssertionError(f"nothing sees that {entry.says}")


if __name__ == "__main__":
    sys.exit(report("python -m tests.torture.wrong", __doc__, WRONG, seen))
