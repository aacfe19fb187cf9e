"""The benchmark of new users: who is held out, what is claimed, and that it runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from models.ranker.evaluate import RATE_BASELINES, novelty
from tessera.bench.offline import new_users
from tests.build import coloured_dataset, coloured_frame
from tests.integration.world import quiet

FRAME = coloured_frame(events=2_000, users=100)


def test_held_out_users_have_test_events_alone_and_all_others_keep_their_parts() -> None:
    first = FRAME.part("test")["user"][0]
    # This user has no training event either, by the split alone.
    gone = (pl.col("user") == first) & (pl.col("split") != "test")
    frame = FRAME.replace(examples=FRAME.examples.filter(~gone))
    found = new_users.held_out(frame, 0).examples
    parts = found.group_by("user").agg(pl.col("split").unique())
    new = {row["user"] for row in parts.to_dicts() if row["split"] == ["test"]}
    assert 3 <= len(new) <= 20
    assert first not in new
    of_new = found["user"].is_in(list(new))
    assert frame.examples.filter(of_new).height == found.filter(of_new).height > 0
    assert found.filter(pl.col("user") == first)["split"].unique().to_list() == ["unused"]
    kept = ~of_new & (found["user"] != first)
    assert found.filter(kept)["split"].equals(frame.examples.filter(kept)["split"])
    keys = novelty(frame.replace(examples=found), "user")
    assert keys is not None
    assert set(keys.ids[~keys.known]) == new


def rows(model: str, known: float, unseen: float | None, seed: int = 0) -> dict[str, Any]:
    return {"users": "later", "seed": seed, "model": model, "known_users_auc": known, "unseen_users_auc": unseen}


def test_each_claim_is_judged_by_the_seed_that_speaks_most_against_it() -> None:
    found = [
        *(rows(new_users.RUNNING, 0.85, 0.80, seed) for seed in (0, 1)),
        *(rows(new_users.UNHIDDEN, 0.86, 0.79, seed) for seed in (0, 1)),
        rows(new_users.DEFAULT, 0.8595, 0.82),
        rows(new_users.DEFAULT, 0.87, 0.805, 1),
    ]
    unseen, known = new_users.claims(found)
    assert (unseen.value, unseen.holds) == (pytest.approx(0.005), False)
    assert (known.value, known.holds) == (pytest.approx(-0.0005), True)
    # Too few rows have no AUC, and nothing is claimed of them.
    assert len(new_users.claims([rows(new_users.DEFAULT, 0.8, None), rows(new_users.RUNNING, 0.8, None)])) == 0


def small() -> Dataset:
    ranker = {"hidden": [4], "cross_layers": 1, "cross_rank": 4}
    return coloured_dataset().model_copy(update={"run": {"training": {"max_epochs": 1}, "ranker": ranker}})


def test_rates_and_rankers_are_measured_on_known_and_on_unseen_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_users, "run", lambda *given, **named: SimpleNamespace(directory=tmp_path))
    monkeypatch.setattr(new_users, "read_frame", lambda path: FRAME)
    chosen = [new_users.DEFAULT]
    result = new_users.new_users(small(), tmp_path, seeds=1, console=quiet(), rankers=chosen)
    assert [row["model"] for row in result.rows] == 2 * [*RATE_BASELINES, *chosen]
    first, *_ = result.rows
    assert first["unseen_users_rows"] > 60
    assert 3 <= first["unseen_users_distinct"] <= 20
    assert first["known_users_rows"] + first["unseen_users_rows"] == new_users.held_out(FRAME, 0).part("test").height
    (ranker,) = (row for row in result.rows[:4] if row["model"] == new_users.DEFAULT)
    assert ranker["unseen_users_auc"] > 0.9
    # By time every user of this dataset has a training event.
    assert {row["unseen_users_auc"] for row in result.rows if row["users"] == new_users.LATER} == {None}
    assert np.isfinite([claim.value for claim in result.claims]).all()


def test_a_dataset_without_users_is_refused(tmp_path: Path) -> None:
    without = small()
    without = without.model_copy(update={"events": without.events.model_copy(update={"user": None})})
    with pytest.raises(DatasetError, match="needs \\[events\\] user"):
        new_users.new_users(without, tmp_path, seeds=1, console=quiet())
