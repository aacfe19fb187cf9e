"""Messages in every format: the same values as JSON has, faults by name, and no bytes that crash a decoder."""

import datetime
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from features.dataset.descriptor import Events, Items
from features.errors import EventError, RegistryError, StreamError, TesseraError
from features.message import Rows, event_rows
from features.wire import avro, protobuf
from features.wire.arrow import MOST_ROWS, DecodedBatch, encode_batch
from features.wire.decoder import Decoded, Decoder, event_decoder, item_decoder, kept_rows, marked, rows_of
from features.wire.registry import RegisteredSchema, SchemaRegistry
from features.wire.schemas import Schemas, framed, inferred_schema, open_schema
from tests.schema_registry import StubRegistry, schema_registry

KINDS = ("avro", "protobuf", "arrow")
EVENTS = Events.model_validate(
    {
        "path": "e.jsonl",
        "user": "user",
        "item": "item",
        "time": {"column": "at", "unit": "ms"},
        "label": {"column": "rating", "positive": ">= 4"},
        "categorical": ["device", "tags"],
        "numeric": ["price"],
    }
)
ROW = {
    "user": "u1",
    "item": "i1",
    "at": 1_700_000_000_000,
    "rating": 5,
    "device": "tv",
    "tags": ["a", "b"],
    "price": 1.5,
    "_event_id": "e1",
}
OPTIONAL = {"device", "tags", "price", "_event_id"}


@pytest.fixture
def registry() -> Iterator[StubRegistry]:
    with schema_registry() as running:
        yield running


def sent(
    registry: StubRegistry, kind: str, rows: list[dict[str, Any]], schema: RegisteredSchema | None = None
) -> list[bytes]:
    """The rows as a team's producer sends them: one message each, but one Arrow batch of all rows."""
    if kind == "json":
        return [json.dumps(row).encode() for row in rows]
    if kind == "arrow":
        return [encode_batch(rows)]
    schema = schema or inferred_schema(kind.upper(), rows)
    opened = open_schema(schema)
    body: dict[str, Any] = {"schema": schema.text, "schemaType": schema.kind}
    number = registry.register("events-value", body)
    return [framed(number, schema, opened.encode(row)) for row in rows]


def decoder(registry: StubRegistry, **more: Any) -> Decoder:
    return event_decoder(EVENTS, Schemas(registry.client, **more))


def shaped(
    found: list[Decoded | DecodedBatch], columns: tuple[str, ...], events: Events
) -> tuple[pl.DataFrame, set[int]]:
    """The frame of decoded messages, and the numbers of the unusable rows."""
    values: list[tuple[Any, ...] | None] = []
    batches: dict[int, pl.DataFrame] = {}
    for one in found:
        if isinstance(one, Decoded):
            values.append(one.row)
        else:
            batches[len(values)] = one.frame
            values += [None] * one.frame.height
    frame, bad = event_rows(Rows(columns, values, batches), events)
    return frame, set(bad)


# The same values.

IDS = st.sampled_from(["u1", "5", "5.0", "é", " x", "true"]) | st.text(min_size=1, max_size=4).filter(
    lambda text: "\0" not in text and text.isprintable()
)
NUMBERS = st.floats(-1e6, 1e6) | st.integers(-5, 5).map(float)
DRAWN = st.lists(
    st.fixed_dictionaries(
        {
            "user": IDS,
            "item": st.integers(-(2**63), 2**63 - 1),
            "at": st.integers(0, 2_000_000_000_000),
            "rating": NUMBERS,
            "device": st.none() | IDS,
            "tags": st.lists(IDS, min_size=1, max_size=3),
            "price": st.none() | NUMBERS,
        }
    ),
    min_size=1,
    max_size=6,
)


