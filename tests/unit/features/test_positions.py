"""Bad positions are refused by name, in files and in messages; a missing position is unknown."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import read_events
from features.errors import DatasetError
from features.message import Rows, event_rows
from features.wire.decoder import event_decoder

TEXT = """
name = "placed"
[events]
path = "events.{kind}"
user = "user"
item = "item"
label = { column = "clicked" }
placement = { position = "rank", first = {first} }
[split]
by = "random"
"""
BAD = [
    (-1, 1, "holds -1"),
    (0, 1, "declare first = 0 under [events.placement]"),
    (-1, 0, "a position is a whole number from 0 to 1,000,000; fix the value"),
    ("third", 1, "holds 'third'; a position is a whole number from 1 to 1,000,000; fix the value, or name the column"),
    (1.5, 1, "holds 1.5"),
    (1_000_001, 1, "holds 1000001"),
    (2**40, 1, "a position is a whole number from 1 to 1,000,000"),
    (1e300, 1, "holds 1e+300"),
]


def described(place: Path, kind: str = "jsonl", first: int = 1) -> Dataset:
    (place / "placed.toml").write_text(TEXT.replace("{kind}", kind).replace("{first}", str(first)))
    return load_dataset(place / "placed.toml")


def row(position: Any) -> dict[str, Any]:
    return {"user": "u", "item": "i", "clicked": 1, "rank": position}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(("value", "first", "said"), BAD)
def test_a_bad_position_in_a_file_names_file_row_and_remedy(
    tmp_path: Path, value: Any, first: int, said: str, kind: str
) -> None:
    rows = [row(3), row(None), row(value)]
    if kind == "csv":
        lines = ["user,item,clicked,rank", *(f"u,i,1,{'' if one['rank'] is None else one['rank']}" for one in rows)]
        (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
        said = said.replace("holds 1e+300", "column 'rank'")
    else:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(DatasetError) as refused:
        read_events(described(tmp_path, kind, first))
    assert f"events.{kind}: [events] column 'rank', row " in str(refused.value)
    assert said.replace("holds ", "") in str(refused.value)


@pytest.mark.parametrize("value", [[1, 2], True])
def test_a_column_of_another_type_is_refused(tmp_path: Path, value: Any) -> None:
    pl.DataFrame([row(value), row(value)], strict=False).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DatasetError, match=r"events.parquet: \[events\] column 'rank'.*name another column|one value"):
        read_events(described(tmp_path, "parquet"))


@pytest.mark.parametrize(("value", "first", "said"), [*BAD, ([1], 1, "holds lists, but a position is a whole number")])
def test_a_bad_position_in_a_message_spoils_that_message_alone(
    tmp_path: Path, value: Any, first: int, said: str
) -> None:
    events = described(tmp_path, first=first).events
    decode = event_decoder(events)
    sent = (first, value, None, first + 2)
    rows = Rows(decode.columns, [decode(json.dumps(row(one)).encode()).row for one in sent])
    frame, bad = event_rows(rows, events)
    assert frame["rank"].to_list() == [0, None, 2]
    assert frame["event"].to_list() == [0, 2, 3]
    assert list(bad) == [1]
    assert bad[1].startswith("message: [events] column 'rank'")
    assert said.replace("1000001", "1000001.0").replace("holds -1", "holds -1.0") in bad[1]
