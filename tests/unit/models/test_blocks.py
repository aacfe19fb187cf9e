"""Training on a part in blocks: statistics as of one block, one block in memory, the same bits when resumed."""

import contextlib
import itertools
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features import frame_blocks
from features.aggregate.plan import NOTHING, plan_of, with_base_rate
from features.aggregate_frame import aggregated_by, aggregated_part, with_aggregates
from features.dataset.aggregate import Aggregate
from features.dataset.source import Categorical
from features.dataset.split import PARTS
from features.errors import DatasetError
from features.frame import Frame, build_frame, stored_frame, write_examples
from features.frame_blocks import Blocks, shown_items
from features.hashing import fingerprint, value_keys
from features.training_events import event_ids, trained_on
from models.bundle.from_frame import kept_history, trained_until, with_train_positives
from models.ranker import evaluate
from models.ranker import train as training
from models.ranker.evaluate import novelty, quality, rate_baselines
from models.ranker.loading import LoadedBlocks, dimensions, examples, sighted
from models.ranker.order import EpochOrder
from models.ranker.recode import recode
from models.ranker.train import predict, predict_part, snapshot, train
from models.table.admission import Admission
from models.table.batch import Assembler, Examples
from models.table.default_schema import TableOptions, default_schema, mean_and_deviation
from models.table.schema import SEMANTIC_ID
from tests.build import SMALL_TRAIN, coloured_dataset, coloured_tables

DATASET = coloured_dataset(categorical={"place": Categorical()}, numeric=("amount",))
ROWS, ITEMS = 60, 300
"""Examples of a block, and items, in these tests."""


