"""Features of expressions in a run, its bundle, a stream and a server: one engine, the same values."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.value.filter import Filter
from models.bundle import record
from models.bundle.bundle import Bundle, load_bundle
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import quiet

FEATURES = """
[features]
decade = { sql = "FLOOR(item.year / 10)", kind = "categorical" }
title_letters = "LENGTH(item.title)"
area = { column = "user.country", file = "areas.csv" }
hour = { sql = "EXTRACT(HOUR FROM event.time)", kind = "categorical" }
"""
HOUR_US = 3_600_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    directory = tmp_path_factory.mktemp("expressions")
    path = write_synthetic(directory / "data", users=60, items=100, events=1_500)
    text = path.read_text().replace("filterable = [", 'read = { year = "number" }\nfilterable = ["decade", ')
    path.write_text(text + FEATURES)
    (path.parent / "areas.csv").write_text("key,value\nDE,middle\nSE,north\n")
    # Without aggregates a ranking depends on the time by the expression alone.
    options = RunOptions(aggregates="off")
    result = run(load_dataset(path), directory / "run", options, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return directory, result.bundle


def test_a_run_trains_on_expressions_and_its_bundle_holds_their_tables(made: tuple[Path, Bundle]) -> None:
    directory, bundle = made
    names = {feature.name for feature in bundle.schema.features}
    assert {"item.decade", "history.item.decade", "user.area", "event.hour"} <= names
    assert "item.title_letters" in {numeric.name for numeric in bundle.schema.numeric}
    assert load_bundle(bundle.directory).dataset.features["area"].values == {"DE": "middle", "SE": "north"}
    frame = read_frame(directory / "run" / "frame")
    raw = pl.read_ndjson(directory / "data" / "items.jsonl")
    assert frame.items["decade"].to_list()[: raw.height] == [str(year // 10) for year in raw["year"]]
    assert frame.items["title_letters"].to_list()[: raw.height] == [len(title) for title in raw["title"]]
    users = pl.read_parquet(directory / "data" / "users.parquet")
    expected = [{"DE": "middle", "SE": "north"}.get(country) for country in users["country"]]
    assert frame.users["area"].to_list()[: users.height] == expected


def test_a_streamed_item_has_the_features_of_the_batch(made: tuple[Path, Bundle]) -> None:
    directory, bundle = made
    lines = (directory / "data" / "items.jsonl").read_bytes().splitlines()[:20]
    topics = Topics()
    step = Step(bundle, topics)
    step.apply([Message(topics.items, 0, offset, None, line, 1) for offset, line in enumerate(lines)])
    published = {row["item_id"]: row for row in bundle.items.iter_rows(named=True)}
    for line in lines:
        name = json.loads(line)["item_id"]
        features = record.decode_item(step.items.records[name]).features
        for column in ("decade", "title_letters", "topic", "year"):
            assert features[column] == published[name][column], column


def test_a_server_reads_the_time_of_the_request(made: tuple[Path, Bundle]) -> None:
    _, bundle = made
    store = MemoryStore()
    fill_store(store, bundle)
    service = RankService(bundle, store)
    items = bundle.items["item_id"].to_list()[:30]
    at = 1_735_689_600_000_000 + 90 * 24 * HOUR_US

    def scores(hour: int) -> list[float]:
        return [score for _, score in sorted(service.rank("r00001", items, 30, at=at + hour * HOUR_US + 7).items)]

    assert scores(3) != scores(15)
    # Without a time the hour is null, as in a bundle alone.
    local = bundle.rank("r00001", sorted(items))
    assert np.isfinite(local).all()


def test_a_candidate_is_filtered_by_a_feature_of_an_expression(made: tuple[Path, Bundle]) -> None:
    _, bundle = made
    store = MemoryStore()
    fill_store(store, bundle)
    service = RankService(bundle, store)
    decade = bundle.items["decade"].to_list()[0]
    found = service.retrieve(
        text="bread and wine", k=200, wanted=Filter.model_validate({"column": "decade", "eq": decade})
    )
    expected = bundle.items.filter((pl.col("decade") == decade) & pl.col("listed"))["item_id"].to_list()
    assert sorted(name for name, _ in found.items) == sorted(expected)
