"""The console's page of skew and drift: counts, examples, alarms first, intervals, and escaped names."""

from typing import Any

from serving.skew.drift import DriftMeasure, DriftReport
from serving.skew.report import SkewReport
from tessera.pages.console import served
from tests.unit.tessera.test_console_encoders import page


def measure(feature: str, measure: str = "values", **changes: Any) -> DriftMeasure:
    known: dict[str, Any] = {
        "users": 100, "psi": 0.02, "psi_low": 0.0, "psi_high": 0.05, "distance": 0.01, "trained": 0.1, "served": 0.11,
        "cell": "row 3", "limit": 0.1, "evidence": 0.0, "alarm": False,
    }  # fmt: skip
    return DriftMeasure(feature, measure, **known | changes)


def document(report: SkewReport) -> dict[str, Any]:
    return report.to_json() | {"kept_ms": 1_700_000_000_000}


def test_a_report_names_each_difference_with_its_examples() -> None:
    report = SkewReport("b-1", requests=3, values=1_234)
    report.skipped["other bundle"] = 2
    example = {"request": "r1", "item": "<i>", "served": "a", "expected": "b"}
    report.difference("item.format", "absent").add(7, [example])
    shown = page("skew", **served.report(document(report)))
    assert "<b>7</b><span>served values differ" in shown
    assert "of 1,234 values in 3 requests" in shown
    assert "request r1 item &lt;i&gt;: served a, expected b" in shown
    assert "2 other bundle" in shown
    assert "No user was compared" in shown


def test_distributions_are_shown_with_their_intervals_and_alarms_are_strong() -> None:
    measures = (
        measure("item.format", "missing", alarm=True, psi=0.4, psi_low=0.3, psi_high=0.5),
        measure("item.topic"),
        measure("score", psi_low=None, psi_high=None),
    )
    drift = DriftReport("b-1", users=100, reference_users=2_000, measures=measures)
    shown = page("skew", **served.report(document(SkewReport("b-1", drift=drift))))
    assert "1 of 3 distributions are farther from training than tolerated" in shown
    assert '<tr class="strong"><td class="whole">item.format missing</td><td>yes</td>' in shown
    assert "0.300 to 0.500" in shown
    assert shown.count('class="stem strong"') == 1
    assert "row 3: 10.0% to 11.0%" in shown
    quiet = DriftReport("b-1", users=100, measures=(measure("item.topic"),))
    none = page("skew", **served.report(document(SkewReport("b-1", drift=quiet))))
    assert "None of 1 distributions is surely farther" in none


def test_a_version_without_a_report_or_without_a_profile_says_so() -> None:
    assert "tessera skew --keep" in page("skew", **served.report(None))
    note = DriftReport("b-1", note="the bundle has <no> profile")
    assert "Not watched: the bundle has &lt;no&gt; profile" in page(
        "skew", **served.report(document(SkewReport("b-1", drift=note)))
    )
