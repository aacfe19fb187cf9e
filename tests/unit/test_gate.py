"""The gates refuse what is worse beyond a threshold, and nothing else."""

from dataclasses import replace

import pytest

from features.error import TesseraError
from models.evaluate import Quality
from models.gate import LEAST_ROWS, Gates, Measured, judge

GOOD = Quality(5_000, 0.3, 0.75, 0.5, 0.02, 0.85)
BASE = Measured("old", {"all": GOOD, "new items": replace(GOOD, rows=300, auc=0.65)}, 4.0, 1_000_000)


def failed(challenger: Measured, gates: Gates = Gates()) -> list[str]:  # noqa: B008 - frozen
    return [check.name for check in judge(BASE, challenger, gates) if not check.passed]


def changed(part: str, **fields: float) -> Measured:
    return replace(BASE, quality=BASE.quality | {part: replace(BASE.quality[part], **fields)})


def test_an_equal_bundle_passes_every_gate() -> None:
    assert failed(replace(BASE, bundle="new")) == []


@pytest.mark.parametrize(
    ("challenger", "name"),
    [
        (changed("all", auc=0.747), "all: AUC"),
        (changed("all", normalized_entropy=0.86), "all: NE"),
        (changed("all", calibration_error=0.04), "all: calibration error"),
        (changed("new items", auc=0.62), "new items: AUC"),
        (replace(BASE, latency_ms=6.1), "latency ms, 500 candidates"),
        (replace(BASE, bytes=2_100_000), "bytes"),
    ],
)
def test_each_gate_refuses_what_is_beyond_it_alone(challenger: Measured, name: str) -> None:
    assert failed(challenger) == [name]


@pytest.mark.parametrize(
    "challenger",
    [
        changed("all", auc=0.7485),
        changed("all", auc=0.9, normalized_entropy=0.5, calibration_error=0.0),
        changed("new items", normalized_entropy=0.9),
        replace(BASE, latency_ms=1.0, bytes=1),
    ],
)
def test_what_is_better_or_within_the_thresholds_passes(challenger: Measured) -> None:
    assert failed(challenger) == []


def test_a_small_slice_is_shown_and_decides_nothing() -> None:
    few = replace(GOOD, rows=LEAST_ROWS - 1)
    old = replace(BASE, quality={"all": GOOD, "new users": few})
    new = replace(old, quality={"all": GOOD, "new users": replace(few, auc=0.1)})
    checks = {check.name: check for check in judge(old, new, Gates())}
    assert checks["new users: AUC"].passed
    assert checks["new users: AUC"].limit is None
    assert checks["new users: AUC"].challenger == 0.1


def test_thresholds_are_read_by_name() -> None:
    assert Gates.parse(["auc=0.5", "latency=3"]) == Gates(auc=0.5, latency=3.0)
    assert failed(changed("all", auc=0.5), Gates.parse(["auc=0.3"])) == []
    for wrong in ("speed=1", "auc", "auc=much"):
        with pytest.raises(TesseraError, match=r"--gate .*: expected NAME=NUMBER with a name of auc, ne"):
            Gates.parse([wrong])