def eventful_frame() -> Frame:
    """A frame whose events have columns of their own, aggregates, and a drawn negative behind every third positive.

    Its events are in no order of time, and ten have the same time.
    """
    rng, tables = np.random.default_rng(1), coloured_tables(events=1_000, items=ITEMS)
    places = [None if place == 0 else f"p{place}" for place in rng.zipf(1.5, 1_000) % 200]
    amounts = pl.Series(np.exp(rng.normal(3, 1, 1_000)).astype(np.float32))
    tables["events"] = tables["events"].with_columns(
        pl.Series("place", places, dtype=pl.String),
        amount=pl.when(pl.int_range(pl.len()) % 7 > 0).then(amounts),
        time=pl.Series(rng.permutation(1_000) // 10),
    )
    frame = build_frame(DATASET, tables, split=DATASET.split, history_length=5)
    drawn = frame.examples.filter((pl.col("label") == 1) & (pl.col("event") % 3 == 0))
    both = pl.concat(
        [frame.examples, drawn.with_columns(label=pl.lit(0, dtype=pl.Int8), item=(pl.col("item") + 1) % ITEMS)]
    )
    frame = frame.replace(examples=both[np.argsort(both["event"].to_numpy(), kind="stable")])
    return with_aggregates(frame, plan_of(DATASET))[0]


FRAME = eventful_frame()
SCHEMA = default_schema(DATASET, FRAME, TableOptions(dim=4), history_length=5)
COUNT = FRAME.height("train")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frame:
    """The frame in files, in blocks of `ROWS`; in memory it stays one block."""
    for name in ("users", "items"):
        getattr(FRAME, name).write_parquet(tmp_path / f"{name}.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(frame_blocks, "BLOCK_ROWS", ROWS)
        write_examples(FRAME, tmp_path)
    found = stored_frame(tmp_path, FRAME.aggregates)
    assert all(len(found.blocks(part)) > len(FRAME.blocks(part)) == 1 for part in PARTS)
    return found


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 50), st.integers(0, 3), st.integers(0, 2**32)
)
def test_an_epoch_reads_each_example_once_block_after_block(
    heights: list[int], batch: int, epoch: int, seed: int
) -> None:
    draws = list(EpochOrder(heights, batch, seed=seed, epoch=epoch).draws())
    read: dict[int, list[int]] = {}
    position = 0
    for draw in draws:
        assert draw.start == position
        position += len(draw.rows)
        # A block is left for good when another begins.
        assert draw.block in (list(read)[-1:] or [draw.block]) or draw.block not in read
        read.setdefault(draw.block, []).extend(draw.rows.tolist())
        assert 0 < len(draw.rows) <= batch
    assert {block: sorted(rows) for block, rows in read.items()} == {
        block: list(range(height)) for block, height in enumerate(heights) if height
    }
    assert len(draws) == sum(-(-height // batch) for height in heights)
    # The same order again, from any batch on.
    for after in {0, len(draws) // 2, len(draws) - 1, len(draws)} - {-1}:
        rest = list(EpochOrder(heights, batch, seed=seed, epoch=epoch).draws(after=after))
        assert [(draw.block, draw.rows.tolist(), draw.start) for draw in rest] == [
            (draw.block, draw.rows.tolist(), draw.start) for draw in draws[after:]
        ]


def test_one_block_is_read_in_one_permutation_and_several_in_other_orders_each_epoch() -> None:
    whole = np.concatenate([draw.rows for draw in EpochOrder([100], 7, seed=5, epoch=2).draws()])
    np.testing.assert_array_equal(whole, np.random.default_rng([5, 2]).permutation(100))
    orders = [
        [(draw.block, *draw.rows.tolist()) for draw in EpochOrder([30] * 6, 30, seed=5, epoch=epoch).draws()]
        for epoch in range(3)
    ]
    assert len({tuple(draw[0] for draw in order) for order in orders}) > 1
    assert len({draw[1:] for order in orders for draw in order}) == 18


def test_the_schema_and_the_sketch_of_blocks_are_those_of_one_block(stored: Frame) -> None:
    found = default_schema(DATASET, stored, TableOptions(dim=4), history_length=5)
    assert replace(found, numeric=()) == replace(SCHEMA, numeric=())
    for one, other in zip(SCHEMA.numeric, found.numeric, strict=True):
        assert (one.name, one.of, one.column) == (other.name, other.of, other.column)
        assert (other.mean, other.std) == pytest.approx((one.mean, one.std), rel=1e-5, abs=1e-6)
    exact = TableOptions(dim=4, exact=("event.place",))
    first, second = (default_schema(DATASET, frame, exact, history_length=5) for frame in (FRAME, stored))
    assert first.features == second.features
    assert {"event.place", "event.amount"} <= {feature.name for feature in (*found.features, *found.numeric)}
    one, other = (sighted(SCHEMA, frame, frame.blocks("train")).admission.published for frame in (FRAME, stored))
    np.testing.assert_array_equal(one.cells, other.cells)
    # Of one event only the first example counts, so a drawn negative sights nothing.
    events = FRAME.part("train").unique("event", keep="first", maintain_order=True)
    keys = value_keys("item_id", fingerprint(FRAME.items["item_id"].to_list()))
    true = np.bincount(events["item"].to_numpy(), minlength=len(keys))
    np.testing.assert_array_equal(other.count(keys), true)


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=30), max_size=6))
def test_mean_and_deviation_of_blocks_are_those_of_all_values(given_blocks: list[list[float]]) -> None:
    blocks = [np.array(block, dtype=np.float32) for block in given_blocks]
    values = np.concatenate([np.zeros(0, dtype=np.float32), *blocks])
    mean, std = mean_and_deviation(blocks)
    if not len(values):
        assert (mean, std) == (0.0, 1.0)
        return
    wide = values.astype(np.float64)
    assert (mean, std) == pytest.approx((wide.mean(), wide.std()), rel=1e-4, abs=1e-2)
    assert mean_and_deviation([values]) == (float(values.mean()), float(values.std()))


