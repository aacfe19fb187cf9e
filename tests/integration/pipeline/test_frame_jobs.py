"""A frame that jobs build is the frame that is built in memory, for any number of partitions and any engine."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import plan_of
from features.aggregate.stored import aggregate_arrays
from features.aggregate_frame import with_aggregates
from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.profile import Profile, profile
from features.dataset.tables import DatasetTables
from features.errors import DatasetError, TesseraError
from features.frame import Frame, build_frame
from features.frame_blocks import stored_blocks
from features.framing.build import FrameJobs
from features.framing.choices import Built, FrameChoices, JobSizes, is_large
from features.framing.profile import profile_of
from features.jobs.engine import Engine
from tessera.pipeline import frame as frame_stage
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import run
from tests.integration.world import quiet

EVENTS, ITEMS, USERS, LENGTH = 900, 60, 45, 5


def write_tables(directory: Path, *, kind: str = "parquet", files: int = 2) -> None:
    """Writes events with ties, unknown ids, lists, missing values and rows without a label."""
    rng = np.random.default_rng(0)
    items = pl.DataFrame(
        {
            "sku": [f"i{number}" for number in range(ITEMS)],
            "title": [f"a thing of kind{number % 7}" for number in range(ITEMS)],
            "tags": [["a", "b", "c"][: number % 4] for number in range(ITEMS)],
            "price": [None if number % 9 == 0 else number * 0.5 for number in range(ITEMS)],
        }
    )
    items.write_parquet(directory / "items.parquet", row_group_size=16)
    users = pl.DataFrame({"id": [f"u{n}" for n in range(USERS)], "land": [f"l{n % 4}" for n in range(USERS)]})
    users.write_parquet(directory / "users.parquet")
    events = pl.DataFrame(
        {
            # The last ids are in no table.
            "user": [f"u{number}" for number in rng.integers(0, USERS + 10, EVENTS)],
            "item": [f"i{number}" for number in np.minimum(rng.zipf(1.3, EVENTS), ITEMS + 9)],
            "at": rng.permutation(np.arange(EVENTS) // 3) + 1_700_000_000,
            "stars": pl.Series(rng.integers(1, 6, EVENTS)),
            "place": [f"p{number}" for number in rng.integers(0, 5, EVENTS)],
            "paid": rng.random(EVENTS).round(3),
        }
    )
    for number in range(files):
        start = EVENTS * number // files
        part = events.slice(start, EVENTS * (number + 1) // files - start)
        if kind == "parquet":
            part.write_parquet(directory / f"events-{number}.parquet", row_group_size=70)
        else:
            part.write_csv(directory / f"events-{number}.csv")


def dataset(directory: Path, *, split: str = "time", label: str = "", kind: str = "parquet", more: str = "") -> Dataset:
    label = label or 'label = { column = "stars", positive = ">= 4", negative = "<= 2" }'
    path = directory / "shop.toml"
    path.write_text(f'''
name = "shop"
[items]
path = "items.parquet"
id = "sku"
text = ["title"]
categorical = ["tags"]
numeric = ["price"]
[users]
path = "users.parquet"
id = "id"
categorical = ["land"]
[events]
path = "events-*.{kind}"
user = "user"
item = "item"
time = {{ column = "at", unit = "s" }}
{label}
categorical = ["place"]
numeric = ["paid"]
[split]
by = "{split}"
{more}
''')
    return load_dataset(path)


EXPRESSIONS = """
[features]
dear = { sql = "item.price > 10 AND LENGTH(item.title) > 3", kind = "numeric" }
area = { column = "user.land", values = { l1 = "east", l2 = "west" } }
hour = { sql = "EXTRACT(HOUR FROM event.at)", kind = "categorical" }
spent = "LN(1 + event.paid)"
bargain = "event.paid / NULLIF(item.price, 0)"
home = "event.place || '/' || user.land || '/' || SUBSTR(item.title, 1, 9)"
"""


def in_memory(dataset: Dataset) -> tuple[Frame, Aggregator, Profile]:
    tables = DatasetTables(dataset)
    found = {"events": tables.events[0], "users": tables.users, "items": tables.items}
    given = {name: table for name, table in found.items() if table is not None}
    frame = build_frame(dataset, given, split=dataset.split, history_length=LENGTH)
    return (*with_aggregates(frame, plan_of(dataset)), profile(dataset))


def by_jobs(dataset: Dataset, out: Path, partitions: int, engine: Engine | None = None) -> tuple[Built, pl.DataFrame]:
    rows = -(-EVENTS // partitions)
    sizes = JobSizes(slice_rows=rows, partition_rows=rows, block_rows=max(rows, 100))
    order = FrameChoices(dataset, dataset.split, LENGTH, plan_of(dataset))
    jobs = FrameJobs(order, out / ".jobs", out, engine=engine, sizes=sizes)
    built = jobs.run()
    return built, examples(out)


def examples(out: Path) -> pl.DataFrame:
    """All examples in the order of a frame in memory."""
    found = pl.concat([block for blocks in stored_blocks(out).values() for block in blocks.frames()])
    return found[np.argsort(found["event"].to_numpy(), kind="stable")]


def assert_same(dataset: Dataset, built: Built, found: pl.DataFrame, out: Path) -> None:
    frame, aggregator, expected = in_memory(dataset)
    assert found.schema == frame.examples.schema
    for name in found.columns:
        assert found[name].equals(frame.examples[name]), name
    for one, table in ((built.users, frame.users), (built.items, frame.items)):
        assert pl.concat(list(one.slices())).equals(table)
    assert built.plan == frame.aggregates
    states: tuple[dict[str, NDArray[Any]], ...] = tuple(map(aggregate_arrays, (built.aggregator, aggregator)))
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())
    assert profile_of(dataset, built, stored_blocks(out)) == expected


@pytest.mark.parametrize("partitions", [1, 4, 16])
def test_any_number_of_partitions_gives_the_frame_of_memory(tmp_path: Path, partitions: int) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path, more=EXPRESSIONS)
    built, found = by_jobs(shop, tmp_path / "out", partitions)
    assert {"hour", "spent", "bargain", "home"} <= set(found.columns)
    # A fifth of the events have no label.
    assert len(built.parts) == {1: 1, 4: 4, 16: 13}[partitions]
    assert len(stored_blocks(tmp_path / "out")["train"]) == {1: 1, 4: 3, 16: 6}[partitions]
    assert_same(shop, built, found, tmp_path / "out")


def test_workers_of_an_engine_give_the_same_frame(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    engine = Engine("direct", options=("--direct_num_workers=2", "--direct_running_mode=multi_threading"))
    assert_same(shop, *by_jobs(shop, tmp_path / "out", 2, engine), tmp_path / "out")


@pytest.mark.parametrize("split", ["random", "order", "leave-one-out"])
def test_each_split_is_that_of_memory(tmp_path: Path, split: str) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path, split=split)
    assert_same(shop, *by_jobs(shop, tmp_path / "out", 3), tmp_path / "out")


@pytest.mark.parametrize("split", ["time", "leave-one-out"])
def test_drawn_negatives_depend_on_no_partition(tmp_path: Path, split: str) -> None:
    write_tables(tmp_path)
    label = 'label = { column = "stars", positive = ">= 3", implicit = true, negatives = 3 }'
    shop = dataset(tmp_path, split=split, label=label, more=EXPRESSIONS)
    built, found = by_jobs(shop, tmp_path / "out", 3)
    assert_same(shop, built, found, tmp_path / "out")
    price = pl.read_parquet(tmp_path / "items.parquet")["price"].extend_constant(None, 20).gather(found["item"])
    ratio = (found["paid"].cast(pl.Float64) / price).cast(pl.Float32)
    assert found["bargain"].null_count() > 0
    assert np.allclose(found["bargain"].fill_null(0), ratio.fill_null(0).replace({np.inf: 0, np.nan: 0}), rtol=1e-6)
    assert 2.5 < (found["label"] == 0).sum() / (found["label"] == 1).sum() <= 3


@pytest.mark.parametrize("implicit", [False, True])
def test_a_user_of_very_many_events_is_made_in_ranges_of_time(tmp_path: Path, implicit: bool) -> None:
    write_tables(tmp_path)
    for number in (0, 1):
        path = tmp_path / f"events-{number}.parquet"
        events = pl.read_parquet(path)
        hot = pl.when(pl.int_range(pl.len()) % 3 > 0).then(pl.lit("u7")).otherwise("user")
        events.with_columns(user=hot).write_parquet(path, row_group_size=70)
    label = 'label = { column = "stars", positive = ">= 2", implicit = true, negatives = 2 }' if implicit else ""
    shop = dataset(tmp_path, label=label)
    built, found = by_jobs(shop, tmp_path / "out", 9)
    assert max(counts.files for counts in built.parts) >= 4
    assert_same(shop, built, found, tmp_path / "out")


def test_files_of_csv_are_slices(tmp_path: Path) -> None:
    write_tables(tmp_path, kind="csv", files=3)
    # Without a `[`, a file's values are text; in another file a list is written as text.
    second = tmp_path / "events-1.csv"
    second.write_text(second.read_text().replace(",p1,", ',"[""p1"",""p2""]",'))
    shop = dataset(tmp_path, kind="csv", more="")
    built, found = by_jobs(shop, tmp_path / "out", 2)
    assert found.schema["place"] == pl.List(pl.String)
    assert_same(shop, built, found, tmp_path / "out")


def test_events_without_users_have_no_history(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    alone = shop.model_copy(update={"users": None, "events": shop.events.model_copy(update={"user": None})})
    assert_same(alone, *by_jobs(alone, tmp_path / "out", 3), tmp_path / "out")


def test_jobs_go_on_with_what_is_there(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    _, first = by_jobs(shop, tmp_path / "out", 3)
    kept = tmp_path / "out" / ".jobs" / "events" / "part-00000.parquet"
    before = kept.stat().st_ino
    for damaged in ("examples/blocks/part-00001.json", "numbered/part-00000.arrow", "by-time/part-00002.parquet"):
        (tmp_path / "out" / ".jobs" / damaged).unlink()
    next((tmp_path / "out" / "examples").glob("test-*")).unlink()
    built, again = by_jobs(shop, tmp_path / "out", 3)
    assert kept.stat().st_ino == before
    assert again.equals(first)
    assert_same(shop, built, again, tmp_path / "out")


def test_an_id_that_a_table_has_twice_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    items = pl.read_parquet(tmp_path / "items.parquet")
    pl.concat([items, items.slice(7, 1)]).write_parquet(tmp_path / "items.parquet", row_group_size=16)
    with pytest.raises(TesseraError, match=r"item ids: .*id 'i7' is in the rows 8 and 61 of its table; keep one"):
        by_jobs(dataset(tmp_path), tmp_path / "out", 4)


def test_a_faulty_value_is_named_with_its_row_of_the_file(tmp_path: Path) -> None:
    write_tables(tmp_path)
    events = pl.read_parquet(tmp_path / "events-1.parquet")
    broken = events.with_columns(user=pl.when(pl.int_range(pl.len()) != 400).then("user"))
    broken.write_parquet(tmp_path / "events-1.parquet", row_group_size=70)
    message = r"events-1.parquet: \[events\] column 'user', row 401: the id is null"
    with pytest.raises(TesseraError, match=message):
        by_jobs(dataset(tmp_path), tmp_path / "out", 9)


def test_events_without_positives_and_parts_without_events_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    none = 'label = { column = "stars", positive = ">= 9", negative = "<= 2" }'
    with pytest.raises(DatasetError, match="there are no positive labels"):
        by_jobs(dataset(tmp_path, label=none), tmp_path / "out", 2)
    shop = dataset(tmp_path, split="leave-one-out")
    label = shop.events.label.model_copy(update={"positive": ">= 4"})
    pl.read_parquet(tmp_path / "events-0.parquet").unique("user", keep="first", maintain_order=True).write_parquet(
        tmp_path / "events-0.parquet"
    )
    (tmp_path / "events-1.parquet").unlink()
    few = shop.model_copy(update={"events": shop.events.model_copy(update={"label": label})})
    with pytest.raises(DatasetError, match="leaves the part 'validation' empty"):
        by_jobs(few, tmp_path / "few", 2)


def test_aggregates_of_too_many_keys_are_left_out_or_refused(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path, more='[aggregates]\nmine = { by = ["user", "item"], value = "count" }\n')
    plan = replace(plan_of(shop), most_keys=100)
    optional = frozenset(one.name for one in plan.aggregations)
    order = FrameChoices(shop, shop.split, LENGTH, plan, optional)
    built = FrameJobs(order, tmp_path / "jobs", tmp_path / "out").run()
    assert "mine" in built.large
    assert "user_rate" not in built.large
    assert not [name for name in examples(tmp_path / "out").columns if ".mine" in name]
    with pytest.raises(TesseraError, match="aggregates by user, item: more than 100 distinct keys"):
        FrameJobs(replace(order, optional=optional - {"mine"}), tmp_path / "jobs2", tmp_path / "out2").run()


def test_large_is_decided_by_the_rows_of_the_files(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    assert is_large(shop, EVENTS // 2 - 1)
    assert not is_large(shop, EVENTS // 2)
    assert not is_large(shop)


def test_the_stage_writes_the_same_files_for_large_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    options = RunOptions(
        quantizer="residual-kmeans", encoder_dim=4, levels=2, codes=8, tokens="pieces", history_length=5
    )

    def stage(name: str) -> Path:
        run(shop, tmp_path / name, options, console=quiet(), registry=None, until="frame")
        return tmp_path / name / "frame"

    small = stage("small")
    sizes = JobSizes(slice_rows=16, partition_rows=200, block_rows=1_000)
    monkeypatch.setattr(frame_stage, "is_large", lambda _: True)
    monkeypatch.setattr(frame_stage, "FrameJobs", partial(FrameJobs, sizes=sizes))
    large = stage("large")
    names = sorted(str(path.relative_to(small)) for path in small.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(large)) for path in large.rglob("*") if path.is_file())
    for name in names:
        if name.endswith(".parquet"):
            assert pl.read_parquet(large / name).equals(pl.read_parquet(small / name)), name
            assert pl.read_parquet_schema(large / name) == pl.read_parquet_schema(small / name)
        elif name != "stage.json":
            assert (large / name).read_bytes() == (small / name).read_bytes(), name
