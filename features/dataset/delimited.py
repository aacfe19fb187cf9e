"""Reads csv text as columns of text, and checks that every row has the same number of fields.

The layout is found first (`features.dataset.layout`). This module reads it, names the columns, and says which row of a
file is wrong and how to fix it. Shape letter: R, the rows of a file.
"""

import codecs
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import polars as pl

from features.dataset.layout import Dialect, Layout, hide, settle
from features.dataset.source import TableSource
from features.errors import DatasetError

# Separators that are recognised when another is declared: as TOML writes them, and in words.
_SEPARATORS = {
    ",": (",", "commas"),
    ";": (";", "semicolons"),
    "\t": ("\\t", "tabs"),
    "|": ("|", "bars"),
    "::": ("::", "'::'"),
    ":": (":", "colons"),
    "\x01": ("\\u0001", "the control character 1"),
    "^": ("^", "'^'"),
    "~": ("~", "'~'"),
    " ": (" ", "spaces"),
}
# Stand-in for a byte that is not UTF-8: a character of the private use area.
_NOT_UTF8 = 0xF700


def read_delimited(
    data: bytes, source: TableSource, where: str, wanted: Collection[str] | None
) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Reads a csv.

    Args:
        data: Text with LF or CRLF line ends, without a line end after the last row. It is UTF-8 except in unwanted
            columns.
        source: Separator, quote, escape, header and columns.
        where: First words of each error, e.g. "FILE: [items]".
        wanted: Columns to return; None for all.

    Returns:
        Names of all columns, and (R, …) String columns of the wanted ones. An empty field is null.

    Raises:
        DatasetError: Rows differ in width, a quote is never closed, rows cannot be told apart, or bytes are not UTF-8.
            The message names the row and the remedy.
    """
    layout, separator = _laid_out(data, source, where)
    _refuse_faults(layout, data, source, where)
    names = source.columns or _header(layout, separator)
    chosen = [index for index, name in enumerate(names) if wanted is None or name in wanted]
    _refuse_twins([names[index] for index in chosen], where)
    # A frame without columns has no rows and would be mistaken for an empty file.
    read = chosen or [0]
    try:
        frame = _parse(layout, separator, read)
    except pl.exceptions.ComputeError as error:
        if "utf-8" not in str(error):
            raise
        frame = _parse(_with_stand_ins(layout), separator, read)
        if chosen:
            _refuse_foreign(frame, source, where)
    if frame.height != layout.rows:
        raise DatasetError(f"{where} holds {layout.rows} rows, but {frame.height} were read; write it as parquet")
    frame = frame.rename(dict(zip(frame.columns, [names[index] for index in read], strict=True)))
    return names, frame[1:] if source.header else frame


def advice(header: Sequence[str], source: TableSource, wanted: Collection[str]) -> str:
    """Returns the likely cause and the remedy if a csv lacks wanted columns; "" if no cause is recognised."""
    line = source.separator.join(header)
    if line.lstrip().startswith(("{", "[")):
        return 'it looks like JSON: set format = "jsonl"'
    for separator, (written, words) in _SEPARATORS.items():
        fields = [name.strip().strip("\"'") for name in line.split(separator)]
        if separator != source.separator and len(fields) > 1 and set(fields) & set(wanted):
            return f'the fields are separated by {words}: set separator = "{written}"'
    if any(name.strip().replace(".", "", 1).lstrip("-").isdigit() for name in header):
        return "the first row looks like data: set header = false, and columns to the fields' names"
    return ""


def _laid_out(data: bytes, source: TableSource, where: str) -> tuple[Layout, str]:
    """Returns the layout, and the one byte that separates its fields."""
    separator, restore = source.separator.encode(), {}
    if len(separator) > 1:
        data, marks = hide(data, [separator], where)
        separator, restore = marks[0], {marks[0].decode(): source.separator}
    layout = settle(data, _dialects(data, source, separator), where)
    return replace(layout, restore=restore | layout.restore), separator.decode()


def _dialects(data: bytes, source: TableSource, separator: bytes) -> list[Dialect]:
    quoted = source.quote if source.quote is not None else '"' if len(source.separator) == 1 else ""
    quote, strict = quoted.encode() or None, source.quote is not None
    if source.escape is not None:
        return [Dialect(separator, quote, source.escape.encode() or None, strict)]
    # A backslash before the end of a field may be an escape.
    ends = [separator, b"\n", *([quote] if quote else [])]
    escapes = [None, b"\\"] if any(b"\\" + end in data for end in ends) else [None]
    return [Dialect(separator, quote, escape, strict) for escape in escapes]


def _header(layout: Layout, separator: str) -> tuple[str, ...]:
    first = _parse(_with_stand_ins(layout.head()), separator, [*range(layout.width)])
    return tuple(name or "" for name in first.row(0))


def _parse(layout: Layout, separator: str, columns: list[int]) -> pl.DataFrame:
    """Returns (R, len(columns)) String, named by position."""
    schema = {f"column_{index + 1}": pl.String() for index in range(layout.width)}
    frame = pl.read_csv(
        layout.data,
        separator=separator,
        quote_char=layout.quote.decode() if layout.quote else None,
        has_header=False,
        schema=schema,
        columns=columns,
    )
    texts = pl.all()
    for mark, text in layout.restore.items():
        if mark.encode() in layout.data:
            texts = texts.str.replace_all(mark, text, literal=True)
    # A database writes null as an escaped N.
    empty = texts.is_in(["", f"{layout.escape}N"]) if layout.escape else texts == ""
    return frame.select(pl.when(~empty).then(texts))


def _refuse_faults(layout: Layout, data: bytes, source: TableSource, where: str) -> None:
    def place(row: int) -> str:
        number = row + (0 if source.header else 1)
        return f"{where} row {number}:" if number else f"{where} the header:"

    width = len(source.columns) if source.columns else layout.width
    odd = (0, layout.width) if width != layout.width else layout.odd
    if layout.unclosed and source.quote is not None:
        raise DatasetError(
            f"{place(layout.unclosed[0])} a quote is opened and never closed; close it, or remove quote from the "
            "descriptor, so that a field which merely begins with a quote is text"
        )
    if layout.bare_return is not None and (odd or layout.width == 1):
        raise DatasetError(
            f"{place(layout.bare_return)} holds a carriage return (CR) within the line, so the line ends are mixed; "
            "convert all of them to LF"
        )
    if odd:
        raise DatasetError(
            f"{place(odd[0])} holds {odd[1]} fields, {width} expected; "
            + (_other_dialect(data, source, width, where) or "fix the row, or separator and columns in the descriptor")
        )
    if layout.doubtful is not None:
        raise DatasetError(
            f"{place(layout.doubtful)} a field begins with a quote that its line does not close: either the field goes "
            "on over the next lines, or each line is a row and the quote is text; "
            'set quote = "\\"" for the first, or quote = "" for the second'
        )


def _other_dialect(data: bytes, source: TableSource, width: int, where: str) -> str:
    """Returns advice that names the dialect in which all rows have the same number of fields; "" if there is none."""
    if source.quote is None and b"'" in data:
        layout, _ = _laid_out(data, source.model_copy(update={"quote": "'"}), where)
        if not any(layout.faults) and layout.width == width:
            return 'its fields are enclosed in single quotes: set quote = "\'"'
    line = data.partition(b"\n")[0]
    for separator, (written, words) in _SEPARATORS.items():
        if source.columns and separator != source.separator and line.count(separator.encode()) == width - 1 > 0:
            return f'the fields are separated by {words}: set separator = "{written}"'
    return ""


def _refuse_twins(names: Sequence[str], where: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DatasetError(f"{where} column '{name}' comes {count} times in the header; rename all but one")


def _with_stand_ins(layout: Layout) -> Layout:
    """Returns the layout with each byte that is not UTF-8 replaced by a stand-in character."""
    return replace(layout, data=layout.data.decode("utf-8", "tessera-byte").encode())


def _refuse_foreign(frame: pl.DataFrame, source: TableSource, where: str) -> None:
    """Refuses the first row that has a stand-in character in a wanted column."""
    pattern = f"[{chr(_NOT_UTF8 + 0x80)}-{chr(_NOT_UTF8 + 0xFF)}]"
    found = frame.select(pl.all().str.extract(f"({pattern})"))
    rows = found.select(pl.any_horizontal(pl.all().is_not_null())).to_series()
    if rows.any():
        row = rows.arg_max() or 0
        byte = ord(next(text for text in found.row(row) if text)) - _NOT_UTF8
        raise DatasetError(
            f"{where} row {row + (0 if source.header else 1)}: byte 0x{byte:02x} is not UTF-8; "
            'add encoding = "latin-1" if the file is that, or save it as UTF-8'
        )


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return chr(_NOT_UTF8 + error.object[error.start]), error.start + 1


codecs.register_error("tessera-byte", _stand_in)