def test_training_in_blocks_learns_as_much_and_reads_files_as_memory(
    stored: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(SCHEMA, FRAME, SMALL_TRAIN)
    kept = train(SCHEMA, stored, SMALL_TRAIN)
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", ROWS)
    first, second = (train(SCHEMA, frame, SMALL_TRAIN) for frame in (stored, FRAME))
    assert kept.epochs == first.epochs
    assert first.epochs == second.epochs
    assert all(torch.equal(first_one, second_one) for first_one, second_one in _pairs(first, second))
    assert whole.epochs != first.epochs
    assert min(first.epochs) == pytest.approx(min(whole.epochs), abs=0.03)


def _pairs(first: training.Trained, second: training.Trained) -> list[tuple[torch.Tensor, torch.Tensor]]:
    one, other = snapshot(first.ranker), snapshot(second.ranker)
    return [(one[name], other[name]) for name in one]


def test_a_training_in_blocks_that_was_stopped_goes_on_to_the_same_bits(
    stored: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", ROWS)

    class StoppedError(Exception):
        """Stands for a kill: nothing is cleaned up."""

    checkpointing = training.Checkpointing(tmp_path / "here", seconds=0.0)
    config = replace(SMALL_TRAIN, max_epochs=2, batch=32)
    unstopped = train(SCHEMA, stored, config)
    seen: list[int] = []
    heights = stored.blocks("train").heights
    # Inside a block, at its end, in the next epoch, at the end.
    for stop in (COUNT // 3, max(heights), COUNT, COUNT + COUNT // 2, 10**9):

        def progress(done: int, total: int, stop: int = stop) -> None:
            seen.append(done)
            if done >= stop:
                raise StoppedError

        with contextlib.suppress(StoppedError):
            found = train(SCHEMA, stored, config, progress=progress, checkpointing=checkpointing)
    assert found.epochs == unstopped.epochs
    assert all(torch.equal(one, other) for one, other in _pairs(found, unstopped))
    assert seen[-1] == 2 * COUNT
    # Nothing but the batches after the last checkpoint was done again.
    assert sum(later <= earlier for earlier, later in itertools.pairwise(seen)) <= 5


def test_a_checkpoint_of_other_blocks_is_not_gone_on_from(stored: Frame, tmp_path: Path) -> None:
    checkpointing = training.Checkpointing(tmp_path / "here", seconds=0.0)
    config = replace(SMALL_TRAIN, max_epochs=1)
    train(SCHEMA, stored, config, checkpointing=checkpointing)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frame_blocks, "BLOCK_ROWS", 2 * ROWS)
        found = train(SCHEMA, FRAME, config, checkpointing=checkpointing)
        alone = train(SCHEMA, FRAME, config)
    assert found.epochs == alone.epochs
    assert all(torch.equal(one, other) for one, other in _pairs(found, alone))


def test_a_block_is_released_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", ROWS)
    loaded: list[weakref.ref[Examples]] = []
    alive: list[int] = []
    blocks = {part: FRAME.blocks(part) for part in ("train", "validation")}

    def watched(own: Blocks) -> Blocks:
        def read(number: int, columns: object) -> pl.DataFrame:
            alive.append(sum(ref() is not None for ref in loaded))
            return own.read(number, columns)  # type: ignore[arg-type]

        return Blocks(own.heights, read)

    load = LoadedBlocks.load

    def noted(self: LoadedBlocks, part: str, number: int) -> tuple[Assembler, Examples]:
        found = load(self, part, number)
        loaded.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr(LoadedBlocks, "load", noted)
    frame = Frame(FRAME.users, FRAME.items, {part: watched(own) for part, own in blocks.items()}, FRAME.aggregates)
    train(SCHEMA, frame, replace(SMALL_TRAIN, max_epochs=2))
    assert len(set(map(id, loaded))) > 2 * len(blocks["train"])
    assert set(alive) == {0}


def test_a_frame_of_one_block_is_read_once() -> None:
    count = 0

    def read(number: int, columns: object) -> pl.DataFrame:
        nonlocal count
        count += "history" in (columns or ())  # type: ignore[operator]
        return FRAME.part("train").select(columns)  # type: ignore[arg-type]

    train_part = Blocks((COUNT,), read)
    frame = Frame(
        FRAME.users, FRAME.items, {"train": train_part, "validation": FRAME.blocks("validation")}, FRAME.aggregates
    )
    train(SCHEMA, frame, replace(SMALL_TRAIN, max_epochs=3))
    assert count == 1


def test_a_wrong_label_in_a_later_block_is_refused_before_training(stored: Frame) -> None:
    odd = FRAME.part("train")["event"][-1]
    wrong = pl.when(pl.col("event") == odd).then(2).otherwise(pl.col("label")).alias("label")
    parts = {
        part: stored.blocks(part).mapped(lambda block: block.with_columns(wrong)) for part in ("train", "validation")
    }

    def progress(done: int, total: int) -> None:
        pytest.fail("training began")

    with pytest.raises(DatasetError, match=rf"the example of event {odd} has the label 2\.0"):
        train(SCHEMA, Frame(FRAME.users, FRAME.items, parts, FRAME.aggregates), SMALL_TRAIN, progress=progress)


def test_predictions_of_blocks_are_in_the_order_of_the_part(stored: Frame) -> None:
    ranker = train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=1)).ranker
    test = FRAME.part("test")
    loaded = LoadedBlocks(dimensions(SCHEMA, FRAME, Admission.off()), {})
    alone = predict(ranker, loaded.source.with_events(test), examples(test))
    found = predict_part(ranker, SCHEMA, stored, stored.blocks("test"), Admission.off())
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)
    assert (quality(test["label"].to_numpy().astype(np.float32), found).auc or 0) > 0.9


