"""The gates between a trained bundle and the right to challenge the champion: both measured on one test set.

Pure: takes measures, says what is worse beyond which threshold.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from features.error import TesseraError
from models.evaluate import Quality

# A slice with fewer rows says more about chance than about the model; it is shown, and decides nothing.
LEAST_ROWS = 200


@dataclass(frozen=True)
class Gates:
    """How much worse a challenger may be than the champion.

    Attributes:
        auc: drop of AUC on all of the test set.
        ne: rise of normalized entropy on all of it, as a share of the champion's.
        calibration: rise of the expected calibration error.
        slice_auc: drop of AUC on a slice: new items, rare items, new users.
        latency: time to score 500 candidates, over the champion's.
        bytes: size of table and network, over the champion's.
    """

    auc: float = 0.002
    ne: float = 0.005
    calibration: float = 0.01
    slice_auc: float = 0.02
    latency: float = 1.5
    bytes: float = 2.0

    @staticmethod
    def parse(pairs: list[str] | None) -> "Gates":
        """Reads `NAME=NUMBER`, repeated; raises TesseraError on an unknown name or no number."""
        names = [one.name for one in fields(Gates)]
        found: dict[str, float] = {}
        for pair in pairs or ():
            name, _, value = pair.partition("=")
            try:
                found[name] = float(value)
            except ValueError:
                name = ""
            if name not in names:
                raise TesseraError(f"--gate {pair}: expected NAME=NUMBER with a name of {', '.join(names)}")
        return Gates(**found)


@dataclass(frozen=True)
class Measured:
    """One bundle on the test set.

    Attributes:
        quality: by slice; `all` is the whole.
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
        passed: whether it is within.
    """

    name: str
    champion: float | None
    challenger: float | None
    limit: float | None
    passed: bool


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
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def judge(champion: Measured, challenger: Measured, gates: Gates) -> list[Check]:
    """Compares two bundles on one test set."""
    checks: list[Check] = []
    for part in champion.quality:
        old, new = champion.quality[part], challenger.quality[part]
        decides = old.rows >= LEAST_ROWS and old.auc is not None and new.auc is not None
        drop = gates.auc if part == "all" else gates.slice_auc
        checks.append(_at_least(f"{part}: AUC", old.auc, new.auc, drop if decides else None))
        if part == "all":
            rise = None if old.normalized_entropy is None else old.normalized_entropy * gates.ne
            checks.append(_at_most(f"{part}: NE", old.normalized_entropy, new.normalized_entropy, rise))
            checks.append(
                _at_most(f"{part}: calibration error", old.calibration_error, new.calibration_error, gates.calibration)
            )
        else:
            checks.append(_at_most(f"{part}: NE", old.normalized_entropy, new.normalized_entropy, None))
    for name, before, after, ratio in (
        ("latency ms, 500 candidates", champion.latency_ms, challenger.latency_ms, gates.latency),
        ("bytes", float(champion.bytes), float(challenger.bytes), gates.bytes),
    ):
        checks.append(_at_most(name, before, after, before * (ratio - 1)))
    return checks


def _at_least(name: str, old: float | None, new: float | None, drop: float | None) -> Check:
    if old is None or new is None or drop is None:
        return Check(name, old, new, None, True)
    return Check(name, old, new, old - drop, new >= old - drop)


def _at_most(name: str, old: float | None, new: float | None, rise: float | None) -> Check:
    if old is None or new is None or rise is None:
        return Check(name, old, new, None, True)
    return Check(name, old, new, old + rise, new <= old + rise)
