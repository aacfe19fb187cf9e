"""`bench aggregates`: hard events, ways that agree, arms that differ in one factor, claims that can fail."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.aggregate.plan import plan_of
from features.aggregate_frame import with_aggregates
from features.dataset.label import Label
from features.errors import DatasetError, TesseraError
from features.frame import Frame
from models.bundle.bundle import write_bundle
from models.table.default_schema import TableOptions, default_schema
from models.table.schema import SEMANTIC_ID, Schema
from tessera.bench.aggregate import law, quality, step, tiles
from tessera.bench.aggregate.events import HOUR_US, PLAN, generate, in_batches, in_order
from tessera.bench.aggregate.quality import ARMS, DEFAULT, LINE, AblationArm
from tessera.bench.harness.live_data import LiveData
from tessera.bench.offline.aggregates import Sizes, aggregates
from tessera.pipeline.options import RunOptions
from tests.build import SMALL_TRAIN, coloured_dataset, coloured_frame, coloured_parts
from tests.integration.world import quiet


@pytest.fixture(scope="module")
def frame() -> Frame:
    return with_aggregates(coloured_frame(events=400), plan_of(coloured_dataset()))[0]


def test_generated_events_have_ties_late_events_edges_and_negatives() -> None:
    found = generate(4_000, seed=3)
    gaps = np.diff(found.time)
    assert 0.02 < (gaps < 0).mean() < 0.1
    assert (gaps == 0).mean() > 0.1
    assert 0.05 < (~found.enters).mean() < 0.15
    assert not found.label[~found.enters].any()
    assert np.bincount(found.item).max() > 3 * len(found.item) / len(found.genres)
    ordered = in_order(found)
    same = ordered.item[:, None] == ordered.item
    assert ((ordered.time[:, None] - ordered.time)[same] == 168 * HOUR_US).sum() > 20
    assert {0, 1, 2, 3} == {len(genres) for genres in found.genres}


def test_frame_stream_and_loop_agree_on_every_bit() -> None:
    rows = list(law.law(1_500, seed=0))
    assert [row["order"] for row in rows] == ["by time", "with late events"]
    assert all(row["values"] == 1_500 * len(PLAN.columns) for row in rows)
    assert [claim.value for claim in law.law_claims(rows)] == [0, 0]
    # In another order the answers are others, so the comparison can fail.
    arrived = generate(1_500, seed=0)
    assert law.differences(law.passed(arrived, 1_500), law.passed(in_batches(arrived), 1_500)) > 100


def test_a_value_that_differs_by_a_bit_fails_the_law() -> None:
    one, other = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)
    other[1, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert law.differences(one, other) == 1
    claims = law.law_claims([{"part": "law", "frame_differs": 0, "stream_differs": 1}])
    assert [claim.holds for claim in claims] == [True, False]


def test_tiles_hold_the_events_of_earlier_tiles_of_the_window() -> None:
    tile = HOUR_US // 24
    times = [0, 1, tile, 24 * tile, 25 * tile]
    examples = pl.DataFrame(
        {"event": range(5), "user": [0] * 5, "item": [0] * 5, "time": times, "label": [1, 0, 1, 0, 1]},
        schema_overrides={"time": pl.Int64},
    )
    found = tiles.tiled(Frame(pl.DataFrame(), pl.DataFrame(), examples))
    # The third event sees both events of the first tile. The last one sees the fourth, whose window began after them.
    assert found["user.1h.count"].to_list() == [None, None, 2, 3, 2]
    assert found["user.1h.positive"].to_list() == [None, None, 1, 2, 1]


def test_frames_are_timed_beside_tiles_and_claimed_by_medians() -> None:
    rows = list(tiles.measured(600, 0))
    assert [row["way"] for row in rows] == ["tessera: windows", "tessera: decay", "polars: tiles"]
    assert all(row["events_per_s"] > 0 for row in rows)
    rates = {"tessera: windows": 40.0, "tessera: decay": 60.0, "polars: tiles": 80.0}
    claims = tiles.frame_claims([{"part": "frame", "way": way, "events_per_s": rate} for way, rate in rates.items()])
    assert [(claim.value, claim.holds) for claim in claims] == [(0.5, True), (0.75, False)]


def test_steps_with_and_without_aggregates_are_timed_in_turns(tmp_path: Path) -> None:
    bundle = write_bundle(coloured_parts(tmp_path, epochs=0), tmp_path / "bundle")
    data = LiveData(bundle, [b'{"user_id": "u1", "item_id": "i2", "label": 1, "time": "1970-01-02T00:00:00Z"}'])
    ways = ("four aggregates", "default aggregates", "no aggregates")
    rows = list(step.step_rates(dict.fromkeys(ways, data), seed=0, events=300, rounds=1))
    assert [row["batch"] for row in rows] == [64, 256]
    assert all(row["four_over_none"] > 0 for row in rows)


def test_the_step_is_claimed_by_the_median_round_at_the_larger_batch() -> None:
    ratios = {64: (0.9, 0.9, 0.9), 256: (0.7, 0.74, 0.9)}
    rows: list[dict[str, Any]] = [
        {"part": "step", "batch": batch, "four_over_none": ratio} for batch, found in ratios.items() for ratio in found
    ]
    (claim,) = step.step_claims(rows)
    assert (claim.value, claim.holds) == (0.74, False)


def test_four_aggregates_are_of_the_dataset() -> None:
    declared = step.four_aggregates(coloured_dataset())
    assert len(declared) == 4
    assert declared["user_genre"].by == ("user", "item.colour")
    plan = plan_of(coloured_dataset().model_copy(update={"aggregates": declared}), "declared")
    assert plan.groups[0].windows_us == (HOUR_US, 24 * HOUR_US, 168 * HOUR_US)


def _names(schema: Schema) -> set[str]:
    return {one.name for one in schema.features} | {one.name for one in schema.numeric}


def test_each_arm_reads_all_but_what_it_leaves_out(frame: Frame) -> None:
    schema = default_schema(coloured_dataset(), frame, TableOptions(dim=4), history_length=5)
    for arm, gone in (
        (AblationArm("all", ids=False), {"user_id", "item_id", "history.item_id"}),
        (AblationArm("all", history=False), {"history.item_id", "history.item.colour", "history.length"}),
        (ARMS[DEFAULT], set[str]()),
    ):
        read = quality.read_by(schema, arm)
        assert _names(schema) - _names(read) == gone
    assert all(f.column != SEMANTIC_ID for f in quality.read_by(schema, AblationArm("all", content=False)).features)


def test_kinds_of_aggregates_build_on_one_another(frame: Frame) -> None:
    plan = frame.aggregates
    by_kind = {kind: quality.of_kinds(plan, kind).aggregations for kind in ("none", "rates", "crossed", "all")}
    assert by_kind["none"] == ()
    assert [one.name for one in by_kind["rates"]] == ["user_rate", "item_rate"]
    assert {one.name for one in by_kind["crossed"]} - {"user_rate", "item_rate"} == {"user_item_colour"}
    assert by_kind["all"] == plan.aggregations


@pytest.mark.parametrize("name", ["user and item rates", "default without ids", "trees, + crossed rates"])
def test_an_arm_is_trained_and_measured_for_known_and_unseen_users(frame: Frame, name: str) -> None:
    options = RunOptions(table=TableOptions(dim=4), history_length=5, training=SMALL_TRAIN)
    found = quality._trained(coloured_dataset(), frame, options, ARMS[name])
    assert set(found) == {"auc", "known_users_auc", "unseen_users_auc", "unseen_users_rows"}
    assert 0.4 < found["auc"] <= 1


def test_the_default_is_claimed_against_the_running_rates_in_the_worst_seed() -> None:
    aucs = {(LINE, 0): 0.80, (LINE, 1): 0.80, (DEFAULT, 0): 0.83, (DEFAULT, 1): 0.805}
    rows = [
        {"part": "quality", "seed": seed, "model": model, "auc": auc, "unseen_users_auc": auc + seed}
        for (model, seed), auc in aucs.items()
    ]
    claims = quality.quality_claims(rows)
    assert [round(claim.value, 6) for claim in claims] == [0.005, 0.005]
    assert not any(claim.holds for claim in claims)


def test_parts_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="--part 'laws': bench aggregates has the parts law, frame, step, quality"):
        aggregates(coloured_dataset(), tmp_path, seeds=1, console=quiet(), parts=["laws"])
    implicit = coloured_dataset(label=Label(implicit=True))
    with pytest.raises(DatasetError, match="a clock and explicit labels"):
        aggregates(implicit, tmp_path, seeds=1, console=quiet(), parts=["quality"])


def test_chosen_parts_alone_are_measured(tmp_path: Path) -> None:
    result = aggregates(coloured_dataset(), tmp_path, seeds=1, console=quiet(), parts=["law"], sizes=Sizes(law=300))
    assert {row["part"] for row in result.rows} == {"law"}
    assert len(result.claims) == 2
    assert result.holds
