"""Reads and writes messages in Protobuf. protoc compiles the text of a schema when its first message comes."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from grpc_tools import protoc

from features.wire.fields import Kinds
from features.wire.logical import LogicalType
from features.wire.registry import RegisteredSchema

_MAIN = "schema.proto"
_KINDS = {
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_ENUM: "text",
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_UINT32: "integer",
    FieldDescriptor.CPPTYPE_UINT64: "integer",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
}
_TYPES = {str: "string", bool: "bool", int: "int64", float: "double"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ProtobufSchema:
    """Schema of one message of a .proto file.

    Attributes:
        held: Kinds of values of each field.
        logical: Empty, since Protobuf has no logical types.

    Args:
        schema: The registered schema.
        index: Place of the message among the messages of the file, then among those inside of it.

    Raises:
        ValueError: The text is no schema, or has no such message.
    """

    def __init__(self, schema: RegisteredSchema, index: Sequence[int] = (0,)) -> None:
        self.logical: dict[str, LogicalType] = {}
        pool = descriptor_pool.DescriptorPool()
        files = _compiled(schema)
        for file in files.file:
            pool.Add(file)
        try:
            found = pool.FindFileByName(_MAIN)
            names = [message.name for message in files.file[-1].message_type]
            message = found.message_types_by_name[names[index[0]]]
            for place in index[1:]:
                message = message.nested_types[place]
        except (IndexError, KeyError) as error:
            raise ValueError(f"has no message at index {list(index)}") from error
        self._message = message_factory.GetMessageClass(message)
        self.held: dict[str, Kinds] = {own.name: _kinds(own) for own in message.fields}
        self._getters = [
            (own.name, _getter(own), own.has_presence) for own in message.fields if "other" not in self.held[own.name]
        ]

    def decode(self, payload: bytes) -> dict[str, Any]:
        """Decodes a message. A field with presence that is not set is None.

        Raises:
            ValueError: The bytes are no message of the schema.
        """
        message = self._message()
        try:
            message.ParseFromString(payload)
        except DecodeError as error:
            raise ValueError(str(error)) from error
        return {
            name: get(getattr(message, name)) if not optional or message.HasField(name) else None
            for name, get, optional in self._getters
        }

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """Encodes a message. A field that the row lacks is not set.

        Raises:
            ValueError: The row does not fit the schema.
        """
        message = self._message()
        for name, value in row.items():
            if name not in self.held:
                raise ValueError(f"field {name!r} is not in the schema")
            if value is None:
                continue
            try:
                if isinstance(value, list):
                    getattr(message, name).extend(value)
                else:
                    setattr(message, name, value)
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"field {name!r}: {error}") from error
        return bytes(message.SerializeToString(deterministic=True))


def inferred(name: str, rows: Sequence[Mapping[str, Any]]) -> RegisteredSchema:
    """Returns a schema whose fields hold all values of rows.

    Args:
        name: Name of the message.
        rows: JSON objects of scalars, lists of scalars and null.

    Raises:
        ValueError: A field's name, or the types of its values, have no counterpart in Protobuf.
    """
    lines: dict[str, str] = {}
    fields: dict[str, set[tuple[bool, Any]]] = {}
    for row in rows:
        for key, value in row.items():
            found = fields.setdefault(key, set())
            many = isinstance(value, list)
            found.update((many, type(part)) for part in (value if many else [value]) if many or part is not None)
    for number, (key, found) in enumerate(fields.items(), 1):
        found = {
            (many, float) if {(many, int), (many, float)} <= found and kind is int else (many, kind)
            for many, kind in found
        }
        kinds = {kind for _, kind in found} or {str}
        if not _NAME.fullmatch(key):
            raise ValueError(f"field {key!r} is no name in Protobuf; rename the column, or give a --schema")
        if len(found) > 1 or not kinds <= _TYPES.keys():
            types = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"field {key!r} holds values of several types ({types}), which Protobuf has not")
        (many, kind), *_ = found or {(False, str)}
        lines[key] = f"  {'repeated' if many else 'optional'} {_TYPES[kind]} {key} = {number};"
    body = "\n".join(lines.values())
    return RegisteredSchema("PROTOBUF", f'syntax = "proto3";\n\nmessage {name} {{\n{body}\n}}\n')


def _compiled(schema: RegisteredSchema) -> Any:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for name, text in (*schema.references, (_MAIN, schema.text)):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"refers to {name!r}, which is no path inside of a directory")
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text, encoding="utf-8")
        out = directory / ".descriptors"
        well_known = Path(protoc.__file__).parent / "_proto"
        arguments = ["protoc", f"-I{directory}", f"-I{well_known}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main([*arguments, _MAIN]) != 0:
            raise ValueError("is refused by protoc, whose reason stands above")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


def _kinds(field: Any) -> Kinds:
    kind = _KINDS.get(field.cpp_type) if field.type != FieldDescriptor.TYPE_BYTES else None
    if kind is None:
        return frozenset({"other"})
    return frozenset({f"list of {kind}" if _repeated(field) else kind})


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _getter(field: Any) -> Callable[[Any], Any]:
    """Returns the function that makes a value as JSON has it."""

    def single(value: Any) -> Any:
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            named = field.enum_type.values_by_number.get(value)
            return value if named is None else named.name
        return float(str(np.float32(value))) if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else value

    return (lambda values: [single(value) for value in values]) if _repeated(field) else single
