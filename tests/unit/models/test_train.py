"""Training on a frame whose right answer is known by construction: an item's colour decides the label."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from features.errors import BundleError, DatasetError, TrainingError
from features.frame import Frame
from models.ranker import train as training
from models.ranker.evaluate import quality
from models.ranker.loading import assembler, examples, sighted
from models.ranker.network import Ranker, TargetAttention
from models.ranker.stored import load_ranker, save_ranker
from models.ranker.train import new_ranker, predict, restore, snapshot, train
from models.table.default_schema import TableOptions, default_schema, hashed_id_schema
from tests.build import COLOURS, LIKED, SMALL_TRAIN, coloured_dataset, coloured_frame, coloured_schema

FRAME = coloured_frame()
SCHEMA = coloured_schema(FRAME)
TRAIN, TEST = FRAME.part("train"), FRAME.part("test")
SIGHTED = sighted(SCHEMA, FRAME, FRAME.blocks("train")).with_events(TRAIN)
ADMISSION = SIGHTED.admission
BATCH = SIGHTED.batch(examples(TRAIN.head(64)))


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


def test_a_watch_sees_the_losses_after_each_epoch_and_may_end_the_training(trained: training.Trained) -> None:
    seen: list[tuple[float, ...]] = []
    train(SCHEMA, FRAME, SMALL_TRAIN, watch=training.Watch(epoch=seen.append))
    assert seen == [trained.epochs[:count] for count in range(1, len(trained.epochs) + 1)]

    def end(losses: tuple[float, ...]) -> None:
        raise StopIteration(losses)

    with pytest.raises(StopIteration):
        train(SCHEMA, FRAME, SMALL_TRAIN, watch=training.Watch(epoch=end))


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


def test_narrow_products_learn_as_much_and_leave_float32_weights_of_the_same_bits(trained: training.Trained) -> None:
    first, second = (train(SCHEMA, FRAME, replace(SMALL_TRAIN, precision="bfloat16")) for _ in range(2))
    found = snapshot(first.ranker)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], tensor) for name, tensor in snapshot(second.ranker).items())
    assert not torch.equal(found["table.weight"], snapshot(trained.ranker)["table.weight"])
    assert first.epochs[-1] == pytest.approx(trained.epochs[-1], abs=0.01)


@pytest.mark.parametrize("taken", ["float32", "bfloat16"])
def test_auto_trains_to_the_bits_of_the_precision_that_it_says_it_took(
    taken: training.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taken != training.faster_precision(training.new_ranker(SCHEMA, SMALL_TRAIN), BATCH):
        monkeypatch.setattr(training, "faster_precision", lambda *given: taken)
    auto = train(SCHEMA, FRAME, replace(SMALL_TRAIN, precision="auto"))
    fixed = train(SCHEMA, FRAME, replace(SMALL_TRAIN, precision=taken))
    assert auto.precision == fixed.precision == taken
    found = snapshot(fixed.ranker)
    assert all(torch.equal(found[name], tensor) for name, tensor in snapshot(auto.ranker).items())


def test_the_precision_that_takes_less_time_is_taken_where_it_saves_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = training.new_ranker(SCHEMA, SMALL_TRAIN)
    usual = training.dense_logits

    def chosen(slow: str, seconds: float) -> str:
        def logits(*given: Any) -> Any:
            time.sleep(seconds if given[-1] == slow else 0.02)
            return usual(*given)

        monkeypatch.setattr(training, "dense_logits", logits)
        return training.faster_precision(ranker, BATCH)

    assert chosen("bfloat16", 0.08) == "float32"
    assert chosen("float32", 0.08) == "bfloat16"


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
        monkeypatch.setattr(training, "SCORE_ROWS", rows)
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


def test_a_stopped_training_goes_on_to_the_bits_of_one_that_was_not(trained: training.Trained, tmp_path: Path) -> None:
    class StoppedError(Exception):
        """Stands for a kill: nothing is cleaned up."""

    checkpointing = training.Checkpointing(tmp_path / "here", seconds=0.0)
    rows = TRAIN.height
    for stop in (rows // 2, rows, rows + rows // 3, 2 * rows - 1, 10**9):

        def progress(done: int, total: int, stop: int = stop) -> None:
            if done >= stop:
                raise StoppedError

        with contextlib.suppress(StoppedError):
            found = train(SCHEMA, FRAME, SMALL_TRAIN, progress=progress, checkpointing=checkpointing)
    assert found.epochs == trained.epochs
    first, second = snapshot(trained.ranker), snapshot(found.ranker)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_training_is_not_gone_on_from(tmp_path: Path) -> None:
    checkpointing = training.Checkpointing(tmp_path / "here", seconds=0.0)
    train(SCHEMA, FRAME, replace(SMALL_TRAIN, seed=7, max_epochs=1), checkpointing=checkpointing)
    found = train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=1), checkpointing=checkpointing)
    alone = train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=1))
    assert found.epochs == alone.epochs


def test_an_empty_part_and_a_label_that_is_none_are_refused() -> None:
    for name in ("train", "validation"):
        rest = Frame(FRAME.users, FRAME.items, FRAME.examples.filter(pl.col("split") != name))
        with pytest.raises(DatasetError, match=f"part '{name}' is empty"):
            train(SCHEMA, rest, SMALL_TRAIN)
    odd = FRAME.examples.with_columns(label=pl.when(pl.int_range(pl.len()) == 3).then(2).otherwise(pl.col("label")))
    with pytest.raises(DatasetError, match=r"the example of event 3 has the label 2\.0; expected 0 or 1"):
        train(SCHEMA, Frame(FRAME.users, FRAME.items, odd), SMALL_TRAIN)


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(TrainingError, match=r"diverged in epoch 0.*table_rate"):
        train(SCHEMA, FRAME, replace(SMALL_TRAIN, network_rate=float("inf")))


def test_a_checkpoint_is_never_written_of_a_training_that_diverged(tmp_path: Path) -> None:
    checkpointing = training.Checkpointing(tmp_path / "here", seconds=0.0)
    with pytest.raises(TrainingError, match="diverged in epoch 0"):
        train(SCHEMA, FRAME, replace(SMALL_TRAIN, network_rate=float("inf")), checkpointing=checkpointing)
    assert not checkpointing.path.exists()


def test_a_stored_ranker_names_the_device_of_its_training(tmp_path: Path) -> None:
    trained = replace(
        train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=1)), device={"device": "cuda", "card": "H100"}
    )
    save_ranker(tmp_path, SCHEMA, trained)
    assert load_ranker(tmp_path, SMALL_TRAIN)[1].device == trained.device


@pytest.mark.parametrize("options", [TableOptions(dim=4, history="attention"), TableOptions(dim=4, content=True)])
def test_attention_and_content_are_trained_and_decide_nothing_that_is_not_there(options: TableOptions) -> None:
    vectors = np.random.default_rng(0).random((FRAME.items.height, 6), dtype=np.float32)
    items = FRAME.items.with_columns(pl.Series("content_vector", vectors, dtype=pl.Array(pl.Float32, 6)))
    frame = Frame(FRAME.users, items, FRAME.examples)
    schema = default_schema(coloured_dataset(), frame, options, history_length=5)
    found = train(schema, frame, SMALL_TRAIN)
    source, rows = assembler(schema, frame, TEST, ADMISSION), examples(TEST)
    scored = predict(found.ranker, source, rows)
    auc = quality(rows.labels, scored).auc
    assert auc is not None
    assert auc > 0.99
    fresh = snapshot(new_ranker(schema, SMALL_TRAIN))
    part = "attention" if options.history == "attention" else "content"
    moved = [name for name, tensor in snapshot(found.ranker).items() if not torch.equal(tensor, fresh[name])]
    assert any(name.startswith(f"network.{part}.") for name in moved)
    # An example is scored alike in any company, with a history or without.
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_allclose(predict(found.ranker, source, rows.take(order)), scored[order], rtol=0, atol=1e-6)


def test_attention_weighs_the_history_by_the_candidate_and_an_empty_one_by_nothing() -> None:
    attention = TargetAttention(2, 2)
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(2) * 30)
        attention.key.weight.copy_(torch.eye(2))
    items = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]).repeat(3, 1, 1)
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = attention(candidate, items, torch.tensor([2, 2, 0]))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), rtol=0, atol=1e-6)


def test_options_that_name_no_feature_or_too_many_lookups_are_refused() -> None:
    for options, problem in (
        (TableOptions(chunks={"item.color": 2}), "no feature 'item.color'.*item.colour"),
        (TableOptions(exact=("nothing",)), "no feature 'nothing'"),
        (TableOptions(chunks={"item_id": 17}), "expected 1 to 16 lookups, got 17"),
        (TableOptions(content=True), "no content vectors"),
        (TableOptions(dim=4, budget=100, exact=("item_id",)), "give at least"),
    ):
        with pytest.raises(BundleError, match=problem):
            default_schema(coloured_dataset(), FRAME, options)


def test_a_budget_in_bytes_is_kept_and_lookups_are_as_asked() -> None:
    options = TableOptions(dim=8, budget=64_000, chunks={"item_id": 3}, exact=("item.colour",))
    schema = default_schema(coloured_dataset(), FRAME, options)
    assert schema.rows * schema.dim * 4 <= 64_000 < (schema.rows + 1) * schema.dim * 4
    chunks = {feature.name: feature.chunks for feature in schema.features}
    assert (chunks["item_id"], chunks["history.item_id"], chunks["item.colour"]) == (3, 1, 1)
    assert {f.name for f in schema.features if f.exact} == {"item.colour", "history.item.colour"}
    assert schema.hashed_rows == schema.rows - len(COLOURS)
