"""Training on a frame whose right answer is known by construction: an item's colour decides the label."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from features.frame import Frame
from models import train as training
from models.evaluate import quality
from models.feature import hashed_id_schema
from models.loading import assembler, examples, sighted
from models.ranker import Ranker
from models.train import new_ranker, predict, restore, snapshot, train
from tests.build import COLOURS, LIKED, SMALL_TRAIN, coloured_dataset, coloured_frame, coloured_schema

FRAME = coloured_frame()
SCHEMA = coloured_schema(FRAME)
TRAIN, TEST = FRAME.part("train"), FRAME.part("test")
ADMISSION = sighted(SCHEMA, FRAME, TRAIN, examples(TRAIN)).admission


def scores(ranker: Ranker, part: pl.DataFrame, frame: Frame = FRAME) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return predict(ranker, assembler(SCHEMA, frame, part, ADMISSION), examples(part))


@pytest.fixture(scope="module")
def trained() -> training.Trained:
    return train(SCHEMA, FRAME, SMALL_TRAIN)


def test_what_decides_the_label_is_learnt(trained: training.Trained) -> None:
    found = quality(TEST["label"].to_numpy().astype(np.float32), scores(trained.ranker, TEST))
    assert found.auc is not None
    assert found.auc > 0.99
    assert found.log_loss is not None
    assert found.log_loss < 0.3


def test_items_never_trained_on_are_ranked_by_their_attributes(trained: training.Trained) -> None:
    new = [{"item_id": f"new{number}", "colour": COLOURS[number % 4]} for number in range(40)]
    frame = Frame(FRAME.users, pl.DataFrame(new), FRAME.examples)
    part = TEST.head(40).with_columns(
        item=pl.Series(range(40), dtype=pl.UInt32), history=pl.lit([]).cast(TEST["history"].dtype)
    )
    labels = np.array([row["colour"] in LIKED for row in new], dtype=np.float32)
    found = quality(labels, scores(trained.ranker, part, frame)).auc
    assert found is not None
    assert found > 0.95


def test_the_same_seed_trains_to_the_same_bits_and_another_to_others(trained: training.Trained) -> None:
    torch.rand(3)
    again, other = train(SCHEMA, FRAME, SMALL_TRAIN), train(SCHEMA, FRAME, replace(SMALL_TRAIN, seed=1))
    first, second, third = (snapshot(run.ranker) for run in (trained, again, other))
    assert trained.epochs == again.epochs
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["table.weight"], third["table.weight"])


def test_the_number_of_threads_decides_nothing_and_is_left_as_it_was(trained: training.Trained) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = train(SCHEMA, FRAME, SMALL_TRAIN)
        assert torch.get_num_threads() == 2
        found = scores(again.ranker, TEST)
    finally:
        torch.set_num_threads(before)
    assert found.tobytes() == scores(trained.ranker, TEST).tobytes()


def test_the_best_epoch_is_kept() -> None:
    # A rate that overshoots: later epochs are worse, and one of those ends it.
    config = replace(SMALL_TRAIN, max_epochs=6, table_rate=2.0, network_rate=0.2)
    run = train(SCHEMA, FRAME, config)
    held_out = FRAME.part("validation")
    found = quality(held_out["label"].to_numpy().astype(np.float32), scores(run.ranker, held_out)).log_loss
    assert found == pytest.approx(min(run.epochs), rel=1e-5)
    assert len(run.epochs) == 6 or run.epochs.index(min(run.epochs)) == len(run.epochs) - 1 - config.patience


def test_scores_do_not_depend_on_how_examples_are_cut(
    trained: training.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(trained.ranker, TEST)
    for rows in (1, 7, 149, 150):
        monkeypatch.setattr(training, "_SCORE_ROWS", rows)
        np.testing.assert_allclose(scores(trained.ranker, TEST), whole, rtol=0, atol=1e-6)
    assert len(whole) == TEST.height


def test_scores_do_not_depend_on_the_other_examples(trained: training.Trained) -> None:
    order = np.random.default_rng(0).permutation(TEST.height)
    np.testing.assert_allclose(scores(trained.ranker, TEST[order]), scores(trained.ranker, TEST)[order], atol=1e-6)


def test_no_examples_have_no_scores(trained: training.Trained) -> None:
    assert scores(trained.ranker, TEST.head(0)).shape == (0,)


def test_a_snapshot_restores_a_ranker_bit_for_bit(trained: training.Trained) -> None:
    other = new_ranker(SCHEMA, replace(SMALL_TRAIN, seed=9))
    before = snapshot(other)
    restore(other, snapshot(trained.ranker))
    np.testing.assert_array_equal(scores(other.eval(), TEST), scores(trained.ranker, TEST))
    # A snapshot is a copy: what happened to the ranker since has not reached it.
    assert not torch.equal(before["table.weight"], snapshot(other)["table.weight"])


def test_progress_counts_examples_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=2), progress=lambda *at: seen.append(at))
    total = 2 * FRAME.part("train").height
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_hashed_id_baseline_knows_items_by_their_id_alone() -> None:
    baseline = hashed_id_schema(SCHEMA)
    assert {feature.column for feature in baseline.features if feature.of in ("item", "history")} == {"item_id"}
    assert all(feature.chunks == 1 for feature in baseline.features)
    assert (baseline.rows, baseline.dim) == (SCHEMA.rows, SCHEMA.dim)


def test_the_default_schema_reads_every_declared_column_and_histories_from_the_rows_of_items() -> None:
    names = {feature.name: feature for feature in SCHEMA.features}
    assert names.keys() == {"user_id", "item_id", "item.colour", "history.item_id", "history.item.colour"}
    assert names["history.item.colour"].salt == names["item.colour"].salt
    assert [numeric.name for numeric in SCHEMA.numeric] == ["user.age", "history.length"]
    assert SCHEMA.rows >= sum(FRAME.items[column].n_unique() for column in coloured_dataset().items.categorical)  # type: ignore[union-attr]
