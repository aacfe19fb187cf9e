"""The parts of an item that a ranker reads: left out of the schema, and chosen by held-out items."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.content import lsa
from features.errors import BundleError
from features.frame import Frame, build_frame
from models.ranker import reads
from models.ranker.reads import Trial, choose_reads
from models.table.default_schema import TableOptions, default_schema
from models.table.item_parts import parts_of, reading
from models.table.schema import SEMANTIC_ID, Schema
from tests.build import SMALL_TRAIN, coloured_dataset, coloured_tables

ALL = ("id", "code", "content", "metadata")


def _world(*, items: int = 300, events: int = 6_000) -> tuple[Frame, Schema]:
    """A frame whose labels the text tells; neither the Semantic ID nor the column does."""
    dataset, tables = coloured_dataset(), coloured_tables(events=events, items=items)
    rng = np.random.default_rng(0)
    words = tables["items"]["text"].to_list()
    vectors = lsa.fit(words, dim=6, seed=0).encode(words)
    tables["items"] = tables["items"].with_columns(
        pl.Series("colour", rng.choice(["x", "y"], items)),
        pl.Series("content_vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])),
        pl.Series("semantic_codes", np.zeros((items, 1)), dtype=pl.Array(pl.UInt16, 1)),
        pl.Series(SEMANTIC_ID, [[f"0:{n}"] for n in rng.integers(0, 20, items)], dtype=pl.List(pl.String)),
    )
    frame = build_frame(dataset, tables, split=dataset.split, history_length=5)
    return frame, default_schema(dataset, frame, TableOptions(dim=4), history_length=5)


def test_a_part_is_left_out_of_the_candidate_and_stays_in_the_history() -> None:
    _, schema = _world(events=300)
    assert parts_of(schema) == ALL
    for part in ALL:
        others = tuple(other for other in ALL if other != part)
        assert parts_of(reading(schema, others)) == others
    bare = reading(schema, ("id",))
    assert [feature.column for feature in bare.of("item")] == ["item_id"]
    assert bare.content == 0
    assert bare.of("history") == schema.of("history")
    assert reading(schema, ALL) == schema


def test_attention_reads_the_columns_of_the_candidate_alone() -> None:
    frame, _ = _world(events=300)
    options = TableOptions(dim=4, history="attention")
    schema = reading(default_schema(coloured_dataset(), frame, options, history_length=5), ("id", "content"))
    assert [feature.column for feature in schema.of("history")] == ["item_id"]


def test_an_unknown_part_is_refused_by_name() -> None:
    _, schema = _world(events=300)
    with pytest.raises(BundleError, match="no 'code'; choose of id, metadata"):
        reading(reading(schema, ("id", "metadata")), ("code",))


def test_the_text_that_tells_the_label_is_read_and_each_trial_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reads, "LEAST_EVENTS", 100)
    frame, schema = _world()
    config, kept = replace(SMALL_TRAIN, max_epochs=2), tmp_path / "trials.json"
    chosen = choose_reads(schema, frame, config, kept=kept)
    assert chosen.trials[0].parts == ALL
    assert {"id", "content"} <= set(chosen.parts)
    without = next(trial for trial in chosen.trials if trial.parts == ("id", "code", "metadata"))
    assert chosen.trials[0].new_auc > without.new_auc + 0.1
    assert len(chosen.lines()) == len(chosen.trials)
    # A second choice trains nothing.
    monkeypatch.setattr(reads, "train", None)
    assert choose_reads(schema, frame, config, kept=kept) == chosen


AUCS = {
    "id code content metadata": (0.80, 0.86),
    "id content metadata": (0.81, 0.858),
    "id code metadata": (0.79, 0.87),
    "id code content": (0.80, 0.86),
    "id metadata": (0.79, 0.86),
    "id content": (0.8098, 0.8581),
}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # The code costs held-out items more than it gives others. Content pays on held-out items alone, and stays.
        ({}, ("id", "content", "metadata")),
        ({"id content metadata": (0.81, 0.849)}, ALL),
        # Without the metadata nothing is worse, and the others are better by more than the margin.
        ({"id content": (0.8098, 0.8590)}, ("id", "content")),
        ({"id content": (0.8090, 0.8590)}, ("id", "content", "metadata")),
        ({"id content": (0.82, 0.86), "id": (0.83, 0.861)}, ("id",)),
    ],
)
def test_a_part_is_left_out_where_it_gives_held_out_items_nothing(
    changes: dict[str, tuple[float, float]], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    aucs = AUCS | {"id": (0.7, 0.8)} | changes
    monkeypatch.setattr(reads, "LEAST_EVENTS", 100)
    monkeypatch.setattr(reads._Trials, "_measured", lambda self, parts: Trial(parts, *aucs[" ".join(parts)]))
    frame, schema = _world()
    assert choose_reads(schema, frame, SMALL_TRAIN).parts == parts


def test_few_events_decide_nothing() -> None:
    frame, schema = _world(events=600)
    chosen = choose_reads(schema, frame, SMALL_TRAIN)
    assert (chosen.parts, chosen.trials) == (ALL, ())
    assert 0 < chosen.events < reads.LEAST_EVENTS


def test_held_out_items_are_in_no_history_and_in_no_training() -> None:
    frame, schema = _world()
    trials = reads._Trials(schema, frame, SMALL_TRAIN, None)
    new = set(trials._new["item"].to_list())
    assert new
    for part in ("train", "validation"):
        rows = trials._frame.part(part)
        assert not new & set(rows["item"].to_list())
        assert not new & set(rows["history"].explode().drop_nulls().to_list())
        assert rows.height + (trials._new["split"] == part).sum() == frame.height(part)
