"""A feature of several tables has the same bits in frame, step and server, whatever nulls, ties and zones there are.

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
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import load_events, load_items, message_columns, read_events, read_items, read_users
from features.frame import Frame, build_frame
from features.jobs.messages import encode_rows
from features.message import Rows, context_rows, event_rows, item_rows
from features.value.crossed import crossed_features, crossing_columns, stored_input
from features.value.expression import INPUT_TYPES, Derived, Expression, evaluate
from features.wire.decoder import event_decoder, item_decoder
from models.bundle.inputs import CrossingInputs
from models.bundle.record import entity_frame

ROWS = int(os.environ.get("TESSERA_EXPRESSION_ROWS", "20000"))
ITEMS, USERS = 300, 200
DESCRIPTOR = """
name = "d"
[items]
path = "items.parquet"
id = "item"
text = ["title"]
categorical = ["genre"]
numeric = ["price"]
read = { released = "time" }
[users]
path = "users.parquet"
id = "user"
categorical = ["country"]
read = { budget = "number" }
[events]
path = "events.parquet"
user = "user"
item = "item"
time = "at"
label = { column = "label" }
[events.request]
device = { type = "category", default = "web" }
[events.candidate]
price_now = { type = "number" }
[split]
by = "time"
[features]
discount = "event.price_now / NULLIF(item.price, 0)"
age = "event.at - item.released"
hours = { sql = "FLOOR(EXTRACT(HOUR FROM event.at) / 6) || item.genre", kind = "categorical" }
cross = "event.device || '/' || item.genre"
afford = "event.price_now <= user.budget"
pair = "COALESCE(user.country, 'none') || SUBSTR(item.title, 1, 2)"
scale = "LN(1 + ABS(event.price_now)) * SQRT(ABS(item.price)) * LENGTH(item.title)"
"""
NAMES = ("discount", "age", "hours", "cross", "afford", "pair", "scale")


def moments(rng: np.random.Generator, rows: int, zone: str) -> pl.Series:
    """Times from 1938 to 2033 in a zone, a tenth missing."""
    found = pl.Series(rng.integers(-(10**15), 2 * 10**15, rows)).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    nothing = pl.Series([None] * rows, dtype=pl.Datetime("us", zone))
    return found.dt.convert_time_zone(zone).zip_with(pl.Series(rng.random(rows) < 0.9), nothing)


def odd(rng: np.random.Generator, rows: int) -> pl.Series:
    """Numbers with ties, zeros, NaN and nulls."""
    values = np.where(rng.random(rows) < 0.1, np.nan, rng.integers(-3, 40, rows) / 8)
    return pl.Series(values).zip_with(pl.Series(rng.random(rows) < 0.9), pl.Series([None], dtype=pl.Float64))


def world(directory: Path, rows: int, seed: int = 1) -> Dataset:
    rng = np.random.default_rng(seed)
    pl.DataFrame(
        {
            "item": [f"i{number}" for number in range(ITEMS)],
            "title": rng.choice(["", "a b", "x/y", "\U0001f600 z", None], ITEMS).tolist(),
            "genre": [[["a", "é"], ["b"], [], None][number % 4] for number in range(ITEMS)],
            "price": odd(rng, ITEMS),
            "released": moments(rng, ITEMS, "Asia/Kathmandu"),
        }
    ).write_parquet(directory / "items.parquet")
    pl.DataFrame(
        {
            "user": [f"u{number}" for number in range(USERS)],
            "country": rng.choice(["SE", "5.5", None], USERS).tolist(),
            "budget": odd(rng, USERS),
        }
    ).write_parquet(directory / "users.parquet")
    start = datetime.datetime(1969, 12, 31, tzinfo=datetime.UTC)
    at = pl.Series(rng.integers(0, 10**5, rows) * 7_919_000_001).cast(pl.Duration("us")) + start
    pl.DataFrame(
        {
            # The last ids are in no table.
            "user": pl.Series(rng.integers(0, USERS + 9, rows)).cast(pl.String).str.replace("^", "u"),
            "item": pl.Series(rng.integers(0, ITEMS + 9, rows)).cast(pl.String).str.replace("^", "i"),
            "at": at.dt.convert_time_zone("America/New_York"),
            "label": rng.integers(0, 2, rows),
            "device": pl.Series(rng.integers(0, 4, rows)).replace_strict({0: "phone", 1: "tv 1", 2: ""}, default=None),
            "price_now": odd(rng, rows),
        }
    ).write_parquet(directory / "events.parquet")
    (directory / "d.toml").write_text(DESCRIPTOR)
    return load_dataset(directory / "d.toml")


def framed(dataset: Dataset) -> Frame:
    items, users = read_items(dataset), read_users(dataset)
    assert items is not None
    assert users is not None
    tables = {"events": read_events(dataset)[0], "items": items, "users": users}
    return build_frame(dataset, tables, split=dataset.split, history_length=2)


def streamed_items(dataset: Dataset, frame: Frame) -> CrossingInputs:
    """Kept columns of items that came as messages and went through records, replaced one by one."""
    assert dataset.items is not None
    raw = load_items(dataset)
    assert raw is not None
    decode = item_decoder(dataset.items)
    texts = message_columns(raw, dataset.events)
    decoded = [decode(message).row for message in encode_rows(texts)]
    rows, bad = item_rows(Rows(decode.columns, decoded), dataset.items, dict(frame.items.schema))
    assert bad == {}
    kept = crossing_columns(dataset.events.crossed, "item")
    records = [msgspec.msgpack.decode(msgspec.msgpack.encode(row)) for row in rows.select(kept).to_dicts()]
    like = frame.items.select(kept).clear()
    found = CrossingInputs(entity_frame([{} for _ in range(3)], like), kept)
    found.append(entity_frame([{} for _ in range(frame.items.height - 3)], like))
    order = np.random.default_rng(0).permutation(len(records))
    for part in np.array_split(order, 7):
        found.replace(part, entity_frame([records[row] for row in part.tolist()], like))
    return found


def test_frame_step_and_server_have_the_same_bits(tmp_path: Path) -> None:
    dataset = world(tmp_path, ROWS)
    frame = framed(dataset)
    examples = frame.examples
    assert set(NAMES) <= set(examples.columns)
    assert not [name for name in examples.columns if "." in name]
    assert all(0 < examples[name].null_count() < ROWS for name in NAMES if name != "pair")
    events = dataset.events
    user, item = (examples[name].to_numpy().astype(np.int64) for name in ("user", "item"))
    items = streamed_items(dataset, frame)
    users = CrossingInputs(frame.users, crossing_columns(events.crossed, "user"))
    decode = event_decoder(events)
    messages = encode_rows(message_columns(load_events(dataset), events))

    def crossed(rows: pl.DataFrame, index: NDArray[np.int64]) -> pl.DataFrame:
        own = list(rows.select(crossing_columns(events.crossed, "event")))
        return pl.DataFrame(
            crossed_features(events.crossed, [*own, *users.take(user[index]), *items.take(item[index])])
        )

    for start in range(0, ROWS, 50_000):
        part = [decode(message).row for message in messages[start : start + 50_000]]
        shaped, bad = event_rows(Rows(decode.columns, part), events)
        assert bad == {}
        index = np.arange(start, start + len(part))
        assert crossed(shaped, index).equals(examples[start : start + len(part)].select(NAMES))
    # A server has one user, one time and many candidates.
    for first in np.random.default_rng(2).integers(0, ROWS, 40).tolist():
        values = {name: value for name, value in msgspec.json.decode(messages[first]).items() if name == "device"}
        chosen = np.flatnonzero(
            (examples["user"] == examples["user"][first])
            & (examples["time"] == examples["time"][first])
            & (
                examples["device"].list.first() if examples.schema["device"] == pl.List else examples["device"]
            ).eq_missing(examples["device"][first])
        )
        prices = [msgspec.json.decode(messages[row]).get("price_now") for row in chosen.tolist()]
        rows = context_rows(
            values, events, at_us=examples["time"][first], candidates={"price_now": prices}, count=len(chosen)
        )
        assert crossed(rows, chosen).equals(examples[chosen].select(NAMES))


def test_a_drawn_negative_has_features_of_its_own_item(tmp_path: Path) -> None:
    world(tmp_path, 2_000)
    text = DESCRIPTOR.replace('{ column = "label" }', "{ implicit = true, negatives = 2 }")
    text = text.replace('[events.candidate]\nprice_now = { type = "number" }', "").replace(
        "[events.request]", 'numeric = ["price_now"]\n[events.request]'
    )
    (tmp_path / "d.toml").write_text(text)
    frame = framed(load_dataset(tmp_path / "d.toml"))
    genre = frame.items["genre"].list.join(",").replace("", None).gather(frame.examples["item"])
    expected = frame.examples["device"] + "/" + genre
    assert frame.examples.height > 5_000
    assert frame.examples["cross"].equals(expected.alias("cross"))


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "text": st.none() | st.text(min_size=1, max_size=5),
    "number": st.none() | st.sampled_from([0.0, -0.0, 1.0, 1.0, 1e300]) | st.floats(),
    "time": st.none()
    | st.datetimes(
        datetime.datetime(1900, 1, 1),
        datetime.datetime(2200, 1, 1),
        timezones=st.sampled_from([datetime.UTC, datetime.timezone(datetime.timedelta(hours=5, minutes=45))]),
    ),
}
COLUMNS: dict[str, dict[str, Any]] = {
    table: {"n": "number", "t": "text", "d": "time"} for table in ("event", "item", "user")
}
SQL = [
    "event.n / item.n", "event.d - item.d", "event.t || '-' || item.t", "event.n > user.n", "user.t = item.t",
    "POW(event.n, item.n) + COALESCE(user.n, 1)", "EXTRACT(HOUR FROM event.d) - EXTRACT(HOUR FROM user.d)",
    "CASE WHEN event.d > item.d THEN item.t ELSE event.t END", "MOD(event.n, 7) * LENGTH(user.t)",
    "event.n IS NULL AND item.d IS NULL",
]  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(SQL))
def test_a_batch_of_kept_columns_is_a_loop_over_its_rows(data: st.DataObject, sql: str) -> None:
    expression = Expression("x", Derived.model_validate({"sql": sql}), COLUMNS)
    assert expression.crosses
    assert expression.of == "event"
    size, entities = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    tables = {}
    for table in COLUMNS:
        count = size if table == "event" else entities
        columns = []
        for name, kind in COLUMNS[table].items():
            drawn = pl.Series(name, data.draw(st.lists(VALUES[kind], min_size=count, max_size=count)), strict=False)
            if kind == "time":
                drawn = pl.Series(
                    [
                        None if one is None else one.astimezone(datetime.UTC).replace(tzinfo=None)
                        for one in drawn.to_list()
                    ],
                    dtype=INPUT_TYPES[kind],
                )
            typed = drawn.cast(INPUT_TYPES[kind])
            columns.append((typed.fill_nan(None) if kind == "number" else typed).alias(f"{table}.{name}"))
        tables[table] = pl.DataFrame(columns)
    index = {
        table: data.draw(st.lists(st.integers(0, entities - 1), min_size=size, max_size=size))
        for table in ("item", "user")
    }
    inputs = [stored_input(tables["event"][name]) for name in crossing_columns([expression], "event")]
    for table, rows in index.items():
        names = crossing_columns([expression], table)
        stored = pl.DataFrame([stored_input(tables[table][name]) for name in names])
        inputs += CrossingInputs(stored, names).take(np.array(rows))
    whole = crossed_features([expression], inputs)[0]
    # The twin joins dictionaries, and evaluates each row alone.
    for row in range(size):
        of = {"event": row, "item": index["item"][row], "user": index["user"][row]}
        alone = pl.DataFrame(
            [
                pl.Series(name, [tables[name.split(".")[0]][name][of[name.split(".")[0]]]], dtype=INPUT_TYPES[kind])
                for name, kind in expression.types.items()
            ]
        )
        assert evaluate([expression], alone)[0].equals(whole[row : row + 1])


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_entities_without_values_have_null_columns(missing: int) -> None:
    kept = pl.DataFrame({"item.n": [1.5], "item.d": [7], "item.t": ["a"]})
    inputs = CrossingInputs(kept, kept.columns)
    assert pl.DataFrame(inputs.take(np.zeros(2, dtype=np.int64))).equals(kept[[0, 0]])
    nothing = pl.DataFrame(inputs.nothing(missing))
    assert nothing.schema == kept.schema
    assert nothing.null_count().row(0) == (missing,) * 3
