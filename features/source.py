"""Files of a table → one polars frame that still knows which file each row came from.

Everything a reader can trip over on disk is refused here, by file and row: a glob without a match, bytes that are not
text, a csv row with too few or too many fields, a line that is not JSON, parts that do not share their columns.
A csv's values stay text here; what they mean is said by `features.canonical.cell` and by the columns' readers.
"""

import glob
import gzip
import io
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import polars as pl

from features.canonical import VERSION, cells
from features.dataset import Format, TableSource, nearest
from features.error import DatasetError
from features.jsonl import read_jsonl
from features.mixed import joined

_INTEGER = r"^-?(0|[1-9][0-9]*)$"
# An exponent needs its sign, else hexadecimal identifiers such as 12e4 would pass for numbers.
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-][0-9]+)?$"
# Not \x01: a file that starts with x\x01 would pass for a zlib stream.
_UNUSED = [bytes([code]) for code in (0x1F, 0x1E, 0x1D, 0x1C, *range(0x02, 0x09), *range(0x0E, 0x1C))]


@dataclass(frozen=True)
class Table:
    """A table as its files hold it.

    Attributes:
        name: items, users or events.
        frame: (R rows) the columns that were asked for and exist, the files' rows one after another.
        names: every column there is, read or not.
        files: in sorted order, which is the order of the rows.
        heights: rows per file.
        kind: format of the files; "message" for rows that came by themselves.
        version: of the canonical form of its ids and categories.
    """

    name: str
    frame: pl.DataFrame
    names: tuple[str, ...]
    files: tuple[Path, ...]
    heights: tuple[int, ...]
    kind: Format | Literal["message"] = "message"
    version: int = VERSION

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a 0-based row of the frame, and its 1-based data row there."""
        for file, height, end in zip(self.files, self.heights, accumulate(self.heights), strict=True):
            if row < end:
                return file, row - (end - height) + 1
        raise IndexError(row)

    def error(self, column: str, problem: str, *, row: int | None = None) -> DatasetError:
        """The error to raise about a column, or about its 0-based `row`."""
        if row is not None:
            file, number = self.place(row)
            return DatasetError(f"{file}: [{self.name}] column '{column}', row {number}: {problem}")
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return DatasetError(f"{self.files[0]}{more}: [{self.name}] column '{column}': {problem}")

    def column(self, name: str) -> pl.Series:
        """The column as the files hold it.

        Raises:
            DatasetError: there is none of that name.
        """
        if name in self.frame.columns:
            return self.frame[name]
        raise self.error(
            name,
            f"does not exist; the nearest existing column is '{nearest(name, self.names)}' "
            f"(there are: {', '.join(self.names)}); mend the name in the descriptor",
        )


def load(source: TableSource, directory: Path, *, table: str, wanted: Collection[str] | None = None) -> Table:
    """Reads the files of a source, all columns or the wanted ones that exist.

    Raises:
        DatasetError: no file, or one that cannot be read; names it, and the row where there is one.
    """
    files = source_files(source, directory, table)
    parts = [_read(source, file, table, wanted) for file in files]
    names, frames = parts[0][0], [part[1] for part in parts]
    for file, (found, _) in zip(files, parts, strict=True):
        # What nothing declares may be in some files alone.
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
    if frame.height == 0:
        raise DatasetError(f"{files[0]}: [{table}] holds no rows; point path at a file with data")
    return Table(table, frame, names, files, tuple(f.height for f in frames), source.kind)


def _odd(names: set[str], wanted: Collection[str] | None) -> str | None:
    return min((name for name in names if wanted is None or name in wanted), default=None)


def infer(texts: pl.Series) -> pl.Series:
    """Text as integers, numbers or booleans where every value is one in its plainest spelling, else as it is."""
    values = texts.drop_nulls()
    for pattern, dtype in ((_INTEGER, pl.Int64), (_NUMBER, pl.Float64)):
        if values.head(1000).str.contains(pattern).all() and values.str.contains(pattern).all():
            typed = texts.cast(dtype, strict=False)
            # All null stays text, and so do integers too large for 64 bits.
            return typed if len(values) and typed.null_count() == texts.null_count() else texts
    if values.str.to_lowercase().is_in(["true", "false"]).all():
        return texts.str.to_lowercase() == "true"
    return texts


def source_files(source: TableSource, directory: Path, table: str) -> tuple[Path, ...]:
    """The files of a table, in the order in which they are read; there is at least one."""
    path = directory / source.path
    if path.is_file():
        return (path,)
    if path.is_dir():
        raise DatasetError(
            f'{path}: [{table}] path is a directory; name its files, e.g. path = "{source.path.rstrip("/")}/*.parquet"'
        )
    found = sorted(directory / name for name in glob.glob(source.path, root_dir=directory, recursive=True))
    files = tuple(file for file in found if file.is_file())
    if not files:
        what = "no file matches" if glob.has_magic(source.path) else "no such file"
        raise DatasetError(f'{path}: [{table}] {what}; mend path = "{source.path}" (relative to the descriptor)')
    return files


def _read(
    source: TableSource, file: Path, table: str, wanted: Collection[str] | None
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """One file: the names of all its columns, and those that are wanted."""
    try:
        if source.kind == "parquet":
            names = tuple(pl.read_parquet_schema(file))
            chosen = [name for name in names if wanted is None or name in wanted]
            # Without any column a frame has no rows, and would pass for an empty file.
            return names, pl.read_parquet(file, columns=chosen or None)
        data = _text(source, file, table)
        if source.kind == "jsonl":
            splits = {name: options.split for name, options in source.categorical.items()}
            return read_jsonl(data, f"{file}: [{table}]", wanted=wanted, splits=splits)
        frame = _csv(source, data, f"{file}: [{table}]")
        chosen = [name for name in frame.columns if wanted is None or name in wanted]
        # A frame without any column has no rows, and would pass for an empty file.
        return tuple(frame.columns), frame.select(chosen or frame.columns[:1])
    except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
        raise DatasetError(
            f"{file}: [{table}] cannot be read as {source.kind} ({_first_line(error)}); "
            "check the file, and format in the descriptor"
        ) from error


def _text(source: TableSource, file: Path, table: str) -> bytes:
    """The file's bytes as UTF-8, unzipped, without blank lines at the end."""
    data = file.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if not data:
        raise DatasetError(f"{file}: [{table}] is empty; point path at a file with data")
    if source.encoding == "latin-1":
        return data.decode("latin-1").encode()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + (0 if source.kind == "csv" and source.header else 1)
        raise DatasetError(
            f"{file}: [{table}] row {row}: byte 0x{data[error.start]:02x} is not UTF-8; "
            'add encoding = "latin-1" if the file is that, or save it as UTF-8'
        ) from error
    return data


