"""The layout of a csv: the ends of its fields and rows, found before a library reads the file.

Readers of csv disagree on quotes and escapes, and a wrong guess makes rows vanish into one field. A layout is sound if
it accounts for every line: each row holds as many fields as the first, each enclosed field is closed, and no row over
several lines could equally be several rows.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.errors import DatasetError

_LF, _CR = 0x0A, 0x0D
# Not \x01: a file that starts with x\x01 would pass for a zlib stream.
_CONTROLS = [bytes([code]) for code in (0x1F, 0x1E, 0x1D, 0x1C, *range(0x02, 0x09), *range(0x0E, 0x1C))]


class Dialect(NamedTuple):
    """Dialect in which a csv may be written.

    Attributes:
        separator: One byte.
        quote: One byte that encloses fields; None if no byte does.
        escape: One byte that makes the next character literal; None if no byte does.
        strict: A field that begins with a quote must be closed, and may span several lines.
    """

    separator: bytes
    quote: bytes | None
    escape: bytes | None
    strict: bool


@dataclass(frozen=True)
class Layout:
    """Text of a file whose fields a plain reader splits correctly. Rows are 0-based; a header counts as a row.

    Attributes:
        data: Text. Control characters may replace the parts that quotes and escapes protect.
        restore: Each such control character → the text that it replaces.
        quote: Byte that still encloses fields in `data`; None if none does.
        rows: Number of rows.
        width: Number of fields of the first row.
        first: Bytes of the first row.
        odd: First row with another number of fields, and that number.
        unclosed: Rows in which a field begins with a quote that does not end it; such a field is text.
        doubtful: First row over several lines, each of which is a whole row if the quote is text.
        bare_return: First row that holds a CR outside of quotes.
        escape: Character that escapes others; None if none does.
    """

    data: bytes
    restore: dict[str, str]
    quote: bytes | None
    rows: int
    width: int
    first: int
    odd: tuple[int, int] | None = None
    unclosed: tuple[int, ...] = ()
    doubtful: int | None = None
    bare_return: int | None = None
    escape: str | None = None

    def head(self) -> "Layout":
        """Returns the layout of the first row."""
        return replace(self, data=self.data[: self.first], rows=1)

    @property
    def faults(self) -> tuple[bool, bool, int]:
        """Faults of the layout, worst first. Of two layouts, the lesser tuple is likelier."""
        return self.odd is not None, self.doubtful is not None, len(self.unclosed)


def hide(data: bytes, texts: list[bytes], where: str) -> tuple[bytes, list[bytes]]:
    """Replaces byte strings, one after another, by control characters that the data do not hold.

    Returns the data and the control characters.
    """
    spare = _spare(data, len(texts), where)
    for text, byte in zip(texts, spare, strict=True):
        data = data.replace(text, byte)
    return data, spare


def _spare(data: bytes, count: int, where: str) -> list[bytes]:
    spare = [byte for byte in _CONTROLS if byte not in data][:count]
    if len(spare) < count:
        raise DatasetError(f"{where} uses every control character; remove them, or write it as parquet")
    return spare


def settle(data: bytes, dialects: list[Dialect], where: str) -> Layout:
    """Returns the first sound layout among the dialects that a file may be written in, else the likeliest.

    Regular files are laid out by array operations. Quotes are followed one by one only if no such layout is sound.
    """
    regular = [layout for dialect in dialects if (layout := _lay_out(data, dialect, where, careful=False))]
    if sound := [layout for layout in regular if not any(layout.faults)]:
        return sound[0]
    walked = [layout for dialect in dialects if (layout := _lay_out(data, dialect, where, careful=True))]
    return min(walked, key=lambda layout: layout.faults)


def _lay_out(data: bytes, dialect: Dialect, where: str, *, careful: bool) -> Layout | None:
    """Lays a file out in one dialect. Returns None if the file is irregular and only the careful way can lay it out."""
    separator, quote, escape, _ = dialect
    restore: dict[str, str] = {}
    if escape is not None:
        meant = [escape, separator, b"\r\n", b"\n", *([quote] if quote else [])]
        data, marks = hide(data, [escape + text for text in meant], where)
        restore = {mark.decode(): text.decode() for mark, text in zip(marks, meant, strict=True)}
    if quote is None or quote not in data:
        layout: Layout | None = _without_quotes(data, separator)
    elif careful:
        layout = _Walk(data, dialect, where).layout()
    else:
        layout = _regular(data, dialect)
    return layout and replace(
        layout, restore=layout.restore | restore, escape=escape.decode() if escape is not None else None
    )


def _without_quotes(data: bytes, separator: bytes) -> Layout:
    """Returns the layout of a text in which each line is a row."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(buffer == _LF) + 1])
    fields = np.add.reduceat((buffer == separator[0]).view(np.uint8), starts, dtype=np.int64) + 1
    lone = re.search(rb"\r(?!\n|\Z)", data) if b"\r" in data else None
    return Layout(
        data,
        {},
        None,
        rows=len(starts),
        width=int(fields[0]),
        first=int(starts[1]) - 1 if len(starts) > 1 else len(data),
        odd=_first_odd(fields),
        bare_return=data.count(b"\n", 0, lone.start()) if lone else None,
    )


def _first_odd(fields: NDArray[np.int64]) -> tuple[int, int] | None:
    odd = np.flatnonzero(fields != fields[0])
    return (int(odd[0]), int(fields[odd[0]])) if len(odd) else None


