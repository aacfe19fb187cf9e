"""The gates between a trained bundle and the right to challenge the champion: both measured on one test set.

Pure: takes measures, says what is surely worse beyond which threshold, and where the test set cannot tell.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from models.ranker.evaluate import Quality
from models.registry.paired_test import Drop, Drops

# With fewer rows that neither bundle was trained on there is no verdict. A smaller slice is shown, and decides nothing.
LEAST_ROWS = 200
_ALL = "all"
Answer = Literal["passed", "worse", "cannot tell"]


@dataclass(frozen=True)
class Gates:
    """Limits on how much worse a challenger may be than the champion.

    Quality is compared on a sample of the world, so a challenger is refused only where it is surely worse than allowed:
    one that is as good is refused in at most `alpha` of all cases, over all gates of quality together.

    Attributes:
        auc: drop of AUC on all of the test set.
        ne: rise of normalized entropy on all of it, as a share of the champion's.
        calibration: rise of the expected calibration error.
        slice_auc: drop of AUC on a slice: new items, rare items, new users.
        latency: time to score 500 candidates, over the champion's.
        bytes: size of table and network, over the champion's.
        sure: drop of AUC on all of the test set that the test must exclude; where it cannot, the gates cannot tell.
        alpha: chance to refuse an equal challenger.
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
    """One bundle on the test set.

    Attributes:
        quality: by slice; `all` is the whole. Only rows that neither bundle was trained on are measured.
        latency_ms: median time to score 500 candidates.
        bytes: of table and network.
    """

    bundle: str
    quality: dict[str, Quality]
    latency_ms: float
    bytes: int


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        limit: what `challenger` may be at the worst; None: shown only.
        passed: True if it is not surely beyond.
        low, high: how much worse the challenger is, at least and at most; None where it is not tested.
        told: True if the test set could tell.
        rows: Test rows that decide; None where no rows are measured, and in verdicts of earlier releases.
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
    """All comparisons, and whether the challenger may be one.

    Attributes:
        note: what the reader should know of the test set.
        storage: AUC on all by how rows are kept.
    """

    champion: str
    challenger: str
    checks: list[Check]
    note: str = ""
    storage: dict[str, float] = field(default_factory=dict)

    @property
    def answer(self) -> Answer:
        """`worse` where any comparison fails, `cannot tell` where the test set is too small to pass it."""
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
        tested: by slice, how much worse the challenger is, and how well the rows can tell.
    """
    deciding = [
        part for part in champion.quality if champion.quality[part].rows >= LEAST_ROWS and tested.get(part) is not None
    ]
    # The whole has three gates of quality, a slice has one; together they refuse an equal challenger at α.
    alpha = gates.alpha / max(len(deciding) + (2 if _ALL in deciding else 0), 1)
    checks: list[Check] = []
    for part in champion.quality:
        old, new = champion.quality[part], challenger.quality[part]
        found = tested[part] if part in deciding else None
        drop = gates.auc if part == _ALL else gates.slice_auc
        tested_auc = _tested(f"{part}: AUC", old.auc, new.auc, -drop, found.auc if found else None, alpha)
        auc = replace(tested_auc, rows=old.rows)
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
                    found.entropy if found else None,
                    alpha,
                ),
                _tested(
                    f"{part}: calibration error",
                    old.calibration_error,
                    new.calibration_error,
                    gates.calibration,
                    found.calibration if found else None,
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
    """A comparison that fails where the challenger is surely worse than allowed.

    Args:
        allowed: added to the champion's; negative where more is better.
    """
    if old is None or new is None or drop is None:
        return Check(name, old, new, None, True)
    low, high = drop.bounds(alpha)
    return Check(name, old, new, old + allowed, low <= abs(allowed), low, high)


def _at_most(name: str, old: float, new: float, rise: float) -> Check:
    return Check(name, old, new, old + rise, new <= old + rise)
