"""Quarantine: which pushes are outliers by their norms, and whose pushes are discarded for some updates."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from optserve._errors import WorkerQuarantined
from optserve.aggregation import Quarantine

MOST_STANDINGS = (
    65_536  # clients that are remembered; of more, those whose last outlier is the longest ago are forgotten
)


class Standing(NamedTuple):
    """A client's outliers in a row, and the version from which its pushes are judged again."""

    strikes: int = 0
    until: int = 0


@dataclass(slots=True)
class Watch:
    """What a set remembers of norms, and of the clients whose last push was an outlier; see `optserve.aggregation.Quarantine`.

    `norms` are those accepted last, the oldest first. What it says depends on nothing but that and what it was told.
    """

    quarantine: Quarantine
    norms: tuple[float, ...] = ()
    standings: dict[str, Standing] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """The largest norm that is no outlier; infinity while there is nothing to judge by."""
        median = statistics.median(self.norms) if len(self.norms) >= self.quarantine.least else 0.0
        return self.quarantine.factor * median or math.inf

    def bars(self, client_id: str, version: int) -> bool:
        """Whether a client is in quarantine while the set is at a version."""
        return version < self.standings.get(client_id, Standing()).until

    def judge(self, client_id: str, norm: float, version: int) -> None:
        """Raises WorkerQuarantined for a push that is to be discarded; one that is an outlier is a strike.

        A push that is not discarded may be judged again, to the same end; its norm counts once it is accepted.
        """
        standing = self.standings.get(client_id, Standing())
        if version < standing.until:
            raise WorkerQuarantined(
                f"client {client_id!r} is in quarantine until version {standing.until}, after {self.quarantine.strikes} "
                f"outliers in a row; the set is at version {version}"
            )
        limit = self.limit
        self.standings.pop(client_id, None)
        if not (math.isfinite(norm) and norm <= limit):
            raise WorkerQuarantined(self._strike(client_id, standing.strikes + 1, version, norm, limit))

    def accept(self, norms: Iterable[float]) -> None:
        """Remember the norms of pushes that became part of an update, in an order that does not depend on time."""
        self.norms = (*self.norms, *norms)[-self.quarantine.window :]

    def copy(self) -> "Watch":
        """The same in memory of its own."""
        return Watch(self.quarantine, self.norms, dict(self.standings))

    def _strike(self, client_id: str, strikes: int, version: int, norm: float, limit: float) -> str:
        """Count a client's outlier, and say what follows."""
        bound, follows = "finite", ""
        if limit < math.inf:
            bound = f"at most {limit:.6g}, {self.quarantine.factor:g} times the median of those accepted last"
        self.standings[client_id] = Standing(strikes)
        if strikes >= self.quarantine.strikes:
            until = version + self.quarantine.updates
            self.standings[client_id] = Standing(0, until)
            follows = f"; client {client_id!r} is in quarantine until version {until}"
        if len(self.standings) > MOST_STANDINGS:
            del self.standings[next(iter(self.standings))]
        return f"expected a gradient norm that is {bound}; got {norm:.6g}, outlier {strikes} in a row{follows}"
