"""JSON lines → columns that hold each value exactly as its line does.

A line is decoded by itself and only the wanted keys of it are kept, so a value never depends on the lines around it,
and a key that nothing declares can hold anything.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
import polars as pl

from features.error import DatasetError
from features.mixed import column_of


def read_jsonl(
    data: bytes, where: str, *, wanted: Collection[str] | None, splits: Mapping[str, str | None]
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Reads JSON objects, one a line; blank lines are skipped.

    Args:
        data: UTF-8.
        where: begins each error, e.g. "FILE: [items]".
        wanted: keys to read; None for all.
        splits: separator of the multi-valued columns, for text beside lists.

    Returns:
        The keys that there are, and a frame of the wanted ones (R rows): typed where one type holds all values of a
        key, else canonical text; see `features.mixed.column_of`.

    Raises:
        DatasetError: a line is no JSON object, is no text, or holds an object under a wanted key; names the row.
    """
    chosen = list(dict.fromkeys(wanted if wanted is not None else _keys(data, where)))
    fields: list[Any] = [(f"f{place}", Any, None) for place in range(len(chosen))]
    kind = msgspec.defstruct("Line", fields, rename={f"f{place}": name for place, name in enumerate(chosen)}, gc=False)
    rows = _decoded(data, kind, lambda found: kind(*(found.get(name) for name in chosen)), where)
    columns = {name: [getattr(row, f"f{place}") for row in rows] for place, name in enumerate(chosen)}
    empty = [name for name, values in columns.items() if values.count(None) == len(values)]
    names = tuple(_keys(data, where)) if empty else tuple(chosen)
    kept = [name for name in names if name in columns]
    if not kept:
        # A frame without any column has no rows, and would pass for an empty file.
        return names, pl.DataFrame({name: pl.Series([None] * len(rows), dtype=pl.Null) for name in names[:1]})
    return names, pl.DataFrame([_column(name, columns[name], splits.get(name), where) for name in kept])


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


def _decoded(data: bytes, kind: Any, make: Callable[[dict[str, Any]], Any], where: str) -> list[Any]:
    """Every line as `kind`; `make` turns what only Python's own reader takes into one."""
    decoder = msgspec.json.Decoder(kind)
    try:
        found: list[Any] = decoder.decode_lines(data)
        return found
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        lines = [line for line in data.split(b"\n") if line.strip()]
        return [_line(decoder, make, line, f"{where} row {row}") for row, line in enumerate(lines, start=1)]


def _line(decoder: Any, make: Callable[[dict[str, Any]], Any], line: bytes, where: str) -> Any:
    """One line; a NaN, which Python's own writer leaves in JSON, is null."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            found = json.loads(line, parse_constant=_nan)
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            problem = "holds half of a surrogate pair, which is not text; cut the text between characters"
            raise DatasetError(f"{where}: {problem}") from error
        except (ValueError, RecursionError) as bad:
            raise DatasetError(f"{where}: is not JSON ({bad}); write one object per line") from error
        if not isinstance(found, dict):
            raise DatasetError(f"{where}: is not a JSON object; write one {{...}} per line") from error
        if b"NaN" not in line:
            raise DatasetError(f"{where}: is not JSON ({error}); write one object per line") from error
        return make(found)


def _nan(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not JSON")


def _keys(data: bytes, where: str) -> list[str]:
    """Every key of every line, in order of first appearance."""
    rows = _decoded(data, dict[str, msgspec.Raw], lambda found: found, where)
    return list(dict.fromkeys(name for row in rows for name in row))