TYPED = {"user": "u", "item": 1, "at": 1, "rating": 1.5, "device": "d", "tags": ["t"], "price": 1.5}
LAW = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("csv", [False, True])
def test_every_format_gives_the_frame_that_json_gives(registry: StubRegistry, csv: bool) -> None:
    events = EVENTS.model_copy(update={"path": "e.csv" if csv else "e.jsonl"})
    decode = event_decoder(events, Schemas(registry.client))

    @given(rows=DRAWN)
    @LAW
    def law(rows: list[dict[str, Any]]) -> None:
        expected, bad = shaped([decode.read(data) for data in sent(registry, "json", rows)], decode.columns, events)
        for kind in KINDS:
            schema = None if kind == "arrow" else inferred_schema(kind.upper(), [TYPED])
            found = [decode.read(data) for data in sent(registry, kind, rows, schema)]
            frame, faults = shaped(found, decode.columns, events)
            assert frame.equals(expected), kind
            assert frame.schema == expected.schema
            assert faults == bad
            if kind != "arrow":
                assert [one.row for one in found] == [decode(data).row for data in sent(registry, "json", rows)]

    law()


def test_the_columns_of_a_batch_are_its_rows_one_by_one(registry: StubRegistry) -> None:
    decode = decoder(registry)

    @given(rows=DRAWN)
    @LAW
    def law(rows: list[dict[str, Any]]) -> None:
        (data,) = sent(registry, "arrow", rows)
        batch = decode.read(data)
        assert isinstance(batch, DecodedBatch)
        slow: list[Decoded | DecodedBatch] = [Decoded(row, None, None, False) for row in batch.frame.rows()]
        assert shaped([batch], decode.columns, EVENTS)[0].equals(shaped(slow, decode.columns, EVENTS)[0])

    law()


@pytest.mark.parametrize("kind", KINDS)
def test_fields_about_a_message_come_through(registry: StubRegistry, kind: str) -> None:
    rows = [ROW | {"_backfill": True, "_version": 7}, ROW | {"_event_id": None, "_backfill": False, "_version": 8}]
    found = [decoder(registry).read(data) for data in sent(registry, kind, rows)]
    first = found[0]
    if isinstance(first, DecodedBatch):
        assert (first.event_ids, first.versions, first.backfill) == (["e1", None], [7, 8], [True, False])
    else:
        assert [(one.event_id, one.version, one.backfill) for one in found] == [("e1", 7, True), (None, 8, False)]


def test_types_of_a_parquet_file_mean_what_they_mean_there(registry: StubRegistry) -> None:
    frame = pl.DataFrame([ROW]).with_columns(
        pl.col("at").cast(pl.Datetime("ms")), pl.col("price").cast(pl.Float32), pl.col("device").cast(pl.Categorical)
    )
    sink = pa.BufferOutputStream()
    table = frame.to_arrow()
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    events = EVENTS.model_copy(update={"time": EVENTS.time.model_copy(update={"unit": None})})
    decode = event_decoder(events)
    got, _ = shaped([decode.read(sink.getvalue().to_pybytes())], decode.columns, events)
    assert got["time"].to_list() == [1_700_000_000_000_000]
    assert (got["device"].to_list(), got["price"].to_list()) == ([["tv"]], [1.5])


def test_a_float_of_32_bits_is_its_shortest_decimal(registry: StubRegistry) -> None:
    text = json.dumps({"type": "record", "name": "R", "fields": [{"name": "price", "type": "float"}]})
    schema = avro.AvroSchema(RegisteredSchema("AVRO", text))
    assert schema.decode(schema.encode({"price": 0.1})) == {"price": 0.1}
    proto = protobuf.ProtobufSchema(RegisteredSchema("PROTOBUF", 'syntax = "proto3"; message R { float price = 1; }'))
    assert proto.decode(proto.encode({"price": 0.1})) == {"price": 0.1}


def test_items_come_in_every_format_with_vectors(registry: StubRegistry) -> None:
    items = Items.model_validate({"path": "i.jsonl", "id": "sku", "text": ["title"], "vectors": {"clip": "v"}})
    decode = item_decoder(items, Schemas(registry.client))
    rows = [{"sku": "s1", "title": "a bag", "v": [1.0, 2.5]}, {"sku": "s2", "title": "a hat", "v": [3.0, 4.0]}]
    for kind in ("json", *KINDS):
        found: list[tuple[Any, ...]] = []
        for data in sent(registry, kind, rows):
            one = decode.read(data)
            found += [one.row] if isinstance(one, Decoded) else one.frame.rows()
        assert found == [("s1", "a bag", [1.0, 2.5]), ("s2", "a hat", [3.0, 4.0])], kind


