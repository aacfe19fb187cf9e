"""`bench correction`: claims that can fail, turns that favour no side, an implicit dataset that is refused."""

from pathlib import Path
from typing import Any

import pytest

from features.dataset.label import Label
from features.errors import DatasetError
from tessera.bench.encoder import correction as bench
from tessera.bench.encoder.correction import NEAR, PERMUTED, RANKER, claims, correction
from tests.build import coloured_dataset
from tests.integration.world import quiet


def _rows(near: float, loss: float, permuted: float, ratio: float | None = 1.0) -> list[dict[str, Any]]:
    """Returns rows of two seeds; the ranker differs between them, the gains do not."""
    rows: list[dict[str, Any]] = []
    for seed in range(2):
        base = {"part": "new items", "seed": seed}
        auc, log_loss = 0.8 + seed / 100, 0.4 + seed / 100
        rows.append(base | {"way": RANKER, "auc": auc, "log_loss": log_loss})
        rows.append(base | {"way": NEAR, "auc": auc + near, "log_loss": log_loss + loss})
        rows.append(base | {"way": PERMUTED, "auc": auc + permuted, "log_loss": log_loss})
    return rows if ratio is None else [*rows, {"part": "cost", "way": "known candidates", "ratio": ratio}]


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        (_rows(0.003, -0.004, 0.0), [True, True, True, True]),
        (_rows(0.001, -0.004, 0.0), [False, True, True, True]),
        (_rows(0.003, -0.002, 0.0), [True, False, True, True]),
        (_rows(0.003, -0.004, 0.002), [True, True, False, True]),
        (_rows(0.003, -0.004, 0.0, ratio=1.2), [True, True, True, False]),
        (_rows(0.003, -0.004, 0.0, ratio=None), [True, True, True]),
    ],
)
def test_each_claim_is_judged_by_its_own_rows(rows: list[dict[str, Any]], holds: list[bool]) -> None:
    assert [claim.holds for claim in claims(rows)] == holds


@pytest.mark.parametrize("first", [0, 1])
def test_the_order_of_a_turn_does_not_change_whose_time_is_whose(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def timed(service: Any, user: str, candidates: list[str]) -> float:
        asked.append(service)
        return {"with": 2.0, "without": 1.0}[service]

    monkeypatch.setattr(bench, "_timed", timed)
    assert bench._in_turn("with", "without", "ann", ["a"], first=first) == (2.0, 1.0)  # type: ignore[arg-type]
    assert asked == [["with", "without"], ["without", "with"]][first]


def test_a_dataset_of_positives_alone_is_refused_by_name(tmp_path: Path) -> None:
    dataset = coloured_dataset()
    events = dataset.events.model_copy(update={"label": Label(implicit=True)})
    implicit = dataset.model_copy(update={"events": events})
    with pytest.raises(DatasetError, match="needs events of both labels"):
        correction(implicit, tmp_path, seeds=1, console=quiet())
