"""Encodes rows as messages in a format of a topic, as a team's own producer does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from features.errors import TesseraError
from tessera.settings import Settings

FORMATS = ("json", "avro", "protobuf", "arrow")
"""Formats of messages."""


def encoded(
    settings: Settings,
    topic: str,
    lines: Sequence[bytes],
    as_format: str,
    schema: Path | None = None,
    rows: int = 1_000,
    *,
    keyed: bool = False,
) -> list[bytes]:
    """Returns messages of rows.

    Args:
        settings: Address of the schema registry, where the schema is registered for Avro and Protobuf.
        topic: Name of the topic. The subject of the schema is this name with `-value` behind it.
        lines: Rows as JSON objects.
        as_format: One of `FORMATS`.
        schema: File of a schema. None: a schema is made from the rows.
        rows: Number of rows of an Arrow message.
        keyed: True if each row has a key.

    Raises:
        TesseraError: A row does not fit the format, or an option does not.
    """
    if as_format not in FORMATS:
        raise TesseraError(f"--format {as_format}: expected {', '.join(FORMATS)}")
    if schema is not None and as_format not in ("avro", "protobuf"):
        raise TesseraError(
            f"--schema: messages in {as_format} have no registered schema; give --format avro or protobuf"
        )
    if as_format == "json":
        return list(lines)
    objects = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    if as_format == "arrow":
        if keyed:
            raise TesseraError("--key: an Arrow message holds rows of many keys; leave --key out")
        return _batches(objects, rows)
    return _registered(settings, topic, objects, as_format.upper(), schema)


def _batches(objects: Sequence[dict[str, Any]], rows: int) -> list[bytes]:
    from features.wire.arrow import encode_batch

    try:
        return [encode_batch(objects[start : start + rows]) for start in range(0, len(objects), rows)]
    except ValueError as error:
        raise TesseraError(f"--format arrow: {error}") from error


def _registered(
    settings: Settings, topic: str, objects: Sequence[dict[str, Any]], kind: str, schema: Path | None
) -> list[bytes]:
    from features.wire.registry import RegisteredSchema
    from features.wire.schemas import framed, inferred_schema, open_schema

    registry = settings.open_schema_registry()
    try:
        if schema is None:
            used = inferred_schema(kind, objects)
        else:
            used = RegisteredSchema(kind, schema.read_text(encoding="utf-8"))
        opened = open_schema(used)
    except (OSError, ValueError) as error:
        raise TesseraError(f"{schema or f'--format {kind.lower()}'}: {error}") from error
    payloads = []
    for number, row in enumerate(objects):
        try:
            payloads.append(opened.encode(row))
        except ValueError as error:
            raise TesseraError(f"row {number + 1} does not fit the schema: {error}") from error
    number = registry.register(f"{topic}-value", used)
    return [framed(number, used, payload) for payload in payloads]