def test_columns_of_items_mean_what_they_mean_in_a_parquet_file(registry: StubRegistry) -> None:
    items = Items.model_validate({"path": "i.jsonl", "id": "sku", "text": ["title"], "numeric": ["price"]})
    frame = pl.DataFrame({"sku": [7], "title": [datetime.date(2026, 1, 31)], "price": [0.1]})
    batch = item_decoder(items).read(encode_batch([{"sku": "s", "title": "t", "price": math.inf}]))
    assert isinstance(batch, DecodedBatch)
    assert batch.frame.rows() == [("s", "t", None)]
    sink = pa.BufferOutputStream()
    table = frame.with_columns(pl.col("price").cast(pl.Float32)).to_arrow()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    batch = item_decoder(items).read(sink.getvalue().to_pybytes())
    assert isinstance(batch, DecodedBatch)
    assert batch.frame.rows() == [(7, "2026-01-31", 0.1)]


# Schemas that change.


@pytest.mark.parametrize("kind", KINDS)
def test_added_and_reordered_fields_go_on(registry: StubRegistry, kind: str) -> None:
    decode = decoder(registry)
    (before,) = sent(registry, kind, [ROW])
    (after,) = sent(registry, kind, [{"new": 1, **dict(reversed(ROW.items())), "more": "x"}])
    found = [shaped([decode.read(data)], decode.columns, EVENTS)[0] for data in (before, after)]
    assert found[0].height == 1
    assert found[0].equals(found[1])


@pytest.mark.parametrize("name", ["user", "price", "tags"])
@pytest.mark.parametrize("kind", ["avro", "protobuf"])
def test_a_removed_field_stops_by_name(registry: StubRegistry, kind: str, name: str) -> None:
    (data,) = sent(registry, kind, [{key: value for key, value in ROW.items() if key != name}])
    with pytest.raises(StreamError, match=rf"schema 1 has no field '{name}'.*--refuse-schema 1"):
        decoder(registry).read(data)
    with pytest.raises(EventError, match="refused") as refused:
        decoder(registry, refused=[1]).read(data)
    assert refused.value.cause == "refused-schema"


@pytest.mark.parametrize("kind", ["avro", "protobuf"])
@pytest.mark.parametrize(
    ("name", "value", "held"),
    [("price", "1.5", "text"), ("user", ["u1"], "list of text"), ("_event_id", True, "boolean")],
)
def test_a_retyped_field_stops_by_name(registry: StubRegistry, kind: str, name: str, value: Any, held: str) -> None:
    (data,) = sent(registry, kind, [ROW | {name: value}])
    with pytest.raises(StreamError, match=rf"schema 1 field '{name}' holds {held}, expected"):
        decoder(registry).read(data)


def test_an_arrow_batch_without_a_declared_column_is_a_dead_letter_by_name(registry: StubRegistry) -> None:
    (data,) = sent(registry, "arrow", [{key: value for key, value in ROW.items() if key != "price"}])
    with pytest.raises(EventError, match="has no field 'price'") as error:
        decoder(registry).read(data)
    assert error.value.cause == "invalid"


def test_rows_of_a_batch_without_a_required_value_are_refused_alone(registry: StubRegistry) -> None:
    (data,) = sent(registry, "arrow", [ROW, ROW | {"user": None}, ROW | {"_event_id": "e3"}])
    batch = decoder(registry).read(data)
    assert isinstance(batch, DecodedBatch)
    assert (batch.places, batch.event_ids) == ([0, 2], ["e1", "e3"])
    assert batch.refused == {1: "events message: column 'user' is null in row 2 of the batch"}


def test_avro_types_of_their_own_are_read_by_what_carries_them(registry: StubRegistry) -> None:
    fields = [
        {"name": "user", "type": {"type": "enum", "name": "U", "symbols": ["u1", "u2"]}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "unused", "type": {"type": "map", "values": "bytes"}},
        {"name": "again", "type": "U"},
    ]
    schema = avro.AvroSchema(RegisteredSchema("AVRO", json.dumps({"type": "record", "name": "R", "fields": fields})))
    row = {"user": "u2", "at": 5, "unused": {"a": b"1"}, "again": "u1"}
    assert schema.decode(schema.encode(row)) == row
    assert schema.held["user"] == schema.held["again"] == {"text"}
    assert schema.held["unused"] == {"other"}


