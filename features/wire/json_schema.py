"""Reads and writes messages in JSON whose schema a registry has (type JSON)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from features.wire.fields import SCALARS, Kinds
from features.wire.logical import LogicalType
from features.wire.registry import RegisteredSchema

_KINDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean", "null": "null"}
_ANY = SCALARS | {"null"} | {f"list of {kind}" for kind in SCALARS}


class JsonSchema:
    """JSON Schema of an object.

    The types of `properties` are compared with the descriptor. A property without a type, or with one that needs a look
    at other schemas (`$ref`), may hold anything: each row is checked as any JSON message is.

    Attributes:
        held: Kinds of values of each property.
        logical: Empty, since JSON has no logical types.

    Args:
        schema: The registered schema.

    Raises:
        ValueError: The text is no schema of an object with properties.
    """

    def __init__(self, schema: RegisteredSchema) -> None:
        self.logical: dict[str, LogicalType] = {}
        try:
            text: Any = msgspec.json.decode(schema.text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"no JSON schema: {error}") from error
        properties = text.get("properties") if isinstance(text, dict) else None
        if not isinstance(properties, dict) or "object" not in _names(text.get("type", "object")):
            raise ValueError("is no JSON schema of an object with properties")
        self.held: dict[str, Kinds] = {name: _kinds(own) for name, own in properties.items()}

    def decode(self, payload: bytes) -> dict[str, Any]:
        """Decodes an object. A property that it lacks is null.

        Raises:
            ValueError: The bytes are no JSON object.
        """
        try:
            found: Any = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, an object expected")
        return dict.fromkeys(self.held) | found

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """Encodes an object."""
        return msgspec.json.encode(row)


def _names(found: Any) -> list[str]:
    return [str(name) for name in found] if isinstance(found, list) else [str(found)]


def _kinds(found: Any) -> Kinds:
    """Returns the kinds of values of a property."""
    if not isinstance(found, Mapping):
        return _ANY
    for key in ("anyOf", "oneOf"):
        if isinstance(found.get(key), list):
            return frozenset(kind for part in found[key] for kind in _kinds(part))
    if isinstance(found.get("enum"), list):
        return frozenset(_of_value(value) for value in found["enum"])
    if "type" not in found:
        return _ANY
    kinds: set[str] = set()
    for name in _names(found["type"]):
        if name == "array":
            inner = _kinds(found.get("items", {})) - {"null"}
            kinds |= {f"list of {kind}" for kind in inner & SCALARS} | ({"other"} if inner - SCALARS else set())
        else:
            kinds.add(_KINDS.get(name, "other"))
    return frozenset(kinds)


def _of_value(value: Any) -> str:
    known = {str: "text", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return known.get(type(value), "other")
