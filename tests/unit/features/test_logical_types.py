"""Logical types of Avro mean what the same columns mean in a parquet file, and JSON of a registry what JSON means."""

import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import read_events
from features.errors import EventError, StreamError
from features.message import Rows, event_rows
from features.wire.decoder import Decoded, event_decoder
from features.wire.registry import RegisteredSchema
from features.wire.schemas import Schemas, framed, open_schema
from tests.schema_registry import StubRegistry, schema_registry

TEXT = """
name = "timed"
[events]
path = "events.parquet"
user = "user"
item = "item"
time = {time}
label = { column = "rating", positive = ">= 4" }
categorical = ["day", "seen", "cents"]
numeric = ["price"]
[split]
by = "time"
"""
PLAIN = '{ column = "at" }'
MOMENTS = [datetime(2024, 2, 29, 23, 59, 59, 123_000, UTC), datetime(1969, 12, 31, tzinfo=UTC)]
ROWS = [
    {
        "user": f"u{number}",
        "item": "i1",
        "at": moment,
        "rating": 5 - number,
        "day": date(2024, 2, 29) if number else None,
        "seen": moment,
        "cents": Decimal("12.50"),
        "price": Decimal("-3.25"),
    }
    for number, moment in enumerate(MOMENTS)
]


def avro(at: str = "timestamp-millis") -> RegisteredSchema:
    types: dict[str, Any] = {
        "user": "string",
        "item": "string",
        "at": {"type": "long", "logicalType": at},
        "rating": "int",
        "day": ["null", {"type": "int", "logicalType": "date"}],
        "seen": ["null", {"type": "long", "logicalType": "timestamp-micros"}],
        "cents": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
        "price": [
            "null",
            {"type": "fixed", "name": "F", "size": 8, "logicalType": "decimal", "precision": 9, "scale": 2},
        ],
    }
    fields = [{"name": name, "type": own} for name, own in types.items()]
    return RegisteredSchema("AVRO", json.dumps({"type": "record", "name": "R", "fields": fields}))


@pytest.fixture
def registry() -> Iterator[StubRegistry]:
    with schema_registry() as running:
        yield running


def described(place: Path, time: str = PLAIN) -> Dataset:
    (place / "timed.toml").write_text(TEXT.replace("{time}", time))
    return load_dataset(place / "timed.toml")


def written(registry: StubRegistry, schema: RegisteredSchema, payloads: list[bytes]) -> list[bytes]:
    number = registry.register("events-value", {"schema": schema.text, "schemaType": schema.kind})
    return [framed(number, schema, one) for one in payloads]


def of_avro(schema: RegisteredSchema, rows: list[dict[str, Any]]) -> list[bytes]:
    """Rows as Avro's own library writes them."""
    parsed, found = fastavro.parse_schema(json.loads(schema.text)), []
    for row in rows:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, parsed, row)
        found.append(stream.getvalue())
    return found


def shaped(dataset: Dataset, registry: StubRegistry, messages: list[bytes]) -> pl.DataFrame:
    decode = event_decoder(dataset.events, Schemas(registry.client))
    decoded = [decode.read(one) for one in messages]
    rows = [one.row for one in decoded if isinstance(one, Decoded)]
    frame, bad = event_rows(Rows(decode.columns, rows), dataset.events)
    assert not bad
    return frame


@pytest.mark.parametrize(
    ("time", "at"),
    [
        (PLAIN, "timestamp-millis"),
        (PLAIN, "timestamp-micros"),
        (PLAIN, "local-timestamp-millis"),
        ('{ column = "at", unit = "iso" }', "timestamp-micros"),
        ('{ column = "at", unit = "ms" }', "timestamp-millis"),
        ('{ column = "at", unit = "us" }', "timestamp-micros"),
    ],
)
def test_logical_types_give_the_frame_of_a_parquet_file(
    tmp_path: Path, registry: StubRegistry, time: str, at: str
) -> None:
    plain = described(tmp_path)
    pl.DataFrame(ROWS).write_parquet(tmp_path / "events.parquet")
    expected = read_events(plain)[0]
    dataset, schema = described(tmp_path, time), avro(at)
    rows = ROWS if not at.startswith("local") else [row | {"at": row["at"].replace(tzinfo=None)} for row in ROWS]  # type: ignore[union-attr]
    found = shaped(dataset, registry, written(registry, schema, of_avro(schema, rows)))
    lists = {name: pl.col(name).cast(pl.List(pl.String)) for name in ("day", "seen", "cents")}
    for name in lists:
        assert found[name].list.first().equals(expected[name].cast(pl.String), check_names=False), name
        assert found[name].list.len().fill_null(0).max() == 1
    assert found.drop(lists).equals(expected.drop(lists))


