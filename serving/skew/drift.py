"""Watches the distributions of served features and scores against a profile, and raises alarms that stay valid.

An observation is a user's first sampled request of a window. `serving.skew.evidence` holds the statistics.

Shape letters: M measures, C cells, n candidates.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from features.hashing import fingerprint
from models.bundle.scorer import divided
from models.profile.profile import (
    SCORE,
    VERSION,
    FeatureValues,
    ProfileMeasure,
    TrainingProfile,
    category_values,
    effective,
    number_values,
    observed,
    unit_shares,
)
from models.table.batch import Batch
from models.table.schema import Feature, Schema
from serving.skew.alarm import DriftAlarms, DriftLimits
from serving.skew.evidence import Floats, ToleratedShares, psi
from serving.skew.interval import harmonic, psi_interval
from serving.skew.record import SkewRecord


@dataclass(frozen=True)
class DriftMeasure:
    """Comparison of one measure.

    Attributes:
        feature: Name of the feature, or `score`.
        measure: `values`, `missing`, `unseen` or `length`.
        users: Number of users that have the measure.
        psi: Population stability index.
        psi_low, psi_high: Interval of the index that holds the true one in 95 % of looks. None if it is unknown.
        distance: Kolmogorov and Smirnov's distance of numbers, lengths and scores, total variation of the others.
        trained, served: Share of missing or unseen values. For other measures the shares of the cell that differs most.
        cell: Cell that differs most, for messages.
        limit: Largest PSI that is no alarm, or largest share, with the allowance for the size of the sample.
        evidence: Natural logarithm of the largest evidence after any user, against all tolerated distributions.
        alarm: True if the evidence reached the limit.
    """

    feature: str
    measure: str
    users: int
    psi: float
    psi_low: float | None
    psi_high: float | None
    distance: float
    trained: float
    served: float
    cell: str
    limit: float
    evidence: float
    alarm: bool

    @property
    def name(self) -> str:
        """Name of feature and measure for messages."""
        return self.feature if self.measure == "values" else f"{self.feature} {self.measure}"


@dataclass(frozen=True)
class DriftReport:
    """Result of a look.

    Attributes:
        bundle: Id of the bundle.
        reference: Name of the profile, `training` or a path.
        since_ms: Start of the window, milliseconds since 1970.
        users: Number of users, each with its first sampled request.
        repeated: Number of further requests of the same users, which are not counted.
        reference_users: Number of users of the profile.
        measures: Measures, alarms first, then by PSI.
        note: Reason why nothing was compared, or "".
    """

    bundle: str
    reference: str = "training"
    since_ms: int = 0
    users: int = 0
    repeated: int = 0
    reference_users: int = 0
    measures: tuple[DriftMeasure, ...] = field(default=())
    note: str = ""

    @property
    def alarms(self) -> tuple[DriftMeasure, ...]:
        return tuple(measure for measure in self.measures if measure.alarm)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, with the names of the measures that alarm."""
        return asdict(self) | {"alarms": [measure.name for measure in self.alarms]}


