"""Reads JSON lines as columns that hold each value exactly as its line does.

Each line is decoded alone and only its wanted keys are kept. So a value never depends on the lines around it, and a key
that the descriptor does not declare can hold anything.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
import polars as pl

from features.errors import DatasetError
from features.value.mixed_column import column_of


def read_jsonl(
    data: bytes,
    where: str,
    *,
    wanted: Collection[str] | None,
    many: Collection[str] | None = None,
    splits: Mapping[str, str | None],
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Reads JSON objects, one per line. Blank lines are skipped. NaN and the infinities, which Python writes, are null.

    Args:
        data: UTF-8, except in unwanted keys.
        where: First words of each error, e.g. "FILE: [items]".
        wanted: Keys to read; None for all.
        many: Wanted keys that may hold lists; None for all.
        splits: Separator of each multi-valued column, for text beside lists.

    Returns:
        All keys of the file, and a frame of the wanted ones (R rows). A column is typed if one type holds all values of
        a key, else it is canonical text; see `features.value.mixed_column.column_of`.

    Raises:
        DatasetError: The text is a JSON document over several lines, a line is not a JSON object or not text, or a
            wanted key holds an object, or a list where one value is expected. The message names the row.
    """
    lines = object_lines(data, where)
    chosen = list(dict.fromkeys(wanted if wanted is not None else _keys(lines, where)))
    fields: list[Any] = [(f"f{place}", Any, None) for place in range(len(chosen))]
    kind = msgspec.defstruct("Line", fields, rename={f"f{place}": name for place, name in enumerate(chosen)}, gc=False)

    def make(found: dict[str, Any], row: str) -> Any:
        values = {name: found.get(name) for name in chosen}
        _refuse_foreign(values, row)
        return kind(*values.values())

    rows = _decoded(lines, kind, make, where)
    columns = {name: [getattr(row, f"f{place}") for row in rows] for place, name in enumerate(chosen)}
    empty = [name for name, values in columns.items() if values.count(None) == len(values)]
    names = tuple(_keys(lines, where)) if empty else tuple(chosen)
    kept = [name for name in names if name in columns]
    if not kept:
        # A frame without columns has no rows and would be mistaken for an empty file.
        return names, pl.DataFrame({name: pl.Series([None] * len(rows), dtype=pl.Null) for name in names[:1]})
    for name in kept:
        if many is not None and name not in many:
            _refuse_list(name, columns[name], where)
    return names, pl.DataFrame([_column(name, columns[name], splits.get(name), where) for name in kept])


def strict_lines(data: bytes, where: str) -> list[bytes]:
    """Returns the objects of JSON lines as a log keeps them: one message each, NaN and the infinities as null.

    Raises:
        DatasetError: A line is not a JSON object; names the row.
    """
    lines = object_lines(data, where)
    for number, line in enumerate(lines):
        try:
            msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = _loose(line, f"{where} row {number + 1}:")
            _refuse_foreign(found, f"{where} row {number + 1}:")
            lines[number] = msgspec.json.encode(found)
    return lines


def object_lines(data: bytes, where: str) -> list[bytes]:
    """Returns the lines that are not blank. A JSON document over several lines raises DatasetError."""
    start = data[:65_536].lstrip()
    if start.startswith(b"["):
        raise DatasetError(f"{where} is a JSON array; write one object per line (jq -c '.[]')")
    lines = [line for line in data.split(b"\n") if line.strip()]
    if lines[0].strip() == b"{" or (len(lines) > 1 and start.startswith(b"{") and lines[0].rstrip()[-1:] in b"{[,:"):
        raise DatasetError(f"{where} is JSON over several lines; write one object per line (jq -c .)")
    return lines


def nested_advice(data: bytes) -> str:
    """Returns advice for JSON lines that nest fields: the field, its content, the remedy; "" if nothing is nested."""
    for key, value in _loose(data.split(b"\n", 1)[0], "").items():
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            what = "a list of objects" if isinstance(value, list) else "an object"
            remedy = "write one line for each of them" if isinstance(value, list) else "lift its fields to the top"
            return f"'{key}' holds {what} with {', '.join(inner)}: {remedy}, with the fields that are declared"
    return ""


def _column(name: str, values: list[Any], split: str | None, where: str) -> pl.Series:
    try:
        return column_of(name, values, split=split)
    except TypeError as error:
        for row, value in enumerate(values, start=1):
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, (dict, list)) for part in parts):
                problem = (
                    f"{json.dumps(value)[:80]} is nested, text or numbers expected; flatten the column in the files"
                )
                raise DatasetError(f"{where} column '{name}', row {row}: {problem}") from error
        raise


def _refuse_list(name: str, values: list[Any], where: str) -> None:
    row = next((row for row, value in enumerate(values, start=1) if isinstance(value, list)), None)
    if row is not None:
        problem = "holds a list, but one value is expected; write one value, or a row for each"
        raise DatasetError(f"{where} column '{name}', row {row}: {problem}")


def _decoded(lines: list[bytes], kind: Any, make: Callable[[dict[str, Any], str], Any], where: str) -> list[Any]:
    """Decodes every line as `kind`; `make` converts a line that only Python's own reader accepts."""
    decode = msgspec.json.Decoder(kind).decode
    found: list[Any] = []
    for row, line in enumerate(lines, start=1):
        try:
            found.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            place = f"{where} row {row}:"
            found.append(make(_loose(line, place), place))
    return found


def _loose(line: bytes, where: str) -> dict[str, Any]:
    """Decodes an object with Python's own reader, which accepts any bytes, and NaN and the infinities (null here)."""
    try:
        found = json.loads(line.decode("utf-8", "surrogateescape"), parse_constant=lambda _: None)
    except RecursionError as error:
        raise DatasetError(f"{where} is nested too deeply; flatten it") from error
    except ValueError as error:
        raise DatasetError(f"{where} is not JSON ({error}); write one object per line") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{where} is not a JSON object; write one {{...}} per line")
    return found


def _refuse_foreign(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        text = name + json.dumps(value, ensure_ascii=False)
        bad = next((ord(character) for character in text if 0xD800 <= ord(character) <= 0xDFFF), None)
        if bad is not None and 0xDC80 <= bad <= 0xDCFF:
            raise DatasetError(
                f"{where} byte 0x{bad - 0xDC00:02x} is not UTF-8; "
                'add encoding = "latin-1" if the file is that, or save it as UTF-8'
            )
        if bad is not None:
            problem = "holds half of a surrogate pair, which is not text; cut the text between characters"
            raise DatasetError(f"{where} column '{name}' {problem}")


def _keys(lines: list[bytes], where: str) -> list[str]:
    """Returns every key of every line, in order of first appearance."""
    rows = _decoded(lines, dict[str, msgspec.Raw], lambda found, _: found, where)
    return list(dict.fromkeys(name for row in rows for name in row))
