"""The benchmark of several processes: its claims follow its rows."""

from typing import Any

import pytest

from tessera.bench.offline import processes as bench

LOSSES = [0.7 - 0.001 * step for step in range(100)]


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        found.append({"seed": seed, "trained": bench.ONE, "test_auc": 0.8, "losses": list(LOSSES)})
        several = {"test_auc": 0.8005, "losses": list(LOSSES), "largest_share": 0.5, "sha256": "a"}
        found.append({"seed": seed, "trained": bench.SEVERAL} | several)
    return [*found, {"seed": 0, "trained": f"{bench.SEVERAL}, again"} | several]


@pytest.mark.parametrize(
    ("row", "name", "value", "fails"),
    [
        (0, "test_auc", 0.8, []),
        (3, "test_auc", 0.8011, [2]),
        (1, "largest_share", 0.61, [3]),
        (4, "sha256", "b", [4]),
        (3, "losses", [*LOSSES[:9], LOSSES[9] + 2e-6, *LOSSES[10:]], [0]),
        (1, "losses", [*LOSSES[:99], LOSSES[99] + 4e-4], [1]),
    ],
)
def test_the_claims_follow_the_worst_seed(row: int, name: str, value: object, fails: list[int]) -> None:
    changed = rows()
    changed[row][name] = value
    assert [number for number, claim in enumerate(bench.claims(changed)) if not claim.holds] == fails