class DriftWatch:
    """Watch of one window: sums over users, and what has alarmed.

    Args:
        schema: Schema of the bundle.
        profile: Distributions to compare with.
        bundle: Id of the bundle. Records of other bundles are ignored.
        limits: Tolerances of the alarms. None: the defaults.
        reference: Name of the profile in reports.
        since_ms: Start of the window, milliseconds since 1970.
        varying: Names of the events' features that differ between candidates.
    """

    def __init__(
        self,
        schema: Schema,
        profile: TrainingProfile,
        *,
        bundle: str,
        limits: DriftLimits | None = None,
        reference: str = "training",
        since_ms: int = 0,
        varying: Collection[str] = (),
    ) -> None:
        self._schema, self._profile = schema, profile
        self._own, self._shared = divided(schema, varying)
        self._about = DriftReport(bundle, reference, since_ms, reference_users=profile.users)
        self._sums = [np.zeros((2, len(one.shares))) for one in profile.measures]
        self._users = np.zeros(len(profile.measures), dtype=np.int64)
        self._seen: set[int] = set()
        self._repeated = 0
        self._alarms = DriftAlarms(profile.measures, limits or DriftLimits())

    def add(self, records: Iterable[SkewRecord]) -> None:
        """Counts the first request of each user. Records of other bundles and stale answers are ignored."""
        added: dict[int, list[Floats]] = defaultdict(list)
        for record in sorted(records, key=lambda record: record.time_ms):
            if record.bundle != self._about.bundle or record.stale or not record.candidates:
                continue
            # Requests without a user's id are users of their own.
            key = int(fingerprint([record.user or f"\0{record.id}"])[0])
            if key in self._seen:
                self._repeated += 1
                continue
            self._seen.add(key)
            for number, shares in self._shares(record):
                added[number].append(shares)
        for number, several in added.items():
            shares = np.concatenate(several)
            self._sums[number] += [shares.sum(axis=0), (shares**2).sum(axis=0)]
            self._users[number] += len(shares)
            self._alarms.add(number, shares)

    def look(self) -> DriftReport:
        """Compares all users so far with the profile. Earlier alarms of the window remain."""
        evidence = self._alarms.evidence()
        found = [
            self._measured(number, float(evidence[number])) for number in range(len(self._sums)) if self._users[number]
        ]
        found.sort(key=lambda one: (not one.alarm, -one.psi))
        about = asdict(self._about) | {"users": len(self._seen), "repeated": self._repeated, "measures": tuple(found)}
        return DriftReport(**about)

    def profile(self) -> TrainingProfile:
        """Returns a profile of the counted users, in the cells of this watch's profile."""
        measures = []
        for number, one in enumerate(self._profile.measures):
            (sums, _), users = self._sums[number], int(self._users[number])
            if users:
                shares, units = (sums / users).tolist(), self._effective(number)
                measures.append(ProfileMeasure(one.feature, one.measure, shares, units, edges=one.edges, rows=one.rows))
        return TrainingProfile(VERSION, len(self._seen), len(self._seen), 0, measures)

    def _shares(self, record: SkewRecord) -> Iterator[tuple[int, Floats]]:
        """Yields the number of each measure that a record has, and its shares (1, C)."""
        values = self._values_of(record)
        for number, one in enumerate(self._profile.measures):
            found = observed(one, values[one.feature]) if one.feature in values else None
            if found is None:
                continue
            size = int(found.example.max(initial=-1)) + 1
            shares = unit_shares(found, np.zeros(size, dtype=np.int64), 1, len(one.shares))
            if len(shares):
                yield number, shares

    def _effective(self, number: int) -> float:
        """Returns the effective number of users of a measure."""
        users, (sums, squares) = int(self._users[number]), self._sums[number]
        mean = sums / users
        return effective(users, mean, squares / users - mean**2, most=users * 1_000.0)

    def _values_of(self, record: SkewRecord) -> dict[str, FeatureValues]:
        """Returns the values that a server read, by feature."""
        schema, lookups = self._schema, record.lookups(visits=None, content=None)
        parts: tuple[tuple[Literal["shared", "own"], Batch, tuple[Feature, ...]], ...] = (
            ("shared", lookups.shared, self._shared),
            ("own", lookups.own, self._own),
        )
        values: dict[str, FeatureValues] = {}
        for part, batch, features in parts:
            unread = record.unread(part, len(features))
            values |= dict(category_values(schema, batch, features, lookups.rows, unread=unread))
        numbers = record.numbers()
        values |= {one.name: number_values(numbers[:, place]) for place, one in enumerate(schema.numeric)}
        values[SCORE] = number_values(record.probabilities)
        return values

    def _measured(self, number: int, evidence: float) -> DriftMeasure:
        one, users = self._profile.measures[number], int(self._users[number])
        trained, served = np.array(one.shares), self._sums[number][0] / users
        change = served - trained
        index = float(psi(served, trained))
        low, high = psi_interval(index, len(served), harmonic(self._effective(number), one.units))
        cell = 1 if one.is_share else int(np.abs(change).argmax())
        tolerated = self._alarms.tolerated[number]
        if isinstance(tolerated, ToleratedShares):
            limit = tolerated.low if served[1] < trained[1] else tolerated.high
        else:
            limit = tolerated.size
        return DriftMeasure(
            feature=one.feature,
            measure=one.measure,
            users=users,
            psi=round(index, 6),
            psi_low=low,
            psi_high=high,
            distance=round(float(np.abs(np.cumsum(change)).max() if one.ordered else np.abs(change).sum() / 2), 6),
            trained=round(float(trained[cell]), 6),
            served=round(float(served[cell]), 6),
            cell=_cell_name(one, cell),
            limit=round(limit, 6),
            evidence=round(evidence, 4),
            alarm=evidence >= self._alarms.enough,
        )


def _cell_name(one: ProfileMeasure, cell: int) -> str:
    if one.is_share:
        return one.measure
    if not one.ordered:
        return f"row {one.rows[cell]}" if cell < len(one.rows) else "all other values"
    if cell == len(one.edges):
        return f"above {one.edges[-1]:.4g}"
    return f"up to {one.edges[cell]:.4g}"
