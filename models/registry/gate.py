"""The gates that a new bundle must pass to become the challenger. Both bundles are measured on the same test set.

The functions are pure. They compare measurements with limits, and report a limit that is exceeded with confidence or
that the test set cannot decide.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from features.config import nearest
from features.errors import DatasetError
from models.encoder.judging.measures import MEASURES
from models.ranker.evaluate import Quality
from models.registry.paired_test import Drop, Drops

LEAST_ROWS = 200
"""Smallest number of rows of a slice with a gate. Rows on which a bundle was trained do not count."""
_ALL = "all"
SKEW_MEASURES = {
    "different": "served values that differ from snapshot and log",
    "alarms": "distributions that alarm",
    "psi": "largest population stability index that its interval surely exceeds",
}
"""Measures of a report of `tessera skew` that a gate may name."""
Answer = Literal["passed", "worse", "cannot tell"]


@dataclass(frozen=True)
class Gates:
    """Limits on how much worse a challenger may be than the champion.

    A test set is a sample, so a challenger is refused only if it is worse than the limit with confidence. An equal
    challenger is refused in at most a share `alpha` of all cases, over all gates of quality together.

    Attributes:
        auc: Largest drop of AUC on the whole test set.
        ne: Largest rise of normalized entropy on the whole test set, as a share of the champion's.
        calibration: Largest rise of the expected calibration error.
        slice_auc: Largest drop of AUC on a slice: new items, rare items, new users.
        latency: Largest ratio of the time to score 500 candidates to the champion's time.
        bytes: Largest ratio of the size of table and network to the champion's size.
        sure: Drop of AUC on the whole test set that the test must exclude. If it cannot, the answer is `cannot tell`.
        alpha: Probability of refusing an equal challenger.
        encoder: Largest drop of measures of the encoder by name, such as `{"recall_new": 0.02}`; see
            `models.encoder.judging.measures`. A measure without a limit is not tested.
        skew: Largest values of measures of what the champion serves, such as `{"alarms": 0}`; see `SKEW_MEASURES`.

    Raises:
        DatasetError: A measure of the encoder or of the skew is unknown, or its limit is negative.
    """

    auc: float = 0.002
    ne: float = 0.005
    calibration: float = 0.01
    slice_auc: float = 0.02
    latency: float = 1.5
    bytes: float = 2.0
    sure: float = 0.02
    alpha: float = 0.05
    encoder: Mapping[str, float] = field(default_factory=dict)
    skew: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table, limits, known, of in (
            ("encoder", self.encoder, tuple(MEASURES), "drop"),
            ("skew", self.skew, tuple(SKEW_MEASURES), "value"),
        ):
            for name, limit in limits.items():
                if name not in known:
                    near, valid = nearest(name, known), ", ".join(known)
                    raise DatasetError(
                        f"gates.{table}.{name}: no such measure; the nearest is {near!r} (valid: {valid})"
                    )
                if not limit >= 0:
                    raise DatasetError(f"gates.{table}.{name}: expected the largest {of}, 0 or more, got {limit:g}")


class EncoderMeasure(NamedTuple):
    """Measure of two encoders on the same queries.

    Attributes:
        champion: Mean of the champion's scores, None if no query was asked.
        challenger: Mean of the challenger's scores, None if no query was asked.
        drop: Loss of the challenger. None if there are too few queries for a test.
        queries: Number of queries.
    """

    champion: float | None
    challenger: float | None
    drop: Drop | None
    queries: int


@dataclass(frozen=True)
class BundleQuality:
    """Measurements of one bundle on the test set.

    Attributes:
        bundle: Id of the bundle.
        quality: Quality by slice. `all` is the whole test set. Only rows on which neither bundle was trained count.
        latency_ms: Median time to score 500 candidates, milliseconds.
        bytes: Size of table and network, bytes.
    """

    bundle: str
    quality: dict[str, Quality]
    latency_ms: float
    bytes: int


@dataclass(frozen=True)
class Check:
    """Result of one gate.

    Attributes:
        name: Name of the slice and the measure.
        champion: Measure of the champion, None if it is undefined.
        challenger: Measure of the challenger, None if it is undefined.
        limit: Worst allowed measure of the challenger. None: the comparison is only shown.
        passed: False if the challenger exceeds the limit with confidence.
        low, high: Confidence bounds of the challenger's loss. None without a test.
        told: True if the test set is large enough to decide.
        rows: Number of test rows that decide. None if no rows are measured, and in verdicts of earlier releases.
    """

    name: str
    champion: float | None
    challenger: float | None
    limit: float | None
    passed: bool
    low: float | None = None
    high: float | None = None
    told: bool = True
    rows: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Results of all gates.

    Attributes:
        champion: Id of the champion's bundle.
        challenger: Id of the challenger's bundle.
        checks: Results of the gates.
        note: Remark on the test set, or "".
        storage: AUC on the whole test set, by the format of the rows in the store.
    """

    champion: str
    challenger: str
    checks: list[Check]
    note: str = ""
    storage: dict[str, float] = field(default_factory=dict)

    @property
    def answer(self) -> Answer:
        """`worse` if any gate fails, `cannot tell` if the test set is too small to decide, or else `passed`."""
        if not all(check.passed for check in self.checks):
            return "worse"
        return "passed" if all(check.told for check in self.checks) else "cannot tell"

    @property
    def passed(self) -> bool:
        return self.answer == "passed"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "answer": self.answer}


