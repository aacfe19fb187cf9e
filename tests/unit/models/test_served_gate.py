"""A gate on what the champion serves refuses by name, and without a report it cannot tell."""

from typing import Any

import pytest

from models.registry.gate import SKEW_MEASURES, Verdict
from models.registry.served_gate import served_checks
from serving.skew.drift import DriftMeasure, DriftReport
from serving.skew.report import SkewReport

LIMITS = {"different": 0.0, "alarms": 0.0, "psi": 0.1}


def report(*, different: int = 0, requests: int = 10, drift: DriftReport | None = None) -> dict[str, Any]:
    found = SkewReport("b-1", requests=requests, drift=drift)
    if different:
        found.difference("item.format", "absent").add(different, [])
    return found.to_json()


def drifted(low: float | None, *, alarm: bool) -> DriftReport:
    one = DriftMeasure("a", "values", 10, 0.3, low, 0.5, 0.1, 0.1, 0.2, "row 1", 0.1, 3.0, alarm)
    return DriftReport("b-1", users=10, measures=(one,))


@pytest.mark.parametrize(
    ("document", "refused", "untold"),
    [
        (report(drift=drifted(0.05, alarm=False)), [], []),
        (report(different=3, drift=drifted(None, alarm=False)), ["skew.different"], []),
        (report(drift=drifted(0.2, alarm=True)), ["skew.alarms", "skew.psi"], []),
        (report(), [], ["skew.alarms", "skew.psi"]),
        (report(drift=DriftReport("b-1", note="no profile")), [], ["skew.alarms", "skew.psi"]),
        (report(requests=0), [], ["skew.different", "skew.alarms", "skew.psi"]),
        (None, [], ["skew.different", "skew.alarms", "skew.psi"]),
    ],
)
def test_a_limit_that_is_exceeded_is_named(
    document: dict[str, Any] | None, refused: list[str], untold: list[str]
) -> None:
    checks = served_checks(LIMITS, document)
    assert [one.name for one in checks] == [f"skew.{name}" for name in SKEW_MEASURES]
    assert [one.name for one in checks if not one.passed] == refused
    assert [one.name for one in checks if not one.told] == untold
    assert Verdict("a", "b", checks).answer == ("worse" if refused else "cannot tell" if untold else "passed")


def test_a_descriptor_that_names_no_measure_checks_nothing() -> None:
    assert served_checks({}, None) == []