def test_what_a_bundle_takes_from_the_examples_is_the_same_from_blocks(stored: Frame) -> None:
    assert kept_history(stored, 3).equals(kept_history(FRAME, 3))
    # A user has more visits than are kept, so blocks compete for them.
    assert kept_history(FRAME, 3).group_by("user_id").len()["len"].max() == 6
    positive = FRAME.examples.filter((pl.col("label") == 1) & (pl.col("split") != "test")).sort("time", "event")
    for user, name in enumerate(FRAME.users["user_id"].to_list()):
        items = positive.filter(pl.col("user") == user)["item"].tail(6)
        found = kept_history(stored, 3).filter(pl.col("user_id") == name)["item_id"]
        assert found.to_list() == FRAME.items["item_id"].gather(items).to_list()
    assert trained_until(stored, DATASET) == trained_until(FRAME, DATASET) == FRAME.part("validation")["time"].max()
    assert with_train_positives(stored).equals(with_train_positives(FRAME))
    shown = shown_items(stored.blocks("train"), ITEMS)
    assert shown.tolist() == np.bincount(FRAME.part("train")["item"].to_numpy(), minlength=ITEMS).tolist()
    for part in ("train", "test"):
        np.testing.assert_array_equal(event_ids(stored, part), event_ids(FRAME, part))
    np.testing.assert_array_equal(trained_on(stored), trained_on(FRAME))


def test_evaluation_reads_blocks_to_the_same_numbers(stored: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    for column in ("user", "item"):
        found, expected = novelty(stored, column), novelty(FRAME, column)  # type: ignore[arg-type]
        assert found is not None
        assert expected is not None
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.known, expected.known)
    expected_rates = rate_baselines(FRAME)
    monkeypatch.setattr(evaluate, "_KEYS_AT_ONCE", 100)
    for name, rates in rate_baselines(stored).items():
        np.testing.assert_array_equal(rates, expected_rates[name])


def test_columns_of_another_plan_stand_beside_the_same_examples(stored: Frame) -> None:
    spend = {
        "user_spend": Aggregate(by=("user",), value={"sum": "amount"}),
        "user_places": Aggregate(by=("user",), value={"distinct": "place"}),
    }
    plan = with_base_rate(plan_of(DATASET.model_copy(update={"aggregates": spend})), 0.4)
    assert plan.value_columns == ("amount",)
    expected = aggregated_by(FRAME, plan).part("test")
    assert aggregated_part(stored, "test", plan).whole().equals(expected)
    assert aggregated_part(FRAME, "test", plan).whole(*plan.columns).equals(expected.select(plan.columns))
    assert aggregated_part(stored, "test", FRAME.aggregates).whole().equals(FRAME.part("test"))
    none = aggregated_part(stored, "test", NOTHING).whole()
    assert none.equals(FRAME.part("test").drop(FRAME.aggregates.columns))


def test_rows_move_to_new_semantic_ids_alike_from_blocks(stored: Frame) -> None:
    tokens = pl.Series(SEMANTIC_ID, [[f"{n % 4}", f"{n % 4}.{n}"] for n in range(ITEMS)], dtype=pl.List(pl.String))
    old = FRAME.items.select("item_id").with_columns(tokens)
    new = FRAME.items.with_columns(tokens.reverse())
    coded = FRAME.replace(items=new)
    # So few rows that the tokens share them with other features.
    schema = default_schema(DATASET, coded, TableOptions(dim=4, budget=4 * 4 * 128), history_length=5)
    rankers = [training.new_ranker(schema, SMALL_TRAIN) for _ in range(3)]
    for ranker, frame in zip(rankers, (coded, stored.replace(items=new)), strict=False):
        recode(schema, ranker, frame, old)
    weights = [ranker.table.weight for ranker in rankers]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(weights[0], weights[2])
