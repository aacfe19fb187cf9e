"""A synthetic dataset is the same bytes for a seed, passes the check, and holds the structure that it promises."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.content import lsa
from features.dataset.descriptor import load_dataset
from features.dataset.profile import profile
from features.dataset.split import assign_split
from features.dataset.tables import read_events, read_items
from features.errors import DatasetError
from tessera.demo.synthetic import fans, is_synthetic, new_item, tastes, tree, write_synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), seed=3)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def small(directory: Path, seed: int) -> dict[str, bytes]:
    return contents(write_synthetic(directory, seed=seed, users=100, items=150, events=3_000))


def test_a_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    first, again, other = small(tmp_path / "1", 0), small(tmp_path / "2", 0), small(tmp_path / "3", 1)
    assert first == again
    assert set(first) == {"dataset.toml", "items.jsonl", "users.parquet", "events.parquet", "synthetic.json"}
    assert all(first[name] != other[name] for name in first)


def test_the_dataset_passes_the_check_with_the_numbers_asked_for(made: Path) -> None:
    found = profile(load_dataset(made))
    assert {name: table.rows for name, table in found.tables.items()} == {
        "items": 1_500,
        "users": 2_000,
        "events": 120_000,
    }
    assert found.labels.positives == pytest.approx(0.3 * 120_000, rel=0.02)
    assert found.split == {"train": 96_000, "validation": 12_000, "test": 12_000}
    assert 0 < found.unknown_items < 600
    assert found.unknown_users == 0
    assert found.tables["items"].cardinalities["topic"] == 12
    assert found.tables["users"].cardinalities == {"age_group": 5, "country": 8}
    assert found.text is not None
    assert found.text.empty == 0


def test_the_descriptor_and_its_data_say_first_that_they_are_synthetic(made: Path) -> None:
    assert made.read_text().splitlines()[0].startswith("# SYNTHETIC")


def test_late_items_are_in_test_and_in_no_training_part(made: Path) -> None:
    dataset = load_dataset(made)
    events, _ = read_events(dataset)
    items = read_items(dataset)
    assert items is not None
    parts = assign_split(events, dataset.split)
    start, end = float(str(events["time"].min())), float(str(events["time"].max()))
    listed = events.join(items, on="item_id", how="semi")
    first = listed.group_by("item_id").agg(pl.col("time").min())
    late = first.filter(pl.col("time") >= start + 0.845 * (end - start))["item_id"].to_list()
    is_late = events["item_id"].is_in(late)
    assert 0.11 * items.height < len(late) < 0.14 * items.height
    assert not is_late.filter(parts == "train").any()
    assert events.filter((parts == "test") & is_late)["item_id"].n_unique() > 0.95 * len(late)
    assert 0.05 < is_late.filter(parts == "test").to_numpy().mean() < 0.25


def test_the_nearest_neighbours_of_a_text_share_its_topic(made: Path) -> None:
    items = read_items(load_dataset(made))
    assert items is not None
    vectors = lsa.fit(items["text"].to_list(), dim=128, seed=0).encode(items["text"].to_list())
    topic = items["topic"].list.first().to_numpy()
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1)
    nearest = np.argsort(-similar, axis=1)[:, :10]
    shared = float((topic[nearest] == topic[:, None]).mean())
    chance = float((topic[:, None] == topic[None, :]).mean())
    assert chance < 0.12
    assert shared > 0.7


def test_the_fans_of_a_subtopic_click_its_topic_more_than_other_users_do(made: Path) -> None:
    users = fans(made.parent, "whales and dolphins")[:50]
    rows = [json.loads(line) for line in (made.parent / "items.jsonl").read_text().splitlines()]
    wildlife = [row["item_id"] for row in rows if row["topic"] == ["wildlife"]]
    events = pl.read_parquet(made.parent / "events.parquet").filter(pl.col("item_id").is_in(wildlife))
    liked = events.filter(pl.col("user_id").is_in(users))["clicked"].to_numpy().mean()
    assert len(users) == 50
    assert liked > 2 * events["clicked"].to_numpy().mean()


def test_users_click_the_kinds_that_their_tastes_name(made: Path) -> None:
    users = pl.read_parquet(made.parent / "users.parquet")["user_id"].to_list()
    taste = tastes(made.parent, users)
    assert taste.shape == (2_000, 72)
    assert np.array_equal(tastes(made.parent, users[7:9]), taste[7:9])
    for kind in ("roses", "beekeeping"):
        liking = taste[:, tree().names.index(kind)]
        assert users[int(liking.argmax())] == fans(made.parent, kind, clicks=0)[0]


def test_only_a_generated_dataset_is_synthetic(made: Path, tmp_path: Path) -> None:
    assert is_synthetic(made.parent)
    assert not is_synthetic(tmp_path)
    with pytest.raises(DatasetError, match="user 'nobody' is not in the synthetic dataset"):
        tastes(made.parent, ["nobody"])


def test_tastes_are_in_no_file(made: Path) -> None:
    assert set(pl.read_parquet(made.parent / "users.parquet").columns) == {"user_id", "age_group", "country"}
    spec = json.loads((made.parent / "synthetic.json").read_text())
    assert spec == {"seed": 3, "users": 2_000, "items": 1_500, "events": 120_000}


def test_a_new_item_has_the_catalogues_columns_and_an_id_of_its_own(made: Path) -> None:
    rows = [json.loads(line) for line in (made.parent / "items.jsonl").read_text().splitlines()]
    item = new_item(7, "beekeeping")
    assert json.loads(json.dumps(item)) == item == new_item(7, "beekeeping")
    assert {name: type(value) for name, value in item.items()} == {name: type(v) for name, v in rows[0].items()}
    assert item["topic"] == ["wildlife"]
    assert item["item_id"] not in {row["item_id"] for row in rows}
    assert new_item(8)["item_id"] != item["item_id"]


def test_the_topic_tree_has_twelve_topics_of_six_subtopics_with_words() -> None:
    found = tree()
    assert len(found.names) == len(set(found.names)) == 72
    assert [found.topics.count(topic) for topic in dict.fromkeys(found.topics)] == [6] * 12
    assert all(len(set(words)) == len(words) >= 10 for words in found.words)


def test_what_cannot_be_generated_is_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(DatasetError, match="items: expected at least 100, got 3"):
        write_synthetic(tmp_path, items=3)
    with pytest.raises(DatasetError, match="subtopic 'bees' is unknown"):
        fans(made.parent, "bees")
    with pytest.raises(DatasetError, match=r"synthetic\.json is missing"):
        fans(tmp_path, "beekeeping")