def judge(
    champion: BundleQuality,
    challenger: BundleQuality,
    gates: Gates,
    tested: dict[str, Drops | None],
    encoders: Mapping[str, EncoderMeasure] | None = None,
) -> list[Check]:
    """Compares two bundles on one test set.

    Args:
        champion: Measurements of the champion.
        challenger: Measurements of the challenger.
        gates: Limits.
        tested: Loss of the challenger with its standard error, by slice. None if a slice cannot be tested.
        encoders: Measures of both encoders, for each name in `gates.encoder`.
    """
    measured = encoders or {}
    deciding = [
        part for part in champion.quality if champion.quality[part].rows >= LEAST_ROWS and tested.get(part) is not None
    ]
    # The whole has three gates of quality and a slice has one, so each gate gets its share of α (Bonferroni).
    told = sum(one.drop is not None for one in measured.values())
    alpha = gates.alpha / max(len(deciding) + (2 if _ALL in deciding else 0) + told, 1)
    checks: list[Check] = []
    for part in champion.quality:
        old, new = champion.quality[part], challenger.quality[part]
        drops = tested[part] if part in deciding else None
        allowed = gates.auc if part == _ALL else gates.slice_auc
        compared = _tested(f"{part}: AUC", old.auc, new.auc, -allowed, drops.auc if drops else None, alpha)
        auc = replace(compared, rows=old.rows)
        if part == _ALL:
            checks.append(_told(auc, gates.sure, gates.auc))
            rise = (old.normalized_entropy or 0.0) * gates.ne
            checks += [
                _tested(
                    f"{part}: NE",
                    old.normalized_entropy,
                    new.normalized_entropy,
                    rise,
                    drops.entropy if drops else None,
                    alpha,
                ),
                _tested(
                    f"{part}: calibration error",
                    old.calibration_error,
                    new.calibration_error,
                    gates.calibration,
                    drops.calibration if drops else None,
                    alpha,
                ),
            ]
        else:
            checks.append(auc)
            checks.append(Check(f"{part}: NE", old.normalized_entropy, new.normalized_entropy, None, True))
    for name, one in measured.items():
        limit = gates.encoder[name]
        compared = _tested(f"encoder.{name}", one.champion, one.challenger, -limit, one.drop, alpha)
        # The descriptor names this measure, so a measure without a test leaves the answer open.
        checks.append(replace(_told(compared, gates.sure, limit), rows=one.queries))
    for name, before, after, ratio in (
        ("latency ms, 500 candidates", champion.latency_ms, challenger.latency_ms, gates.latency),
        ("bytes", float(champion.bytes), float(challenger.bytes), gates.bytes),
    ):
        checks.append(_at_most(name, before, after, before * (ratio - 1)))
    return checks


def _told(check: Check, sure: float, limit: float) -> Check:
    """Returns a check that is told only if the test excludes a loss beyond `sure` and the limit."""
    return replace(check, told=check.high is not None and check.high <= max(sure, limit))


def _tested(name: str, old: float | None, new: float | None, allowed: float, drop: Drop | None, alpha: float) -> Check:
    """Returns a gate that fails if the challenger is worse than allowed with confidence.

    Args:
        name: Name of the gate.
        old, new: Measures of the champion and of the challenger.
        allowed: Allowed change of the measure, negative if a larger measure is better.
        drop: Loss of the challenger. None: the comparison is only shown.
        alpha: Probability of refusing an equal challenger.
    """
    if old is None or new is None or drop is None:
        return Check(name, old, new, None, True)
    low, high = drop.bounds(alpha)
    return Check(name, old, new, old + allowed, low <= abs(allowed), low, high)


def _at_most(name: str, old: float, new: float, rise: float) -> Check:
    return Check(name, old, new, old + rise, new <= old + rise)
