"""Aspects, concepts and glossary of the descriptor: their columns are kept with the items, and faults are named."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import DatasetError
from features.message import Rows, item_rows
from features.wire.decoder import item_decoder

FILMS = {
    "id": ["1", "2"],
    "title": ["Alien", "Brazil"],
    "genres": [["Horror"], None],
    "director": ["Ridley Scott", None],
    "year": [1979, 1985],
}


def _dataset(tmp_path: Path, **fields: Any) -> Dataset:
    pl.DataFrame(FILMS).write_parquet(tmp_path / "films.parquet")
    described = {
        "name": "d",
        "source": tmp_path / "d.toml",
        "items": {"path": "films.parquet", "id": "id", "text": ["title"]} | fields,
        "events": {"path": "e.csv", "item": "i", "label": {"implicit": True}},
        "split": {"by": "order"},
    }
    return Dataset.model_validate(described)


def test_columns_of_aspects_and_concepts_are_kept_as_the_files_hold_them(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, aspects={"people": ["director"], "era": ["year"]}, concepts="genres")
    items = read_items(dataset)
    assert items is not None
    assert set(items.columns) == {"item_id", "text", "director", "year", "genres"}
    assert items["genres"].to_list() == FILMS["genres"]
    assert items["year"].to_list() == FILMS["year"]


def test_a_feature_column_is_not_kept_twice(tmp_path: Path) -> None:
    items = read_items(_dataset(tmp_path, categorical=["genres"], filterable=["year"], concepts="genres"))
    assert items is not None
    assert items.columns == ["item_id", "text", "genres", "year"]


def test_a_missing_column_is_refused_with_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"films.parquet: \[items.aspects\] people: column 'directer' does not exist"
    ):
        read_items(_dataset(tmp_path, aspects={"people": ["directer"]}))
    with pytest.raises(DatasetError, match=r"films.parquet: \[items\] concepts: column 'genre' .* 'genres'"):
        read_items(_dataset(tmp_path, concepts="genre"))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"aspects": {"people": []}}, "aspect 'people' names no column"),
        ({"aspects": {"../people": ["director"]}}, r"aspect '\.\./people': a name is letters"),
        ({"aspects": {"people": ["director", "director"]}}, "more than once"),
        ({"aspects": {"people": ["text"]}}, "the name is taken"),
    ],
)
def test_an_unusable_aspect_is_refused(tmp_path: Path, fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        _dataset(tmp_path, **fields)


def test_a_message_carries_the_columns_too(tmp_path: Path) -> None:
    declared = _dataset(tmp_path, aspects={"people": ["director"]}, concepts="genres").items
    assert declared is not None
    decoder = item_decoder(declared)
    decoded = decoder(b'{"id": "3", "title": "Solaris", "director": "Andrei Tarkovsky", "genres": ["Drama"]}')
    types: dict[str, pl.DataType] = {"director": pl.String(), "genres": pl.List(pl.String)}
    frame, bad = item_rows(Rows(decoder.columns, [decoded.row]), declared, types)
    assert not bad
    assert frame.select("director", "genres").row(0) == ("Andrei Tarkovsky", ["Drama"])
