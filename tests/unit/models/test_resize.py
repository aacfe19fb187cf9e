"""Laws of another number of rows: twice as many change nothing, weights sum to one, exact rows stay."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from features.errors import BundleError
from features.frame import Frame
from features.hashing import HashSpec, fingerprint
from models.ranker.loading import assembler, examples
from models.ranker.network import Ranker
from models.ranker.resize import overlap, resized, resized_rows
from models.ranker.train import Trained, predict, train
from models.table.admission import Admission
from models.table.default_schema import TableOptions, default_schema
from models.table.schema import Schema
from tessera.bench.offline import resize as bench
from tests.build import SMALL_TRAIN, coloured_dataset, coloured_frame

SIZES = st.integers(1, 60)


@pytest.fixture(scope="module")
def frame() -> Frame:
    return coloured_frame(events=600)


@pytest.fixture(scope="module")
def world(frame: Frame) -> tuple[Schema, Trained]:
    schema = default_schema(coloured_dataset(), frame, TableOptions(dim=4, budget=101 * 16), history_length=5)
    return schema, train(schema, frame, replace(SMALL_TRAIN, max_epochs=1))


def exact_rows(schema: Schema) -> int:
    return schema.rows - schema.hashed_rows


def predictions(schema: Schema, ranker: Ranker, frame: Frame, trained: Trained) -> np.ndarray[Any, Any]:
    part = frame.part("test")
    return predict(ranker, assembler(schema, frame, part, Admission(trained.sketch, schema.admission)), examples(part))


@given(SIZES, SIZES)
def test_segments_cover_every_hash_once_and_lie_in_both_rows(before: int, after: int) -> None:
    found = overlap(before, after)
    assert found.width.sum() == 2**32
    assert found.width.min() > 0
    starts = np.concatenate([[0], np.cumsum(found.width)[:-1]])
    for edge in (starts, starts + found.width - 1):
        np.testing.assert_array_equal(edge * before >> 32, found.old)
        np.testing.assert_array_equal(edge * after >> 32, found.new)


@given(SIZES, SIZES)
def test_overlaps_are_those_of_intervals_to_the_rounding_of_a_hash(before: int, after: int) -> None:
    found = overlap(before, after)
    widths = {(old, new): width for old, new, width in zip(found.old, found.new, found.width, strict=True)}
    for old in range(before):
        for new in range(after):
            low = max(Fraction(old, before), Fraction(new, after))
            high = min(Fraction(old + 1, before), Fraction(new + 1, after))
            assert abs(max(high - low, 0) * 2**32 - widths.get((old, new), 0)) <= 1


@given(SIZES, SIZES, st.integers(0, 2**16))
def test_a_constant_table_stays_constant_and_no_row_leaves_the_range_of_those_it_is_made_of(
    before: int, after: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    accumulator = torch.rand(before, generator=rng) * (torch.rand(before, generator=rng) > 0.3)
    moved, state = resized_rows(torch.full((before, 4), 0.7), accumulator, after)
    torch.testing.assert_close(moved, torch.full((after, 4), 0.7))
    assert state.min() >= 0
    moved, state = resized_rows(accumulator[:, None], accumulator, after)
    assert moved.min() >= accumulator.min() - 1e-6
    assert moved.max() <= accumulator.max() + 1e-6
    kept = resized_rows(moved, torch.full((after,), 0.7), before)[1]
    assert ((kept - 0.7).abs().minimum((kept - 0.07).abs()) < 1e-6).all()


def test_a_row_nobody_read_does_not_dilute_one_that_was() -> None:
    moved, state = resized_rows(torch.tensor([[1.0], [9.0], [3.0], [5.0]]), torch.tensor([4.0, 0.0, 0.0, 0.0]), 2)
    assert moved.tolist() == [[1.0], [4.0]]
    assert state.tolist() == pytest.approx([0.2, 0.0])


@given(st.integers(1, 500), st.integers(1, 4), st.lists(st.text(max_size=5), min_size=1, max_size=20))
def test_every_value_keeps_its_vector_when_rows_are_multiplied(rows: int, factor: int, values: list[str]) -> None:
    weight = torch.rand(rows, 4, generator=torch.Generator().manual_seed(rows))
    moved, state = resized_rows(weight, weight[:, 0], factor * rows)
    before, after = (HashSpec(rows=size).lookup("s", 2, fingerprint(values)) for size in (rows, factor * rows))
    assert torch.equal(moved[after], weight[before])
    assert torch.equal(state[after], weight[:, 0][before])


def test_twice_the_rows_leave_every_prediction(world: tuple[Schema, Trained], frame: Frame) -> None:
    schema, trained = world
    rows = exact_rows(schema) + 2 * schema.hashed_rows
    wanted, ranker = resized(schema, trained.ranker, rows=rows)
    assert wanted == replace(schema, rows=rows)
    before = predictions(schema, trained.ranker, frame, trained)
    np.testing.assert_array_equal(predictions(wanted, ranker, frame, trained), before)


@pytest.mark.parametrize("rows", [20, 51, 101, 333])
def test_exact_rows_are_copied_as_they_are_and_stay_so_on_the_way_back(
    world: tuple[Schema, Trained], rows: int
) -> None:
    schema, trained = world
    exact = exact_rows(schema)
    assert exact > 0
    wanted, ranker = resized(schema, trained.ranker, rows=rows)
    back, again = resized(wanted, ranker, rows=schema.rows)
    assert back == schema
    for table in (ranker.table, again.table):
        assert torch.equal(table.weight[-exact:], trained.ranker.table.weight[-exact:])
        assert torch.equal(table.accumulator[-exact:], trained.ranker.table.accumulator[-exact:])
        assert table.accumulator.min() >= 0


def test_the_ranker_that_was_resized_is_not_touched_by_training_the_new_one(
    world: tuple[Schema, Trained], frame: Frame
) -> None:
    schema, trained = world
    before = {name: tensor.clone() for name, tensor in trained.ranker.network.state_dict().items()}
    rows = trained.ranker.table.weight.clone()
    wanted, ranker = resized(schema, trained.ranker, rows=60)
    config = replace(SMALL_TRAIN, max_epochs=1)
    tuned = train(wanted, frame, config, start=ranker)
    assert any(not torch.equal(before[name], one) for name, one in tuned.ranker.network.state_dict().items())
    assert torch.equal(trained.ranker.table.weight, rows)
    assert all(torch.equal(before[name], one) for name, one in trained.ranker.network.state_dict().items())


def test_rows_that_do_not_hold_the_exact_features_are_refused(world: tuple[Schema, Trained]) -> None:
    schema, trained = world
    with pytest.raises(BundleError, match="exact features alone need"):
        resized(schema, trained.ranker, rows=exact_rows(schema))


def test_the_benchmark_has_a_row_for_each_way_and_a_claim_for_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: Frame
) -> None:
    monkeypatch.setattr(bench, "dataset_frame", lambda dataset, **_: frame)
    monkeypatch.setattr(bench, "file_hashes", lambda dataset: [])
    config = replace(SMALL_TRAIN, max_epochs=2, threads=1)
    found = bench.resize(coloured_dataset(), tmp_path, seeds=1, console=Console(quiet=True), config=config)
    hows = [row["how"] for row in found.rows]
    assert hows == ["trained", *["retrained", "resized", "resized+tuned"] * 2]
    assert len(found.claims) == 2
    tuned = [row for row in found.rows if row["how"] == "resized+tuned"]
    retrained = [row for row in found.rows if row["how"] == "retrained"]
    assert all(0 < a["steps"] <= b["steps"] / 10 for a, b in zip(tuned, retrained, strict=True))
    first, double = found.rows[0], next(row for row in found.rows if row["how"] == "resized" and row["rows"] > 1024)
    assert double["test_auc"] == pytest.approx(first["test_auc"], abs=1e-6)
