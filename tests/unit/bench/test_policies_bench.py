"""`bench policies`: claims that can fail, and consumed items that are counted against the frame."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.errors import TesseraError
from models.bundle.bundle import write_bundle
from tessera.bench.online.policies import all_rules, claims, measure, policies
from tests.build import coloured_dataset, coloured_parts
from tests.integration.streaming.test_forget import consumed
from tests.integration.world import quiet


def _rows(given: float, retrieved: float, shown: int) -> list[dict[str, Any]]:
    return [
        {"part": "rank: given", "ratio": given},
        {"part": "rank: retrieved", "ratio": retrieved},
        {"part": "consumed", "consumed": shown},
    ]


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        (_rows(1.2, 1.3, 0), [True, True, True]),
        (_rows(1.4, 1.2, 0), [False, True, True]),
        (_rows(1.2, 1.4, 0), [True, False, True]),
        (_rows(1.2, 1.2, 1), [True, True, False]),
    ],
)
def test_each_claim_is_judged_by_its_own_rows(rows: list[dict[str, Any]], holds: list[bool]) -> None:
    assert [claim.holds for claim in claims(rows)] == holds


def test_rows_have_a_control_and_count_what_the_frame_says(tmp_path: Path) -> None:
    parts = coloured_parts(tmp_path, events=200)
    dataset = parts.dataset.model_copy(update={"policies": {"all": all_rules(parts.dataset)}})
    bundle = write_bundle(replace(parts, dataset=dataset, consumed=consumed().clear()), tmp_path / "bundle")
    # The bundle knows the visits i1 and i2 of u0, and the frame of this test one item more.
    rows = measure(bundle, {"u0": {"i1", "i2", "i3"}}, 0, rounds=3, answers=200)
    assert [row["part"] for row in rows] == ["rank: given", "rank: retrieved", "consumed"]
    assert all(row["p50_ms"] > 0 and row["control"] > 0 for row in rows[:2])
    answered = rows[2]
    assert answered["answers"] >= 200
    assert 0 < answered["consumed"] < answered["consumed_without"]


def test_a_dataset_without_users_is_refused(tmp_path: Path) -> None:
    dataset = coloured_dataset(tmp_path)
    without = dataset.model_copy(update={"events": dataset.events.model_copy(update={"user": None})})
    with pytest.raises(TesseraError, match="bench policies needs users and a catalogue"):
        policies(without, tmp_path, seeds=1, console=quiet())