def _regular(data: bytes, dialect: Dialect) -> Layout | None:
    """Lays out a file whose every quote encloses a field or is doubled inside an enclosed field (RFC 4180).

    Returns None if a quote does neither.
    """
    separator, quote, _, strict = dialect
    assert quote is not None
    buffer = np.frombuffer(data + b"\n\n", dtype=np.uint8)
    at = np.flatnonzero(buffer == quote[0])
    if len(at) % 2:
        return None
    opening, closing = at[0::2], at[1::2]
    edge = np.zeros(256, dtype=bool)
    edge[[_LF, separator[0], quote[0]]] = True
    # The byte "before" the first is the last, a line feed, so a quote may open the file.
    ended = edge[buffer[closing + 1]] | ((buffer[closing + 1] == _CR) & (buffer[closing + 2] == _LF))
    if not (edge[buffer[opening - 1]].all() and ended.all()):
        return None

    def outside(places: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.searchsorted(at, places) % 2 == 0
        return found

    feeds, marks = np.flatnonzero(buffer[:-1] == _LF), np.flatnonzero(buffer == separator[0])
    ends = outside(feeds)
    bounds = feeds[ends]
    fields = np.diff(np.searchsorted(marks[outside(marks)], bounds), prepend=0) + 1
    returns = np.flatnonzero(buffer == _CR) if b"\r" in data else np.empty(0, dtype=np.int64)
    lone = returns[(buffer[returns + 1] != _LF) & outside(returns)]
    doubtful = None if strict or ends.all() else _doubtful(data, dialect, int(fields[0]), ends)
    return Layout(
        data,
        {},
        quote,
        rows=len(bounds),
        width=int(fields[0]),
        first=int(bounds[0]),
        odd=_first_odd(fields),
        doubtful=doubtful,
        bare_return=int(np.searchsorted(bounds, lone[0])) if len(lone) else None,
    )


def _doubtful(data: bytes, dialect: Dialect, width: int, ends: NDArray[np.bool_]) -> int | None:
    """Returns the first row over several lines whose lines are all whole rows if its unclosed quote is text.

    Args:
        ends: (lines,) True if the end of the line ends a row.
    """
    lines, count = data.split(b"\n"), _Fields(dialect)
    row_of = np.concatenate([[0], np.cumsum(ends)[:-1]])
    several = np.flatnonzero(np.bincount(row_of) > 1)
    first, last = (np.searchsorted(row_of, several, side=side) for side in ("left", "right"))
    for row, start, stop in zip(several, first, last, strict=True):
        if all(count(line) == width for line in lines[start:stop]):
            return int(row)
    return None


class _Fields:
    """Counter of the fields of a line. Quotes enclose a field only if they are closed on the line."""

    def __init__(self, dialect: Dialect) -> None:
        assert dialect.quote is not None
        mark, self._separator = re.escape(dialect.quote), dialect.separator
        end = re.escape(dialect.separator)
        within = b"(?:[^%s]|%s%s)*" % (mark, mark, mark)
        self._enclosed = re.compile(b"(?:^|(?<=%s))%s%s%s(?=%s|\r?$)" % (end, mark, within, mark, end))

    def __call__(self, line: bytes) -> int:
        return self._enclosed.sub(b"", line).count(self._separator) + 1


class _Walk:
    """Follows quotes one by one. A field that begins with a quote is enclosed only if another quote ends it."""

    def __init__(self, data: bytes, dialect: Dialect, where: str) -> None:
        assert dialect.quote is not None
        self._data, self._dialect, self._quote = data, dialect, dialect.quote
        mark, end = re.escape(dialect.quote), re.escape(dialect.separator)
        body = b"|" + mark + mark + b")*)" + mark + b"(?=" + end + b"|\r?\n|\r?\\Z)"
        self._over_lines = re.compile(mark + b"((?:[^" + mark + b"]" + body)
        self._within_line = re.compile(mark + b"((?:[^" + mark + b"\n]" + body)
        self._opening = re.compile(b"(?:\\A|(?<=[\n" + end + b"]))" + mark)
        self._fields = _Fields(dialect)
        self._width = self._fields(data.partition(b"\n")[0])
        # Hides every character of an enclosed field that would end it.
        self._ends = dialect.separator + b"\n\r"
        self._marks = _spare(data, len(self._ends), where)

    def layout(self) -> Layout:
        data, ends = self._data, bytes.maketrans(self._ends, b"".join(self._marks))
        pieces: list[bytes] = []
        unclosed: list[int] = []
        doubtful: int | None = None
        done = counted = row = 0
        place = self._opening.search(data)
        while place:
            start = place.start()
            row, counted = row + data.count(b"\n", counted, start), start
            found = self._over_lines.match(data, start)
            if found and b"\n" in found[0] and self._is_doubtful(found):
                found = self._within_line.match(data, start)
                # A line of text rarely holds as many tabs as a row of a table.
                if self._dialect.separator != b"\t" and doubtful is None:
                    doubtful = row
            if found:
                pieces += [data[done:start], found[1].replace(self._quote * 2, self._quote).translate(ends)]
                done = counted = found.end()
            else:
                unclosed.append(row)
            place = self._opening.search(data, max(done, start + 1))
        plain = _without_quotes(b"".join([*pieces, data[done:]]), self._dialect.separator)
        restore = {mark.decode(): chr(end) for mark, end in zip(self._marks, self._ends, strict=True)}
        return replace(plain, restore=restore, unclosed=tuple(unclosed), doubtful=doubtful)

    def _is_doubtful(self, found: re.Match[bytes]) -> bool:
        """Returns whether each line of a field over several lines is a whole row if the field's quote is text."""
        if self._dialect.strict:
            return False
        start, stop = self._data.rfind(b"\n", 0, found.start()) + 1, self._data.find(b"\n", found.end())
        lines = self._data[start : stop if stop >= 0 else len(self._data)].split(b"\n")
        return all(self._fields(line) == self._width for line in lines)
