"""A feature that an expression makes has the same bits in a file, a message and a request, in any batch.

`TESSERA_EXPRESSION_ROWS` sets the rows of the table that is compared at once.
"""

import datetime
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import load_events, message_columns, read_events
from features.jobs.messages import encode_rows
from features.message import Rows, context_rows, event_rows
from features.value.expression import INPUT_TYPES, Derived, Expression
from features.wire.decoder import event_decoder

ROWS = int(os.environ.get("TESSERA_EXPRESSION_ROWS", "20000"))
DESCRIPTOR = """
name = "d"
[events]
path = "events.KIND"
user = "user"
item = "item"
time = "at"
label = { column = "label" }
categorical = ["device"]
numeric = ["price"]
read = { ordered = "time", weight = "number", note = "text" }
[split]
by = "time"
[features]
hour = { sql = "EXTRACT(HOUR FROM event.at)", kind = "categorical" }
waited = "event.at - event.ordered"
per_kg = "event.price / NULLIF(event.weight, 0)"
cross = "event.device || '/' || event.note"
size = "CASE WHEN event.weight > 10 THEN 'large' WHEN event.weight IS NULL THEN 'unknown' ELSE 'small' END"
scale = "LN(1 + ABS(event.price)) * SQRT(ABS(event.weight))"
letters = "LENGTH(event.note)"
filled = "COALESCE(event.price, 7)"
region = { column = "event.device", values = { phone = "hand", "tv 1" = "room" } }
"""
NAMES = ["hour", "waited", "per_kg", "cross", "size", "scale", "letters", "filled", "region"]


def table(rows: int, seed: int) -> pl.DataFrame:
    """Events with nulls, NaN, ties, zones and times before 1970."""
    rng = np.random.default_rng(seed)
    start = datetime.datetime(1969, 12, 31, tzinfo=datetime.UTC)
    ordered = pl.Series(rng.integers(-(10**15), 2 * 10**15, rows)).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    price = np.where(rng.random(rows) < 0.1, np.nan, np.round(rng.normal(0, 1e3, rows), 3))
    return pl.DataFrame(
        {
            "user": rng.integers(0, 9, rows),
            "item": rng.integers(0, 9, rows),
            "at": pl.Series(start + datetime.timedelta(seconds=int(s)) for s in rng.integers(0, 10**9, rows)),
            "label": rng.integers(0, 2, rows),
            "device": rng.choice(["phone", "tv 1", "5.5", "é", None], rows).tolist(),
            "price": price,
            "ordered": ordered.dt.convert_time_zone("Asia/Kathmandu").zip_with(
                pl.Series(rng.random(rows) < 0.9), pl.Series([None] * rows, dtype=pl.Datetime("us", "Asia/Kathmandu"))
            ),
            "weight": pl.Series(rng.choice([0, 1, 3, 12, None], rows).tolist(), dtype=pl.Int64),
            "note": rng.choice(["", "a b", "x/y", "\U0001f600", None], rows).tolist(),
        },
        strict=False,
    )


def dataset_of(directory: Path, frame: pl.DataFrame, kind: str) -> Dataset:
    (directory / "d.toml").write_text(DESCRIPTOR.replace("KIND", kind))
    if kind == "parquet":
        frame.write_parquet(directory / "events.parquet")
    else:
        text = frame.with_columns(pl.col("at", "ordered").dt.convert_time_zone("UTC").dt.to_string("iso:strict"))
        if kind == "csv":
            text.write_csv(directory / "events.csv")
        else:
            text.with_columns(pl.col("price").fill_nan(None)).write_ndjson(directory / "events.jsonl")
    return load_dataset(directory / "d.toml")


def online(messages: list[bytes], dataset: Dataset) -> pl.DataFrame:
    decode = event_decoder(dataset.events)
    frame, bad = event_rows(Rows(decode.columns, [decode(message).row for message in messages]), dataset.events)
    assert bad == {}
    return frame.select(NAMES)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_derived_feature_is_the_same_in_a_file_and_in_messages(tmp_path: Path, kind: str) -> None:
    dataset = dataset_of(tmp_path, table(ROWS, 1), kind)
    offline = read_events(dataset)[0].select(NAMES)
    assert offline.schema["per_kg"] == pl.Float32
    assert offline.schema["hour"] == pl.String
    assert min(offline.drop("filled").null_count().row(0)[1:4]) > 0
    assert offline["filled"].null_count() == 0
    messages = encode_rows(message_columns(load_events(dataset), dataset.events))
    assert online(messages, dataset).equals(offline)


def test_three_kinds_of_file_give_the_same_features(tmp_path: Path) -> None:
    frames = []
    for kind in ("parquet", "csv", "jsonl"):
        (tmp_path / kind).mkdir()
        frames.append(read_events(dataset_of(tmp_path / kind, table(500, 2), kind))[0].select(NAMES))
    assert frames[1].equals(frames[0])
    assert frames[2].equals(frames[0])


def test_a_batch_and_a_request_have_the_features_of_the_whole(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, table(120, 3), "jsonl")
    whole = read_events(dataset)[0]
    messages = encode_rows(message_columns(load_events(dataset), dataset.events))
    parts = [online(messages[start : start + 7], dataset) for start in range(0, len(messages), 7)]
    assert pl.concat(parts).equals(whole.select(NAMES))
    names = ("device", "price", "ordered", "weight", "note")
    for row, message in enumerate(messages):
        values = {name: value for name, value in msgspec.json.decode(message).items() if name in names}
        context = context_rows(values, dataset.events, at_us=whole["time"][row])
        assert context.select(NAMES).equals(whole[row : row + 1].select(NAMES))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "text": st.none() | st.text(max_size=5),
    "number": st.none() | st.floats(),
    "time": st.none() | st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)),
}
COLUMNS: dict[str, dict[str, Any]] = {"item": {"n": "number", "m": "number", "t": "text", "d": "time"}}
SQL = [
    "item.n / item.m", "LN(item.n)", "POW(item.n, item.m)", "SQRT(item.n) + EXP(item.m)", "FLOOR(item.n)",
    "item.t || '-' || item.n", "LENGTH(item.t)", "UPPER(item.t)", "item.n > item.m", "GREATEST(item.n, item.m)",
    "EXTRACT(DOW FROM item.d)", "COALESCE(item.n, item.m, 0)", "item.t LIKE 'a%'", "MOD(item.n, 7)",
    "CASE WHEN item.d IS NULL THEN item.t ELSE 'known' END", "TRY_CAST(item.t AS DOUBLE)",
]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(SQL))
def test_an_expression_of_a_batch_is_that_of_its_rows(data: st.DataObject, sql: str) -> None:
    size = data.draw(st.integers(1, 70))
    frame = pl.DataFrame(
        {
            name: data.draw(st.lists(VALUES[kind], min_size=size, max_size=size))
            for name, kind in COLUMNS["item"].items()
        },
        schema={name: INPUT_TYPES[kind] for name, kind in COLUMNS["item"].items()},
    )
    expression = Expression("x", Derived.model_validate({"sql": sql}), COLUMNS)
    whole = expression.evaluate(frame)
    assert whole.dtype == (pl.Float32 if expression.kind == "numeric" else pl.String)
    assert pl.concat(expression.evaluate(frame[row : row + 1]) for row in range(size)).equals(whole)
