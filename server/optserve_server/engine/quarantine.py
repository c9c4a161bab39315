"""Quarantine: which pushes are outliers by their norms, and whose pushes are discarded for some updates."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from optserve.aggregation import Quarantine

MOST_STANDINGS = (
    65_536  # clients that are remembered; of more, those whose last outlier is the longest ago are forgotten
)


class Standing(NamedTuple):
    """A client's outliers in a row, and the version from which its pushes are judged again."""

    strikes: int
    until: int


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

    def judge(self, client_id: str, norm: float, version: int) -> str | None:
        """Why a client's push of some norm is discarded by a set at a version, or None; an outlier is a strike.

        To be asked once for each push: nothing is known of a norm until it is accepted.
        """
        standing = self.standings.get(client_id, Standing(0, 0))
        if version < standing.until:
            return (
                f"client {client_id!r} is in quarantine until version {standing.until}, after {self.quarantine.strikes} "
                f"outliers in a row; the set is at version {version}"
            )
        limit = self.limit
        self.standings.pop(client_id, None)
        if math.isfinite(norm) and norm <= limit:
            return None
        standing = self._struck(standing.strikes + 1, version)
        self.standings[client_id] = standing
        if len(self.standings) > MOST_STANDINGS:
            del self.standings[next(iter(self.standings))]
        return self._outlier(client_id, norm, limit, standing)

    def accept(self, norms: Iterable[float]) -> None:
        """Remember the norms of pushes that became part of an update, in an order that does not depend on time."""
        self.norms = (*self.norms, *norms)[-self.quarantine.window :]

    def quarantined(self, version: int) -> dict[str, int]:
        """The clients that are in quarantine when the set is at a version, and until which."""
        return {client: standing.until for client, standing in self.standings.items() if version < standing.until}

    def copy(self) -> "Watch":
        """The same in memory of its own."""
        return Watch(self.quarantine, self.norms, dict(self.standings))

    def _struck(self, strikes: int, version: int) -> Standing:
        """Where a client stands after so many outliers in a row."""
        if strikes < self.quarantine.strikes:
            return Standing(strikes, 0)
        return Standing(0, version + self.quarantine.updates)

    def _outlier(self, client_id: str, norm: float, limit: float, standing: Standing) -> str:
        bound = "finite"
        if limit < math.inf:
            bound = f"at most {limit:.6g}, {self.quarantine.factor:g} times the median of those accepted last"
        count = standing.strikes or self.quarantine.strikes
        follows = f"; client {client_id!r} is in quarantine until version {standing.until}" if standing.until else ""
        return f"expected a gradient norm that is {bound}; got {norm:.6g}, outlier {count} in a row{follows}"
