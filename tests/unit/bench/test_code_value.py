"""The benchmark of the code's value: a condition changes what it says and nothing else, and claims follow the rows."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.content.encoder import unit
from tessera.bench.encoder import code_value as bench
from tessera.bench.encoder.code_value import CONDITIONS, Condition
from tests.build import coloured_dataset, coloured_frame, coloured_tables

FRAME = coloured_frame(events=3_000)


def test_a_text_is_cut_from_its_end() -> None:
    items = pl.DataFrame({"text": ["one two three four five", "one", "", None]})
    assert bench._shortened(items, share=0.4).to_list() == ["one two", "one", "", ""]


def test_a_share_of_the_training_events_is_kept_and_every_other_event() -> None:
    change = bench._thinned(Condition(events=1 / 3), 0)
    assert change is not None
    thin = change(FRAME)
    assert thin.height("train") == pytest.approx(FRAME.height("train") / 3, rel=0.1)
    for part in ("validation", "test"):
        assert thin.part(part).equals(FRAME.part(part))


def test_a_share_of_the_items_is_kept_in_events_and_histories() -> None:
    change = bench._thinned(Condition(items=1 / 3), 1)
    assert change is not None
    thin = change(FRAME)
    kept = set(thin.examples["item"].to_list())
    assert 3 < len(kept) < FRAME.items.height / 2
    assert set(thin.examples["history"].explode().drop_nulls().to_list()) <= kept
    whole = FRAME.examples.filter(pl.col("item").is_in(list(kept)))
    assert thin.examples["event"].to_list() == whole["event"].to_list()


def test_conditions_differ_from_the_data_in_one_thing() -> None:
    usual = vars(Condition())
    for name, condition in CONDITIONS.items():
        changed = [key for key, value in vars(condition).items() if value != usual[key]]
        assert len(changed) == (0 if name == "as it is" else 1), name


@pytest.mark.parametrize(("gain", "over", "held"), [(0.006, 0.006, [True, True]), (0.004, 0.006, [False, True])])
def test_claims_are_of_the_data_as_they_are(gain: float, over: float, held: list[bool]) -> None:
    rows = [
        {"condition": "as it is", "new_gain": gain, "new_gain_over_permuted": over},
        {"condition": "two levels", "new_gain": -1.0, "new_gain_over_permuted": -1.0},
    ]
    assert [claim.holds for claim in bench.claims(rows)] == held


def test_the_world_of_a_condition_has_its_key(tmp_path: Path) -> None:
    coloured_tables()["items"].write_parquet(tmp_path / "items.parquet")
    dataset = coloured_dataset(tmp_path)
    assert bench.world_of(dataset, 0, Condition()).key == bench.world_of(dataset, 0, Condition(levels=3)).key


def test_codes_learn_from_the_training_part_and_known_items_alone() -> None:
    frame = coloured_frame(events=3_000, items=60)
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(60, 8)))
    new = np.zeros(60, dtype=np.bool_)
    new[:6] = True
    coded, alike = bench._learnt(bench.KnowsBehaviour("loss"), 0, vectors, new, frame)
    assert coded is vectors
    assert alike is not None
    assert alike.pairs.min() >= 0
    assert alike.pairs.max() < 54
    seen, _ = bench._learnt(bench.KnowsBehaviour("view"), 0, vectors, new, frame)
    assert seen.shape == vectors.shape
    later = frame.replace(examples=frame.examples.with_columns(label=pl.when(pl.col("split") == "train").then("label")))
    again = bench._learnt(bench.KnowsBehaviour("loss"), 0, vectors, new, later)[1]
    assert again is not None
    assert np.array_equal(again.pairs, alike.pairs)
