"""Reads the files of a table into one polars frame, and keeps which file each row came from.

A fault on disk is refused with its file and row: a glob without a match, a file of another format, a csv row with too
few or too many fields, a line that is not JSON, parts that do not share their columns. Unwanted columns are not read.
Values of a csv stay text here. `features.value.canonical.cell` and the readers of the columns interpret them.
"""

import glob
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import polars as pl

from features.config import nearest
from features.dataset.delimited import advice, read_delimited
from features.dataset.jsonl import nested_advice, read_jsonl
from features.dataset.lake.copies import table_copy
from features.dataset.plain_text import read_plain
from features.dataset.source import Format, TableSource
from features.errors import DatasetError
from features.storage.copy import local_file
from features.storage.file import matching
from features.storage.location import Location, locate
from features.value.canonical import VERSION, cells
from features.value.mixed_column import joined

_INTEGER = r"^-?(0|[1-9][0-9]*)$"
# An exponent needs its sign, else hexadecimal identifiers such as 12e4 would pass for numbers.
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-][0-9]+)?$"


@dataclass(frozen=True)
class SourceTable:
    """Table as its files hold it.

    Attributes:
        name: items, users or events.
        frame: (R rows) requested columns that exist. The rows of the files follow each other.
        names: Every column of the files, read or not.
        files: Locations in sorted order, which is the order of the rows.
        heights: Rows per file.
        kind: Format of the files; "message" for rows that came as messages.
        version: Version of the canonical form of ids and categories.
        hint: Likely reason and remedy for a missing column.
        first_row: Rows of the file before those of the frame, if the frame is a slice of one file.
    """

    name: str
    frame: pl.DataFrame
    names: tuple[str, ...]
    files: tuple[Location, ...]
    heights: tuple[int, ...]
    kind: Format | Literal["message"] = "message"
    version: int = VERSION
    hint: str = ""
    first_row: int = 0

    def place(self, row: int) -> tuple[Location, int]:
        """Returns the file of a 0-based row of the frame, and the 1-based data row in that file."""
        for file, height, end in zip(self.files, self.heights, accumulate(self.heights), strict=True):
            if row < end:
                return file, self.first_row + row - (end - height) + 1
        raise IndexError(row)

    def error(self, column: str, problem: str, *, row: int | None = None) -> DatasetError:
        """Returns the error to raise about a column, or about its 0-based `row`."""
        if row is not None:
            file, number = self.place(row)
            return DatasetError(f"{file}: [{self.name}] column '{column}', row {number}: {problem}")
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return DatasetError(f"{self.files[0]}{more}: [{self.name}] column '{column}': {problem}")

    def column(self, name: str) -> pl.Series:
        """Returns the column as the files hold it.

        Raises:
            DatasetError: The table has no such column.
        """
        if name in self.frame.columns:
            return self.frame[name]
        raise self.error(
            name,
            f"does not exist; the nearest existing column is '{nearest(name, self.names)}' "
            f"(there are: {', '.join(self.names)}); {self.hint or 'fix the name in the descriptor'}",
        )


@dataclass(frozen=True)
class FileSlice:
    """Rows of one file of a table: a unit of reading that bounds memory.

    Attributes:
        file: Location of the file.
        start: Rows of the file before the slice.
        rows: Rows of the slice; None for the rest of the file, whose number of rows is not known yet.
    """

    file: Location
    start: int = 0
    rows: int | None = None


def file_slices(source: TableSource, directory: Path, *, table: str, rows: int) -> list[FileSlice]:
    """Cuts the files of a table into slices, in the order of the rows.

    A parquet file is cut after about `rows` rows, at a border of its row groups where they are smaller. A file of
    another format is one slice, since its rows are found by reading it.

    Raises:
        DatasetError: No file matches, or a parquet file cannot be read; names the file.
    """
    found: list[FileSlice] = []
    for file in source_files(source, directory, table):
        if source.kind == "parquet":
            found += _parquet_slices(file, f"{file}: [{table}]", rows)
        else:
            found.append(FileSlice(file))
    return found


def _parquet_slices(file: Location, where: str, rows: int) -> list[FileSlice]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    on_disk = local_file(file)
    try:
        footer = read_metadata(on_disk)
    except (OSError, ArrowException) as error:
        raise DatasetError(f"{where} cannot be read as parquet ({_first_line(error)}); check the file") from error
    slices, start, end = [], 0, 0
    for number in range(footer.num_row_groups):
        end += footer.row_group(number).num_rows
        while end - start >= rows:
            stop = end if end - start < 2 * rows else start + rows
            slices.append(FileSlice(file, start, stop - start))
            start = stop
    if end > start:
        slices.append(FileSlice(file, start, end - start))
    return slices


def load(
    source: TableSource,
    directory: Path,
    *,
    table: str,
    wanted: Collection[str] | None = None,
    many: Collection[str] | None = None,
    only: FileSlice | None = None,
) -> SourceTable:
    """Reads the files of a source, or a slice of one: all columns, or the wanted ones that exist.

    `many` names the columns that may hold lists.

    Raises:
        DatasetError: No file matches, or a file cannot be read; names the file, and the row if known.
    """
    files = source_files(source, directory, table) if only is None else (only.file,)
    parts = [_read(source, file, table, wanted, many, only) for file in files]
    names, frames = parts[0][0], [part[1] for part in parts]
    missing = wanted is not None and set(wanted) - set(names)
    hint = _refuse_strangers(source, files[0], table, names, wanted or ()) if missing else ""
    for file, (found, _) in zip(files, parts, strict=True):
        # A column that the descriptor does not declare may be in some files only.
        if set(found) != set(names) and (odd := _odd({*found} ^ {*names}, wanted)) is not None:
            holder = "this file lacks" if odd in names else "only this file has"
            raise DatasetError(
                f"{file}: [{table}] column '{odd}': {holder} it, compared with {files[0].name}; "
                "all files of a table need the same columns"
            )
    try:
        frame = pl.DataFrame([joined([f[name] for f in frames]) for name in frames[0].columns])
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DatasetError(
            f"{files[0]} and {len(files) - 1} more: [{table}] the files do not agree on a column's type "
            f"({_first_line(error)}); write all of them with one schema"
        ) from error
    if source.kind == "csv":
        frame = frame.with_columns(cells(frame[name]) for name in frame.columns)
    if frame.height == 0 and only is None:
        held = "holds a header and no rows" if source.kind == "csv" and source.header else "holds no rows"
        raise DatasetError(f"{files[0]}: [{table}] {held}; point path at a file with data")
    heights, first_row = tuple(f.height for f in frames), only.start if only else 0
    return SourceTable(table, frame, names, files, heights, source.kind, hint=hint, first_row=first_row)


