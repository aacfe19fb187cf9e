"""Benchmarks of quality claim the ranker against rates that only count, on the rows that the ranker is judged on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.errors import TesseraError
from features.jobs.shard import write_parquet
from models.ranker.evaluate import PARTS, RATE_BASELINES, Quality, rate_baselines
from tessera.bench.offline import main_job
from tessera.bench.online import online_learning
from tessera.pipeline.run import RunResult
from tests.build import coloured_dataset, coloured_frame
from tests.integration.world import quiet

AUCS = {"popularity": 0.81, "user-item": 0.84, "user-item-running": 0.86, "hashed-id": 0.83, "ranker": 0.85}


def test_the_ranker_is_claimed_against_every_baseline_and_falls_short_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: Any, **named: Any) -> RunResult:
        parts = {
            model: {part: asdict(Quality(90, 0.5, auc, 0.5, 0.1, 0.8)) for part in PARTS} for model, auc in AUCS.items()
        }
        return RunResult(tmp_path, None, None, {"quality": parts}, {})

    monkeypatch.setattr(main_job, "run", measured)
    result = main_job.main_job([coloured_dataset()], tmp_path, seeds=1, console=quiet())
    assert [row["model"] for row in result.rows] == list(AUCS)
    assert all(row["all_rows"] == 90 for row in result.rows)
    assert [claim.holds for claim in result.claims] == [True, True, False, True]
    assert {name for name in RATE_BASELINES if any(f"above {name} in" in c.claim for c in result.claims)} == {
        *RATE_BASELINES
    }


def test_online_learning_judges_the_rates_on_its_own_rows(tmp_path: Path) -> None:
    frame = coloured_frame(events=2_000, items=8, users=5)
    for name in ("users", "items", "examples"):
        write_parquet(getattr(frame, name), tmp_path / f"{name}.parquet")
    test = frame.part("test").sort("time", "event", maintain_order=True)
    labels = test["label"].to_numpy().astype(np.float32)
    rows = online_learning._rates(tmp_path, labels)
    assert [row["model"] for row in rows] == list(RATE_BASELINES)
    assert all(row["rows"] == len(labels) - len(labels) // 5 for row in rows)
    assert all(row["auc"] > 0.99 for row in rows)
    assert len(rate_baselines(frame)["user-item"]) == len(labels)
    with pytest.raises(TesseraError, match="not those of the test part"):
        online_learning._rates(tmp_path, labels[::-1])


def test_learning_is_claimed_against_the_frozen_table_and_each_rate() -> None:
    frozen, chosen = {"model": "frozen", "auc": 0.82}, {"model": "learning", "auc": 0.861}
    rates = [{"model": name, "auc": AUCS[name] + 0.003} for name in RATE_BASELINES]
    claims = online_learning._claims(chosen, frozen, rates)
    assert [claim.holds for claim in claims] == [True, True, True, False]
