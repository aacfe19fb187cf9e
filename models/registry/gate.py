"""The gates that a new bundle must pass to become the challenger. Both bundles are measured on the same test set.

The functions are pure. They compare measurements with limits, and report a limit that is exceeded with confidence or
that the test set cannot decide.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from models.ranker.evaluate import Quality
from models.registry.paired_test import Drop, Drops

LEAST_ROWS = 200
"""Smallest number of rows of a slice with a gate. Rows on which a bundle was trained do not count."""
_ALL = "all"
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
    """

    auc: float = 0.002
    ne: float = 0.005
    calibration: float = 0.01
    slice_auc: float = 0.02
    latency: float = 1.5
    bytes: float = 2.0
    sure: float = 0.02
    alpha: float = 0.05


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
    champion: BundleQuality, challenger: BundleQuality, gates: Gates, tested: dict[str, Drops | None]
) -> list[Check]:
    """Compares two bundles on one test set.

    Args:
        champion: Measurements of the champion.
        challenger: Measurements of the challenger.
        gates: Limits.
        tested: Loss of the challenger with its standard error, by slice. None if a slice cannot be tested.
    """
    deciding = [
        part for part in champion.quality if champion.quality[part].rows >= LEAST_ROWS and tested.get(part) is not None
    ]
    # The whole has three gates of quality and a slice has one, so each gate gets its share of α (Bonferroni).
    alpha = gates.alpha / max(len(deciding) + (2 if _ALL in deciding else 0), 1)
    checks: list[Check] = []
    for part in champion.quality:
        old, new = champion.quality[part], challenger.quality[part]
        drops = tested[part] if part in deciding else None
        allowed = gates.auc if part == _ALL else gates.slice_auc
        compared = _tested(f"{part}: AUC", old.auc, new.auc, -allowed, drops.auc if drops else None, alpha)
        auc = replace(compared, rows=old.rows)
        if part == _ALL:
            told = auc.high is not None and auc.high <= max(gates.sure, gates.auc)
            checks.append(replace(auc, told=told))
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
    for name, before, after, ratio in (
        ("latency ms, 500 candidates", champion.latency_ms, challenger.latency_ms, gates.latency),
        ("bytes", float(champion.bytes), float(challenger.bytes), gates.bytes),
    ):
        checks.append(_at_most(name, before, after, before * (ratio - 1)))
    return checks


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