@pytest.mark.parametrize(
    ("unit", "at"), [("us", "timestamp-millis"), ("ms", "timestamp-micros"), ("s", "timestamp-millis")]
)
def test_a_timestamp_of_another_unit_than_the_descriptor_stops_by_name(
    tmp_path: Path, registry: StubRegistry, unit: str, at: str
) -> None:
    dataset, schema = described(tmp_path, f'{{ column = "at", unit = "{unit}" }}'), avro(at)
    with pytest.raises(StreamError, match=f"field 'at' holds {at}, but .events. time has the unit '{unit}'"):
        shaped(dataset, registry, written(registry, schema, of_avro(schema, ROWS)))


def test_a_date_or_a_timestamp_in_a_numeric_column_stops_by_name(tmp_path: Path, registry: StubRegistry) -> None:
    text = avro().text.replace('"name": "price"', '"name": "other"').replace('"name": "day"', '"name": "price"')
    schema = RegisteredSchema("AVRO", text.replace('"name": "other"', '"name": "day"'))
    rows = [row | {"price": row["day"], "day": row["price"]} for row in ROWS]
    with pytest.raises(StreamError, match="field 'price' holds text, expected boolean or integer or number"):
        shaped(described(tmp_path), registry, written(registry, schema, of_avro(schema, rows)))


@pytest.mark.parametrize(("name", "carried"), [("seen", 2**62), ("day", 2**31 - 1)])
def test_a_time_beyond_the_calendar_is_a_dead_letter(
    tmp_path: Path, registry: StubRegistry, name: str, carried: int
) -> None:
    schema = avro()
    plain = open_schema(schema).decode(of_avro(schema, ROWS)[1])
    message = written(registry, schema, [open_schema(schema).encode(plain | {name: carried})])[0]
    with pytest.raises(EventError, match=r"of schema .* is beyond the years 1 to 9999"):
        event_decoder(described(tmp_path).events, Schemas(registry.client)).read(message)


JSON = {
    "type": "object",
    "properties": {
        "user": {"type": "string"},
        "item": {"type": ["string", "integer"]},
        "at": {"type": "number"},
        "rating": {"enum": [1, 2, 5]},
        "day": {"oneOf": [{"type": "null"}, {"type": "string"}]},
        "seen": {"$ref": "#/definitions/seen"},
        "cents": {"type": "array", "items": {"type": "string"}},
        "price": {"type": "number"},
    },
}


def test_json_of_a_registry_gives_what_json_gives(tmp_path: Path, registry: StubRegistry) -> None:
    dataset = described(tmp_path, '{ column = "at", unit = "ms" }')
    rows = [
        {
            "user": "u",
            "item": 3,
            "at": 1_700_000_000_000,
            "rating": 5,
            "cents": ["a", "b"],
            "price": 2,
            "_event_id": "e",
        },
        {"user": "u", "item": "i", "at": 1, "rating": 1, "day": None, "seen": True, "other": {"a": 1}},
    ]
    schema = RegisteredSchema("JSON", json.dumps(JSON))
    plain = [json.dumps(row).encode() for row in rows]
    decode = event_decoder(dataset.events, Schemas(registry.client))
    assert [decode.read(one) for one in written(registry, schema, plain)] == [decode.read(one) for one in plain]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"price": {"type": "string"}}, "field 'price' holds text, expected boolean or integer or number"),
        ({"user": {"type": "object"}}, "field 'user' holds other, expected"),
        ({"day": {"type": "array", "items": {"type": "object"}}}, "field 'day' holds other, expected"),
        ({"price": None}, "has no field 'price', which .events. of the descriptor declares"),
    ],
)
def test_a_property_that_does_not_fit_stops_by_name(
    tmp_path: Path, registry: StubRegistry, change: dict[str, Any], said: str
) -> None:
    properties = {name: own for name, own in (JSON["properties"] | change).items() if own is not None}  # type: ignore[operator]
    schema = RegisteredSchema("JSON", json.dumps(JSON | {"properties": properties}))
    decode = event_decoder(described(tmp_path).events, Schemas(registry.client))
    with pytest.raises(StreamError, match=said):
        decode.read(written(registry, schema, [b"{}"])[0])


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"type": "array"}', '{"type": "object"}', '{"type": "string", "properties": {}}']
)
def test_another_json_schema_is_a_dead_letter(tmp_path: Path, registry: StubRegistry, text: str) -> None:
    decode = event_decoder(described(tmp_path).events, Schemas(registry.client))
    with pytest.raises(EventError, match="JSON schema") as error:
        decode.read(written(registry, RegisteredSchema("JSON", text), [b"{}"])[0])
    assert error.value.cause == "invalid-schema"


def test_a_kind_that_no_release_reads_is_refused_by_name(tmp_path: Path, registry: StubRegistry) -> None:
    decode = event_decoder(described(tmp_path).events, Schemas(registry.client))
    with pytest.raises(EventError, match="is of type THRIFT; AVRO, PROTOBUF or JSON expected"):
        decode.read(written(registry, RegisteredSchema("THRIFT", "{}"), [b"{}"])[0])
