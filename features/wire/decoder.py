"""Decodes messages to rows of one table. The first bytes of a message name its format, so a topic may hold several.

    0                     a row in Avro, Protobuf or JSON, whose schema a registry has; see `features.wire.schemas`
    FF FF FF FF, ARROW1   a batch of rows in Arrow; see `features.wire.arrow`
    any other             a row as a JSON object

Types are checked as JSON is decoded, and once for each schema. Each value has its canonical form before there is a
column, so it never depends on its neighbours.
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import msgspec

from features.dataset.descriptor import Events, Items
from features.errors import EventError, StreamError
from features.wire.arrow import DecodedBatch, decode_batch, is_batch, row_count, take_rows
from features.wire.fields import DeclaredFields
from features.wire.logical import reader
from features.wire.schemas import MAGIC, RowSchema, Schemas

MAX_BYTES = 1 << 20
WIRE_VERSION = 1
_SCALAR = str | int | float | bool
# Deltas and snapshots hold integers in 64 bits: a larger number is refused here, with the message that holds it.
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_EVENT_IDS = range(-(2**63), 2**64)
# Fields of a message about itself, beside the columns: name on the wire, type, default.
_ENVELOPE: tuple[tuple[str, Any, Any], ...] = (
    ("_schema", _Int64, WIRE_VERSION),
    ("_event_id", str | int | None, None),
    ("_version", _Int64 | None, None),
    ("_deleted", bool, False),
    ("_backfill", bool, False),
)
ENVELOPE = len(_ENVELOPE)
"""Number of fields of a message about itself."""
_WRAPPED = b'{"_message":'


class Decoded(NamedTuple):
    """Message as a row of its table, with the fields it has about itself.

    Attributes:
        row: Values in the order of `Decoder.columns`.
        event_id: Of two events with one id, the first counts; None: never a duplicate.
        version: Version of an item. The highest counts; without versions, the last message counts.
        deleted: True if the item is deleted.
        backfill: True if the event is old on purpose, and so never late.
    """

    row: tuple[Any, ...]
    event_id: str | int | None
    version: int | None
    deleted: bool
    backfill: bool = False


class _Wrapped(msgspec.Struct, rename={"message": "_message", "version": "_version", "backfill": "_backfill"}):
    """Message of another format inside of a JSON object, with fields for rows that lack them."""

    message: bytes
    version: _Int64 | None = None
    backfill: bool = False


class Decoder:
    """Decoder of bytes to rows of one table. It checks that every needed field is present and of a usable type.

    Attributes:
        columns: Columns of a row, in order.

    Args:
        fields: Columns of the table. All other fields of a message are ignored.
        schemas: Schemas of messages in Avro and Protobuf.
    """

    def __init__(self, fields: DeclaredFields, schemas: Schemas | None = None) -> None:
        self._name = fields.table
        self._fields = fields
        self._schemas = schemas or Schemas()
        # Functions that read the logical types of each schema, by column.
        self._fits: dict[RowSchema, dict[str, Callable[[Any], Any]]] = {}
        self.columns = fields.columns
        # Field names are positional, since a column may have any name; the JSON keys are the names of the columns.
        rename = {f"f{position}": column for position, column in enumerate(self.columns)}
        rename |= {f"e{position}": name for position, (name, _, _) in enumerate(_ENVELOPE)}
        value = _SCALAR | list[_SCALAR | None] | None
        kinds = dict.fromkeys(fields.optional, value) | dict.fromkeys(fields.vectors, list[float] | None)
        types: list[Any] = [
            (f"f{position}", _SCALAR) if column in fields.required else (f"f{position}", kinds[column], None)
            for position, column in enumerate(self.columns)
        ]
        types += [(f"e{position}", kind, default) for position, (_, kind, default) in enumerate(_ENVELOPE)]
        self._kind = msgspec.defstruct(f"{self._name}_message", types, rename=rename, frozen=True)
        self._decoder = msgspec.json.Decoder(self._kind)

    def __call__(self, data: bytes) -> Decoded:
        """Decodes a message in JSON as a row.

        Raises:
            EventError: The message is too large, not JSON, not an object, or lacks a field or has a wrong type in it.
        """
        self._check_size(data)
        try:
            found = self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise EventError(f"{self._name} message: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EventError(f"{self._name} message: {error}", cause="undecodable") from error
        return self._row(found)

    def read(self, data: bytes) -> Decoded | DecodedBatch:
        """Decodes a message in any format.

        Raises:
            EventError: The message cannot be read.
            RegistryError: The schema registry does not answer.
            StreamError: The schema of the message lacks a declared field, or has another type for it.
        """
        if data.startswith(_WRAPPED):
            wrapped = _unwrapped(data, self._name)
            found = self.read(wrapped.message)
            if isinstance(found, Decoded):
                version = wrapped.version if found.version is None else found.version
                return found._replace(version=version, backfill=found.backfill or wrapped.backfill)
            versions = [wrapped.version if version is None else version for version in found.versions]
            return replace(found, versions=versions, backfill=[own or wrapped.backfill for own in found.backfill])
        if is_batch(data):
            self._check_size(data)
            return decode_batch(data, self._fields, wire_version=WIRE_VERSION)
        return self._registered(data) if data and data[0] == MAGIC else self(data)

    def rows(self, values: Sequence[bytes], *, most_bytes: int = MAX_BYTES) -> list[tuple[Any, ...] | None]:
        """Decodes messages that are one row in JSON each, all at once: the fast twin of `read`.

        Args:
            values: R messages in any format.
            most_bytes: Size in bytes of the largest message to decode here.

        Returns:
            (R,) values of each row in the order of `columns`, then those of the envelope's fields. None for a message
            that `read` must judge.
        """
        most = min(most_bytes, MAX_BYTES)
        if max(map(len, values), default=0) <= most and _WRAPPED not in b"".join(values):
            return self._json_rows(values)
        plain = [len(value) <= most and not value.startswith(_WRAPPED) for value in values]
        found = iter(self._json_rows([value for value, own in zip(values, plain, strict=True) if own]))
        return [next(found) if own else None for own in plain]

    def _json_rows(self, values: Sequence[bytes]) -> list[tuple[Any, ...] | None]:
        decoded: list[Any] = []
        # The list keeps the rows before a fault, and the iterator continues after the fault.
        remaining = map(self._decoder.decode, values)
        while len(decoded) < len(values):
            try:
                decoded.extend(remaining)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                decoded.append(None)
        if None not in decoded:
            rows: list[tuple[Any, ...] | None] = list(map(msgspec.structs.astuple, decoded))
            *_, schemas, event_ids, _, _, _ = zip(*rows, strict=True) if rows else 5 * ((),)
            if set(schemas) <= {WIRE_VERSION} and int not in map(type, event_ids):
                return rows
        return [None if one is None else _usable(msgspec.structs.astuple(one)) for one in decoded]

    def _registered(self, data: bytes) -> Decoded:
        self._check_size(data)
        try:
            number, schema, payload = self._schemas.open(data)
        except EventError as error:
            raise EventError(f"{self._name} message: {error}", cause=error.cause) from error
        if schema not in self._fits:
            if (problem := self._fields.misfit(schema.held, schema.logical)) is not None:
                raise StreamError(
                    f"{self._name} message: schema {number} {problem}; register a schema that fits and send the rows "
                    "again, or change the descriptor; tessera stream --refuse-schema "
                    f"{number} makes dead letters of the messages of this schema"
                )
            named = {name: own for name, own in schema.logical.items() if name in self.columns}
            found = {name: reader(own, self._fields.units.get(name)) for name, own in named.items()}
            self._fits[schema] = {name: read for name, read in found.items() if read is not None}
        try:
            values = schema.decode(payload)
            for name, read in self._fits[schema].items():
                if values[name] is not None:
                    values[name] = read(values[name])
            return self._row(msgspec.convert(self._as_json(values), self._kind))
        except msgspec.ValidationError as error:
            raise EventError(f"{self._name} message of schema {number}: {error}") from error
        except ValueError as error:
            raise EventError(f"{self._name} message of schema {number}: {error}", cause="undecodable") from error

    def _as_json(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the known fields with the values that JSON can hold: a number that is not finite is null."""
        found = {name: values[name] for name in self.columns}
        # A field about the message that is null is absent.
        found |= {name: values[name] for name, _, _ in _ENVELOPE if values.get(name) is not None}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in found.items()
        }

    def _row(self, found: Any) -> Decoded:
        *row, schema, event_id, version, deleted, backfill = msgspec.structs.astuple(found)
        if schema != WIRE_VERSION:
            raise EventError(
                f"{self._name} message: _schema {schema}, this release reads {WIRE_VERSION}", cause="unknown-version"
            )
        if isinstance(event_id, int) and event_id not in _EVENT_IDS:
            raise EventError(f"{self._name} message: _event_id of more than 64 bits; send longer ids as text")
        return Decoded(tuple(row), event_id, version, deleted, backfill)

    def _check_size(self, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            raise EventError(
                f"{self._name} message: {len(data)} bytes, at most {MAX_BYTES} are read", cause="oversized"
            )


def _usable(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Returns a row with its envelope, or None if `Decoder.read` refuses the envelope."""
    schema, event_id = row[-ENVELOPE], row[1 - ENVELOPE]
    return row if schema == WIRE_VERSION and (not isinstance(event_id, int) or event_id in _EVENT_IDS) else None


def event_decoder(events: Events, schemas: Schemas | None = None) -> Decoder:
    """Returns a decoder of the topic `events`: the columns that the events table needs."""
    labels = events.label_columns
    # A message may know the labels of some tasks, if they are in columns of their own.
    apart = labels if len(labels) > 1 else ()
    keys = (events.user, events.item, events.time.column if events.time else events.order, *labels)
    required = tuple(dict.fromkeys(key for key in keys if key and key not in apart))
    features = (*events.categorical, *events.numeric, *events.read, *events.placed, *events.read_at)
    optional = dict.fromkeys((*apart, *features))
    unit = events.time.unit if events.time is not None else None
    fields = DeclaredFields(
        "events",
        required,
        tuple(name for name in optional if name not in required),
        _numeric(events),
        units={events.time.column: unit} if events.time is not None and unit not in (None, "iso") else {},
    )
    return Decoder(fields, schemas)


def item_decoder(items: Items, schemas: Schemas | None = None) -> Decoder:
    """Returns a decoder of the topic `items`: the id, and all texts, vectors, features and filters the item has."""
    vectors = [given.column for given in items.vectors.values()]
    declared = (*items.text, *items.categorical, *items.numeric, *items.read, *items.attributes)
    optional = dict.fromkeys((*declared, *vectors, *items.vector_columns))
    names = tuple(name for name in optional if name != items.id)
    return Decoder(DeclaredFields("items", (items.id,), names, _numeric(items), frozenset(vectors)), schemas)


def is_registered(data: bytes) -> bool:
    """Returns whether the registry decides how a message is read."""
    if data.startswith(_WRAPPED):
        try:
            data = _unwrapped(data, "").message
        except EventError:
            return False
    return data[:1] == bytes([MAGIC])


def rows_of(data: bytes) -> int:
    """Returns the number of rows of a message, 1 if it cannot be read."""
    if data.startswith(_WRAPPED):
        try:
            data = _unwrapped(data, "").message
        except EventError:
            return 1
    return row_count(data) if is_batch(data) else 1


def kept_rows(data: bytes, places: Sequence[int]) -> bytes:
    """Returns a message with some rows of a batch, in order.

    Args:
        data: An Arrow batch that a decoder has read.
        places: Positions of the rows in the batch.
    """
    if data.startswith(_WRAPPED):
        wrapped = _unwrapped(data, "")
        wrapped.message = take_rows(wrapped.message, places)
        return msgspec.json.encode(wrapped)
    return take_rows(data, places)


def marked(value: bytes, fields: Mapping[str, object]) -> bytes:
    """Returns a message with fields for its rows, which keep the fields that they have.

    A message that is no JSON object becomes part of one, since the schema of its rows may lack the fields.

    Args:
        value: The message.
        fields: `_version` or `_backfill`.
    """
    if is_batch(value) or value[:1] == bytes([MAGIC]):
        return msgspec.json.encode({"_message": base64.b64encode(value).decode(), **fields})
    try:
        message = msgspec.json.decode(value, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return value
    # `_message` stays first, since it names the format.
    return msgspec.json.encode(message | {name: field for name, field in fields.items() if name not in message})


def _unwrapped(data: bytes, name: str) -> _Wrapped:
    try:
        if len(data) > 2 * MAX_BYTES:
            raise ValueError(f"{len(data)} bytes")
        found = msgspec.json.decode(data, type=_Wrapped)
        if found.message.startswith(_WRAPPED):
            raise ValueError("_message inside of _message")
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise EventError(f"{name} message: _message: {error}", cause="undecodable") from error
    return found


def _numeric(source: Events | Items) -> frozenset[str]:
    named = {name for name, kind in source.read.items() if kind == "number"}
    if isinstance(source, Events) and source.placement is not None and source.placement.position is not None:
        named.add(source.placement.position)
    named |= set(source.read_at) if isinstance(source, Events) else set()
    # A column may be declared categorical too: then text is no other type.
    return frozenset({*source.numeric, *named} - {*source.categorical})
