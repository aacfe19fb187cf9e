"""The result of a comparison of served inputs with expected inputs: counts by feature and kind, with examples."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.skew.drift import DriftReport

MOST_EXAMPLES = 5
"""Largest number of examples of one difference."""


@dataclass
class SkewDifference:
    """Difference of one feature.

    Attributes:
        feature: Name of the feature, or `history`, `content`, `context`, `log offset`, `score`.
        kind: Kind of the difference:

            - `absent`: The server read no value, and there is a value.
            - `unexpected`: The server read a value, and there is none.
            - `differs`: The server read another value.
            - `other version`: The row of the table has the vector of an earlier or a later version.
            - `damaged row`: The row of the table has the vector of no version.
            - `cut`: The history lacks its beginning.
            - `late`: The server was behind the log by more than the allowed time.
        count: Number of values that differ.
        examples: First differences: request, item, and what was served and expected.
    """

    feature: str
    kind: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[dict[str, Any]]) -> None:
        """Counts values that differ. Keeps the first examples."""
        self.count += count
        for example in examples:
            if len(self.examples) >= MOST_EXAMPLES:
                break
            self.examples.append(example)


@dataclass
class SkewReport:
    """Result of a comparison.

    Attributes:
        bundle: Id of the bundle.
        requests: Number of compared requests.
        differing: Number of requests with a difference.
        values: Number of compared values: features of each candidate, rows, histories and scores.
        undecided: Number of values that the stream changed while the server read, and that equal no single state.
        skipped: Number of records that were not compared, by reason.
        first_ms, last_ms: Times of the first and the last compared answer, milliseconds since 1970. 0 without any.
        differences: Differences, the most frequent first.
        drift: Comparison of distributions with training's. None: not compared.
    """

    bundle: str
    requests: int = 0
    differing: int = 0
    values: int = 0
    undecided: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_ms: int = 0
    last_ms: int = 0
    differences: list[SkewDifference] = field(default_factory=list)
    drift: DriftReport | None = None

    @property
    def different(self) -> int:
        """Number of values that differ."""
        return sum(difference.count for difference in self.differences)

    def difference(self, feature: str, kind: str) -> SkewDifference:
        """Returns the difference of a feature and a kind, a new one at first."""
        for known in self.differences:
            if (known.feature, known.kind) == (feature, kind):
                return known
        self.differences.append(SkewDifference(feature, kind))
        return self.differences[-1]

    def answered(self, time_ms: int) -> None:
        """Counts a compared request."""
        self.requests += 1
        self.first_ms = min(self.first_ms or time_ms, time_ms)
        self.last_ms = max(self.last_ms, time_ms)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, with the number of values that differ."""
        drift = None if self.drift is None else self.drift.to_json()
        return asdict(self) | {"different": self.different, "skipped": dict(self.skipped), "drift": drift}
