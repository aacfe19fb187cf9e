"""The bench of expressions trains all arms and judges the ratios to the same features as columns."""

import io
from pathlib import Path

from rich.console import Console

from tessera.bench.online.expressions import ARMS, ExpressionSizes, claims, expressions


def test_all_arms_are_measured_on_the_same_batches(tmp_path: Path) -> None:
    sizes = ExpressionSizes(events=1_000, batch=16, batches=3)
    result = expressions(tmp_path, seeds=1, console=Console(file=io.StringIO()), sizes=sizes)
    assert [row["arm"] for row in result.rows] == list(ARMS)
    assert all(row["cpu ms"] > 0 for row in result.rows)
    assert result.rows[1]["to columns"] == 1
    assert len(result.claims) == 2


def test_a_step_that_loses_more_than_a_tenth_breaks_the_claim() -> None:
    rows = [
        {"arm": arm, "to columns": ratio}
        for arm, ratios in (("one table", (1.0, 1.05, 3.0)), ("two tables", (1.2, 1.3, 1.0)))
        for ratio in ratios
    ]
    assert [(claim.value, claim.holds) for claim in claims(rows)] == [(1.05, True), (1.2, False)]