def test_a_protobuf_message_inside_of_another_is_found_by_its_index(registry: StubRegistry) -> None:
    text = """
    syntax = "proto3";
    import "google/protobuf/timestamp.proto";
    import "shared/kind.proto";
    message First { string a = 1; }
    message Second { message Inner { string b = 1; Kind kind = 2; google.protobuf.Timestamp at = 3; } }
    """
    shared = 'syntax = "proto3"; enum Kind { NONE = 0; VIEW = 1; }'
    number = registry.register("kind", {"schema": shared, "schemaType": "PROTOBUF"})
    references = [{"name": "shared/kind.proto", "subject": "kind", "version": 1}]
    number = registry.register("x", {"schema": text, "schemaType": "PROTOBUF", "references": references})
    schemas = Schemas(registry.client)
    # The index [1, 0] in zigzag, its length first, then field 1 "x" and field 2 VIEW.
    data = b"\0" + number.to_bytes(4, "big") + b"\x04\x02\x00" + b"\x0a\x01x\x10\x01"
    _, schema, payload = schemas.open(data)
    assert schema.decode(payload) == {"b": "x", "kind": "VIEW"}
    assert schema.held["at"] == {"other"}
    for index in (b"\x04\x02", b"\x02\x20", b"\x02\x01", b"\xff\xff\xff\xff\xff\xff"):
        with pytest.raises(EventError):
            schemas.open(b"\0" + number.to_bytes(4, "big") + index)


# The registry.


def test_a_schema_is_asked_for_once_and_an_unknown_id_is_a_dead_letter(registry: StubRegistry) -> None:
    decode = decoder(registry)
    (data,) = sent(registry, "avro", [ROW])
    for _ in range(3):
        decode.read(data)
    assert registry.paths == ["/schemas/ids/1"]
    with pytest.raises(EventError, match="schema 9 is unknown to the registry") as error:
        decode.read(b"\0\0\0\0\x09" + data[5:])
    assert error.value.cause == "unknown-schema"


def test_a_registry_that_does_not_answer_is_an_outage_and_no_fault_of_the_message(registry: StubRegistry) -> None:
    (data,) = sent(registry, "avro", [ROW])
    registry.broken = True
    with pytest.raises(RegistryError, match=r"schema registry http://.* answers 503"):
        decoder(registry).read(data)
    registry.broken = False
    with pytest.raises(RegistryError, match="does not answer"):
        event_decoder(EVENTS, Schemas(SchemaRegistry("http://127.0.0.1:9"))).read(data)


def test_the_password_comes_from_the_settings_and_is_shown_nowhere(registry: StubRegistry) -> None:
    from tessera.settings import Settings

    registry.password = "s3cret"
    named = {"TESSERA_SCHEMA_REGISTRY": registry.address, "TESSERA_SCHEMA_REGISTRY_USER": "team"}
    settings = Settings.from_environment(named | {"TESSERA_SCHEMA_REGISTRY_PASSWORD": "s3cret"})
    (data,) = sent(registry, "avro", [ROW])
    assert isinstance(event_decoder(EVENTS, settings.schemas()).read(data), Decoded)
    assert "s3cret" not in repr(settings) + repr(settings.open_schema_registry())
    with pytest.raises(RegistryError, match=r"answers 401.*TESSERA_SCHEMA_REGISTRY_USER"):
        event_decoder(EVENTS, Settings.from_environment(named).schemas()).read(data)


@pytest.mark.parametrize("address", ["localhost:8081", "ftp://x", "http://me:secret@host"])
def test_an_address_that_is_none_is_refused_by_its_setting(address: str) -> None:
    with pytest.raises(TesseraError, match="TESSERA_SCHEMA_REGISTRY"):
        SchemaRegistry(address)