def _csv(source: TableSource, data: bytes, where: str) -> pl.DataFrame:
    """A csv with every field as text; an empty field is null, quoted or not."""
    separator, quoted = source.separator.encode(), len(source.separator) == 1
    if len(separator) > 1:
        unused = next((byte for byte in _UNUSED if byte not in data), None)
        if unused is None:
            raise DatasetError(f"{where} uses every control character; a separator of several needs a spare one")
        data, separator = data.replace(separator, unused), unused
    width = len(source.columns) if source.columns else None
    try:
        frame = pl.read_csv(
            io.BytesIO(data),
            separator=separator.decode(),
            quote_char='"' if quoted else None,
            has_header=source.header,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError as error:
        raise _ragged(source, data, separator, where, width) or error from error
    # A row that is too short leaves its last field empty, so whole rows need no second look.
    if (width or frame.width) != frame.width or (frame.width > 1 and frame[:, -1].null_count()):
        ragged = _ragged(source, data, separator, where, width or frame.width)
        if ragged:
            raise ragged
    if quoted and b'""' in data:
        frame = frame.select(pl.when(pl.all() != "").then(pl.all()))
    return frame.rename(dict(zip(frame.columns, source.columns or frame.columns, strict=True)))


def _ragged(source: TableSource, data: bytes, separator: bytes, where: str, width: int | None) -> DatasetError | None:
    """What is wrong with the shape of a csv: the first row without `width` fields (by default, the first row's)."""
    if len(source.separator) == 1 and b'"' in data:
        mark = re.escape(separator)
        data = re.sub(rb'(?m)(^|%s)"(?:[^"]|"")*"' % mark, rb"\1", data)
        stray = re.search(rb'(?m)(^|%s)"' % mark, data)
        if stray:
            row = data.count(b"\n", 0, stray.start()) + (0 if source.header else 1)
            return DatasetError(f"{where} row {row}: a quote is opened and never closed; close it")
    lines = pl.Series([data]).cast(pl.String).str.split("\n").explode()
    fields = lines.str.count_matches(separator.decode(), literal=True) + 1
    width = width or int(fields[0])
    odd = (fields != width).arg_true()
    if not len(odd):
        return None
    row = int(odd[0]) + (0 if source.header else 1)
    place = f"row {row}" if row else "the header"
    return DatasetError(
        f"{where} {place}: holds {fields[odd[0]]} fields, {width} expected; "
        "mend the row, or separator and columns in the descriptor"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