def read_lookup(path: str, directory: Path, *, table: str) -> dict[str, str | float]:
    """Reads a csv with the columns key and value as a table of results: numbers if all values are numbers, else text.

    Raises:
        DatasetError: The file cannot be read, a key is empty or occurs twice, or a value is empty.
    """
    found = load(TableSource.model_validate({"path": path}), directory, table=table, wanted=("key", "value"), many=())
    keys, values = found.column("key"), infer(found.column("value"))
    for name, column in (("key", keys), ("value", values)):
        for row in column.is_null().arg_true():
            raise found.error(name, "is empty; fill it in, or remove the row", row=row)
    for row in (~keys.is_first_distinct()).arg_true():
        raise found.error("key", f"'{keys[row]}' occurs twice; keep one of the rows", row=row)
    results = values.cast(pl.Float64) if values.dtype.is_numeric() else found.column("value")
    return dict(zip(keys.to_list(), results.to_list(), strict=True))


def _odd(names: set[str], wanted: Collection[str] | None) -> str | None:
    return min((name for name in names if wanted is None or name in wanted), default=None)


def infer(texts: pl.Series) -> pl.Series:
    """Returns text as integers, numbers or booleans if every value is one in its plainest spelling, else unchanged."""
    values = texts.drop_nulls()
    for pattern, dtype in ((_INTEGER, pl.Int64), (_NUMBER, pl.Float64)):
        if values.head(1000).str.contains(pattern).all() and values.str.contains(pattern).all():
            typed = texts.cast(dtype, strict=False)
            # A column of nulls stays text, and so do integers too large for 64 bits.
            return typed if len(values) and typed.null_count() == texts.null_count() else texts
    if values.str.to_lowercase().is_in(["true", "false"]).all():
        return texts.str.to_lowercase() == "true"
    return texts


def source_files(source: TableSource, directory: Path, table: str) -> tuple[Location, ...]:
    """Returns the files of a table, at least one, in the order in which they are read.

    Raises:
        DatasetError: No file matches, the path is a directory, or a table cannot be copied.
        StorageError: The store does not answer.
    """
    if source.is_table:
        return (table_copy(source, directory, table).file,)
    path = locate(source.path, directory)
    if path.is_file():
        return (path,)
    if path.is_dir():
        raise DatasetError(
            f'{path}: [{table}] path is a directory; name its files, e.g. path = "{source.path.rstrip("/")}/*.parquet"'
        )
    files = tuple(matching(source.path, directory))
    if not files:
        what = "no file matches" if glob.has_magic(source.path) else "no such file"
        relative = " (relative to the descriptor)" if isinstance(path, Path) else ""
        raise DatasetError(f'{path}: [{table}] {what}; fix path = "{source.path}"{relative}')
    return files


def _read(
    source: TableSource,
    file: Location,
    table: str,
    wanted: Collection[str] | None,
    many: Collection[str] | None,
    only: FileSlice | None,
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Reads one file, or a slice of it: the names of all its columns, and a frame of the wanted columns."""
    where = f"{file}: [{table}]"
    on_disk = local_file(file)
    try:
        if source.kind == "parquet":
            names = tuple(pl.read_parquet_schema(on_disk))
            chosen = [name for name in names if wanted is None or name in wanted]
            if only is not None and chosen:
                return names, pl.scan_parquet(on_disk).select(chosen).slice(only.start, only.rows).collect()
            # A frame without columns has no rows and would be mistaken for an empty file.
            return names, pl.read_parquet(on_disk, columns=chosen or None)
        data = read_plain(on_disk, where, latin_1=source.encoding == "latin-1")
        if source.kind == "csv":
            return read_delimited(data, source, where, wanted)
        splits = {name: options.split for name, options in source.categorical.items()}
        return read_jsonl(data, where, wanted=wanted, many=many, splits=splits)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DatasetError(
            f"{where} cannot be read as {source.kind} ({_first_line(error)}); "
            "check the file, and format in the descriptor"
        ) from error


def _refuse_strangers(
    source: TableSource, file: Location, table: str, names: tuple[str, ...], wanted: Collection[str]
) -> str:
    """Refuses a file that has none of the wanted columns. Returns advice if the file lacks some of them."""
    where = f"{file}: [{table}]"
    found = ""
    if source.kind == "csv":
        found = advice(names, source, wanted)
    elif source.kind == "jsonl":
        found = nested_advice(read_plain(local_file(file), where, latin_1=source.encoding == "latin-1"))
    if set(names) & set(wanted):
        return found
    raise DatasetError(
        f"{where} has none of the columns that the descriptor names ({', '.join(sorted(wanted))}); there are: "
        f"{', '.join(names)[:300]}; {found or 'fix the names in the descriptor'}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
