"""Reads and writes messages in Avro."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro
import numpy as np

from features.wire.fields import Kinds
from features.wire.logical import LogicalType, logical_type
from features.wire.registry import RegisteredSchema

_KINDS = {
    "null": "null",
    "string": "text",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "boolean": "boolean",
}


class AvroSchema:
    """Schema of a record in Avro.

    Attributes:
        held: Kinds of values of each field. A logical type has the kind of what it is read as.
        logical: Logical type of each field that has one. `decode` returns what carries it.

    Args:
        schema: The registered schema.

    Raises:
        ValueError: The text is no schema of a record.
    """

    def __init__(self, schema: RegisteredSchema) -> None:
        named: dict[str, Any] = {}
        self.logical: dict[str, LogicalType] = {}
        try:
            for _, text in schema.references:
                fastavro.parse_schema(_without_logical_types(json.loads(text)), named_schemas=named)
            plain = _without_logical_types(json.loads(schema.text))
            self._schema: Any = fastavro.parse_schema(plain, named_schemas=named)
        except (fastavro.schema.SchemaParseException, fastavro.schema.UnknownType) as error:
            raise ValueError(f"no Avro schema: {error}") from error
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"no Avro schema: {type(error).__name__}: {error}") from error
        if not isinstance(self._schema, dict) or self._schema.get("type") != "record":
            raise ValueError("is no record")
        self.held: dict[str, Kinds] = {}
        self._floats: list[str] = []
        for own, given in zip(self._schema["fields"], json.loads(schema.text)["fields"], strict=True):
            self.held[own["name"]] = _kinds(own["type"], named)
            if logical := logical_type(given["type"]):
                self.logical[own["name"]] = logical
                self.held[own["name"]] = self.held[own["name"]] & {"null"} | {logical.kind}
            if "float" in (own["type"] if isinstance(own["type"], list) else [own["type"]]):
                self._floats.append(own["name"])

    def decode(self, payload: bytes) -> dict[str, Any]:
        """Decodes a record.

        Raises:
            ValueError: The bytes are no record of the schema.
        """
        stream = io.BytesIO(payload)
        try:
            found: Any = fastavro.schemaless_reader(stream, self._schema, None)
        except (EOFError, IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if stream.tell() != len(payload):
            raise ValueError(f"{len(payload) - stream.tell()} bytes follow the record")
        for name in self._floats:
            if isinstance(found[name], float):
                found[name] = float(str(np.float32(found[name])))
        return dict(found)

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """Encodes a record. A field that the row lacks is null.

        Raises:
            ValueError: The row does not fit the schema.
        """
        stream = io.BytesIO()
        try:
            fastavro.schemaless_writer(stream, self._schema, dict(row))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from error
        return stream.getvalue()


def inferred(name: str, rows: Sequence[Mapping[str, Any]]) -> RegisteredSchema:
    """Returns a schema whose fields hold all values of rows, or null.

    Args:
        name: Name of the record.
        rows: JSON objects of scalars, lists of scalars and null.
    """
    fields: dict[str, dict[str, None]] = {}
    items: dict[str, dict[str, None]] = {}
    for row in rows:
        for key, value in row.items():
            found = fields.setdefault(key, {})
            if isinstance(value, list):
                items.setdefault(key, {}).update(dict.fromkeys(map(_avro_type, value)))
            elif value is not None:
                found[_avro_type(value)] = None
    declared = [
        {
            "name": key,
            "type": [
                "null",
                *found,
                *([{"type": "array", "items": list(items[key]) or ["null"]}] if key in items else []),
            ],
            "default": None,
        }
        for key, found in fields.items()
    ]
    return RegisteredSchema("AVRO", json.dumps({"type": "record", "name": name, "fields": declared}))


def _avro_type(value: Any) -> str:
    types: dict[Any, str] = {str: "string", bool: "boolean", int: "long", float: "double", type(None): "null"}
    if type(value) not in types:
        raise ValueError(f"holds {value!r}, which is no text, number, boolean or list of them")
    return types[type(value)]


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_logical_types(part) for part in schema]
    if isinstance(schema, dict):
        return {
            key: _without_logical_types(value) if key in ("type", "items", "values", "fields") else value
            for key, value in schema.items()
            if key != "logicalType"
        }
    return schema


def _kinds(found: Any, named: Mapping[str, Any]) -> Kinds:
    if isinstance(found, list):
        return frozenset(kind for part in found for kind in _kinds(part, named))
    if isinstance(found, str):
        if found in _KINDS:
            return frozenset({_KINDS[found]})
        return _kinds(named[found], named) if named.get(found, {}).get("type") == "enum" else frozenset({"other"})
    if found.get("type") == "enum":
        return frozenset({"text"})
    if found.get("type") == "array":
        inner = _kinds(found["items"], named) - {"null"}
        return frozenset("list of " + kind if kind in _KINDS.values() else "other" for kind in inner) or frozenset(
            {"list of text"}
        )
    return _kinds(found["type"], named) if found.get("type") in _KINDS else frozenset({"other"})
