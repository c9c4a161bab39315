"""Members: the workers of a set that others wait for, as long as something is heard of them."""

import datetime
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from optserve._results import Worker
from optserve_server.engine.sessions import Session

BARRED = 65_536  # at most; the first is forgotten first


@dataclass(eq=False, slots=True)
class Member:
    """One worker, since it joined: `clock` counts pushes that were decided on, for who is ahead of whom; `version` is the one
    that the last of them led to."""

    session: Session
    clock: int
    join_time: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    pushes: int = 0
    staleness: int | None = None
    version: int = -1


class Members:
    """The members of one set, by client. Every method is called under the set's lock.

    One that leaves, or is not heard of during a `lease`, in seconds, leaves a vacancy, which the next that joins fills. What it
    has read until then is `barred` at the version of that time: others have not waited for it since.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._members: dict[str, Member] = {}
        self._barred: dict[str, int] = {}
        self._due = math.inf  # no lease ends before; looked for anew only then, as leases only get longer
        self.vacancies = 0

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def join(self, session: Session) -> Member:
        """Be a member, or stay one. Who joins begins beside the slowest."""
        member = self._members.get(session.client_id)
        if member is None:
            slowest = min((each.clock for each in self._members.values()), default=0)
            member = self._members[session.client_id] = Member(session, slowest)
            self.vacancies = max(0, self.vacancies - 1)
        member.session = session
        self._due = min(self._due, self._end(member))
        return member

    def leave(self, client_id: str, version: int) -> None:
        """Be no member any more. Once the last one has left, nobody is missing: whoever comes next begins anew."""
        self.dismiss(client_id, version)
        if not self._members:
            self.vacancies = 0

    def dismiss(self, client_id: str, version: int) -> None:
        """Count a member as gone."""
        if self._members.pop(client_id, None) is None:
            return
        self.vacancies += 1
        self._barred.pop(client_id, None)
        self._barred[client_id] = version
        if len(self._barred) > BARRED:
            del self._barred[next(iter(self._barred))]

    def lapse(self, version: int) -> list[str]:
        """Those whose lease has ended, who are no members any more."""
        now = time.monotonic()
        if now < self._due:
            return []
        lapsed = [client_id for client_id, each in self._members.items() if self._end(each) <= now]
        for client_id in lapsed:
            self.dismiss(client_id, version)
        self._due = min(map(self._end, self._members.values()), default=math.inf)
        return lapsed

    @property
    def remaining(self) -> float:
        """Seconds until the next lease may end; one may begin now, as a worker joins or waits no more."""
        return min(self._lease, max(0.0, self._due - time.monotonic()))

    def barred(self, client_id: str) -> int | None:
        """The version at which a worker was counted as gone, unless it has pushed since."""
        return self._barred.get(client_id)

    def took_part(self, client_id: str, version: int) -> bool:
        """Whether a worker's own push led to a version."""
        member = self._members.get(client_id)
        return member is not None and member.version == version

    def pushed(self, session: Session, staleness: int | None, version: int) -> None:
        """A push was decided on, which led to a version."""
        self._barred.pop(session.client_id, None)
        member = self.join(session)
        member.pushes += 1
        member.clock += 1
        member.staleness, member.version = staleness, version

    def behind(self, session: Session, bound: int) -> list[str]:
        """Members more than `bound` pushes behind one."""
        member = self._members.get(session.client_id)
        if member is None:
            return []
        return [client_id for client_id, each in self._members.items() if member.clock - each.clock > bound]

    def describe(self) -> list[Worker]:
        """The members, ordered by client id; who is quarantined, others know."""
        now = time.monotonic()
        return [
            Worker(
                client_id=client_id,
                join_time=member.join_time,
                idle=0.0 if member.session.waits else max(0.0, now - member.session.seen),
                pushes=member.pushes,
                staleness=member.staleness,
                waiting=member.session.waits,
            )
            for client_id, member in sorted(self._members.items())
        ]

    def _end(self, member: Member) -> float:
        """When a lease ends; while its worker is made to wait, never sooner than in a whole one."""
        return (time.monotonic() if member.session.waits else member.session.seen) + self._lease