def test_without_a_registry_a_registered_message_is_a_dead_letter_that_says_so() -> None:
    with pytest.raises(EventError, match="set TESSERA_SCHEMA_REGISTRY") as error:
        event_decoder(EVENTS).read(b"\0\0\0\0\x01abc")
    assert error.value.cause == "undecodable"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("AVRO", "{"), ("AVRO", '"string"'), ("AVRO", '{"type": "recrd"}'), ("PROTOBUF", "message {"), ("JSON", "{}")],
)
def test_a_schema_that_cannot_be_read_is_a_dead_letter(registry: StubRegistry, kind: str, text: str) -> None:
    number = registry.register("events-value", {"schema": text, "schemaType": kind})
    with pytest.raises(EventError, match=f"schema {number}") as error:
        decoder(registry).read(b"\0" + number.to_bytes(4, "big") + b"\0x")
    assert error.value.cause == "invalid-schema"


# Marks, and parts of batches.


@pytest.mark.parametrize("kind", ["json", *KINDS])
def test_a_marked_message_is_the_message_with_the_mark(registry: StubRegistry, kind: str) -> None:
    decode = decoder(registry)
    (data,) = sent(registry, kind, [ROW])
    plain, found = decode.read(data), decode.read(marked(data, {"_backfill": True}))
    if isinstance(found, DecodedBatch) and isinstance(plain, DecodedBatch):
        assert found.backfill == [True]
        assert found.frame.equals(plain.frame)
    else:
        assert isinstance(found, Decoded)
        assert found == plain._replace(backfill=True)
    assert decode.read(marked(marked(data, {"_backfill": True}), {"_version": 3})) is not None


def test_some_rows_of_a_batch_are_a_batch(registry: StubRegistry) -> None:
    decode = decoder(registry)
    (data,) = sent(registry, "arrow", [ROW | {"user": f"u{n}"} for n in range(5)])
    for batch in (data, marked(data, {"_backfill": True})):
        assert rows_of(batch) == 5
        part = decode.read(kept_rows(batch, [1, 3]))
        assert isinstance(part, DecodedBatch)
        assert part.frame["user"].to_list() == ["u1", "u3"]
        assert part.backfill == [batch != data] * 2


def test_a_batch_of_too_many_rows_is_refused() -> None:
    data = encode_batch([{"user": "u"}] * (MOST_ROWS + 1))
    with pytest.raises(EventError, match="at most 10000") as error:
        event_decoder(EVENTS).read(data)
    assert error.value.cause == "oversized"


# Garbled bytes.


@pytest.mark.parametrize("kind", ["json", *KINDS])
def test_garbled_bytes_are_rows_or_dead_letters(registry: StubRegistry, kind: str) -> None:
    chance = random.Random(4)
    decode = decoder(registry)
    rows = [ROW | {"user": f"user-{n}", "price": None if n % 3 else n / 7} for n in range(4)]
    faults = 0
    for data in sent(registry, kind, rows) * (1_500 // len(sent(registry, kind, rows))):
        bytes_ = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(bytes_)) if bytes_ else 0
            match chance.randrange(4):
                case 0:
                    bytes_[at:] = b""
                case 1:
                    bytes_[at : at + 1] = bytes([chance.randrange(256)])
                case 2:
                    bytes_[at:at] = chance.randbytes(chance.randint(1, 9))
                case _:
                    del bytes_[at : at + chance.randint(1, 9)]
        try:
            shaped([decode.read(bytes(bytes_))], decode.columns, EVENTS)
        except EventError as error:
            faults += bool(error.cause)
    assert faults > 300


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_a_message_is_a_dead_letter(registry: StubRegistry, kind: str) -> None:
    decode = decoder(registry)
    (data,) = sent(registry, kind, [ROW])
    whole = decode.read(data)
    for end in range(len(data)):
        try:
            found = decode.read(data[:end])
        except EventError:
            continue
        # Optional parts at the end may be missing: the end mark of a stream, or a field of Protobuf.
        assert kind != "avro"
        assert kind != "arrow" or (isinstance(found, DecodedBatch) and isinstance(whole, DecodedBatch))


def test_bytes_behind_a_record_of_avro_are_a_dead_letter(registry: StubRegistry) -> None:
    (data,) = sent(registry, "avro", [ROW])
    with pytest.raises(EventError, match="1 bytes follow the record") as error:
        decoder(registry).read(data + b"x")
    assert error.value.cause == "undecodable"


def test_files_of_references_stay_inside_of_their_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no path inside"):
        protobuf.ProtobufSchema(RegisteredSchema("PROTOBUF", "", (("../out.proto", "x"),)))
