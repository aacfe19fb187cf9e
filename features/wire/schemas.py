"""Schemas of registered messages by id, each read from the registry once.

A registered message has Confluent's form: the byte 0, the id of its schema in four bytes, for Protobuf the index of the
message in its file, and the row. The index is a list of varints (zigzag), its length first. A single 0 means [0].
"""

import struct
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from features.errors import EventError, StreamError
from features.wire.fields import Kinds
from features.wire.json_schema import JsonSchema
from features.wire.logical import LogicalType
from features.wire.registry import RegisteredSchema, SchemaRegistry

MAGIC = 0
"""First byte of a registered message."""
_HEAD = struct.Struct(">bI")
# An unknown id is asked for again after this time.
_UNKNOWN_S = 1.0
_MOST_INDEXES = 16


class RowSchema(Protocol):
    """Schema of the rows of one message type."""

    held: dict[str, Kinds]
    logical: dict[str, LogicalType]

    def decode(self, payload: bytes) -> dict[str, Any]:
        """Decodes a row. Raises ValueError if the bytes are no row."""
        ...

    def encode(self, row: Any) -> bytes:
        """Encodes a row. Raises ValueError if the row does not fit."""
        ...


class Schemas:
    """Schemas of a registry.

    Args:
        registry: The registry. None: a registered message cannot be read.
        refused: Ids of schemas whose messages become dead letters.
    """

    def __init__(self, registry: SchemaRegistry | None = None, *, refused: Collection[int] = ()) -> None:
        self._registry = registry
        self._refused = frozenset(refused)
        self._read: dict[int, RegisteredSchema] = {}
        self._opened: dict[tuple[int, tuple[int, ...]], RowSchema] = {}
        self._unknown: dict[int, float] = {}

    def open(self, data: bytes) -> tuple[int, RowSchema, bytes]:
        """Returns the id of a registered message's schema, the schema, and the bytes of the row.

        Raises:
            EventError: The message cannot be read. An id that the registry lacks has the cause `unknown-schema`.
            RegistryError: The registry does not answer.
            StreamError: A library is missing.
        """
        if len(data) < _HEAD.size:
            raise EventError(f"{len(data)} bytes are no registered message", cause="undecodable")
        if self._registry is None:
            raise EventError(
                "begins with byte 0, as a message with a registered schema does; set TESSERA_SCHEMA_REGISTRY",
                cause="undecodable",
            )
        _, number = _HEAD.unpack_from(data)
        if number in self._refused:
            raise EventError(f"schema {number} is refused by --refuse-schema", cause="refused-schema")
        schema = self._schema(number, self._registry)
        start: int = _HEAD.size
        index: tuple[int, ...] = (0,)
        if schema.kind == "PROTOBUF":
            start, index = _index(data)
        if (number, index) not in self._opened:
            self._opened[number, index] = _opened(number, schema, index)
        return number, self._opened[number, index], data[start:]

    def _schema(self, number: int, registry: SchemaRegistry) -> RegisteredSchema:
        if number not in self._read:
            if time.monotonic() >= self._unknown.get(number, 0.0):
                found = registry.schema(number)
                if found is not None:
                    self._read[number] = found
                    return found
                self._unknown[number] = time.monotonic() + _UNKNOWN_S
            raise EventError(
                f"schema {number} is unknown to the registry; register it, then put the message back: "
                "tessera deadletters replay --cause unknown-schema",
                cause="unknown-schema",
            )
        return self._read[number]


def open_schema(schema: RegisteredSchema, index: tuple[int, ...] = (0,)) -> RowSchema:
    """Returns a schema that decodes and encodes rows.

    Raises:
        ValueError: The kind of the schema is not read, or its text is wrong.
        StreamError: A library is missing.
    """
    try:
        if schema.kind == "AVRO":
            from features.wire.avro import AvroSchema

            return AvroSchema(schema)
        if schema.kind == "PROTOBUF":
            from features.wire.protobuf import ProtobufSchema

            return ProtobufSchema(schema, index)
        if schema.kind == "JSON":
            return JsonSchema(schema)
    except ImportError as error:
        raise _missing(schema.kind, error) from error
    raise ValueError(f"is of type {schema.kind}; AVRO, PROTOBUF or JSON expected")


def inferred_schema(kind: str, rows: Sequence[Mapping[str, Any]]) -> RegisteredSchema:
    """Returns a schema that holds rows.

    Args:
        kind: `AVRO` or `PROTOBUF`.
        rows: JSON objects.

    Raises:
        ValueError: No schema of the kind holds the rows.
        StreamError: A library is missing.
    """
    try:
        if kind == "AVRO":
            from features.wire.avro import inferred
        else:
            from features.wire.protobuf import inferred
    except ImportError as error:
        raise _missing(kind, error) from error
    return inferred("Row", rows)


def framed(number: int, schema: RegisteredSchema, payload: bytes) -> bytes:
    """Returns a registered message of a row. A row in Protobuf is of the first message of its file."""
    return _HEAD.pack(MAGIC, number) + (b"\0" if schema.kind == "PROTOBUF" else b"") + payload


def _missing(kind: str, error: ImportError) -> StreamError:
    return StreamError(f"messages in {kind} need the extra `formats`: pip install 'tessera[formats]' ({error})")


def _opened(number: int, schema: RegisteredSchema, index: tuple[int, ...]) -> RowSchema:
    try:
        return open_schema(schema, index)
    except ValueError as error:
        raise EventError(f"schema {number} {error}", cause="invalid-schema") from error


def _index(data: bytes) -> tuple[int, tuple[int, ...]]:
    """Returns where the row begins, and the index of its message."""
    at, count = _varint(data, _HEAD.size)
    if not count:
        return at, (0,)
    if not 0 < count <= _MOST_INDEXES:
        raise EventError(f"an index of {count} messages", cause="undecodable")
    places = []
    for _ in range(count):
        at, place = _varint(data, at)
        places.append(place)
    if min(places) < 0:
        raise EventError(f"the message index {places} is negative", cause="undecodable")
    return at, tuple(places)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return at, (value >> 1) ^ -(value & 1)
    raise EventError("the message index is cut off", cause="undecodable")
