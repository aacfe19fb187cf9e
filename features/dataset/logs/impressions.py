"""Reads exported logs of impressions and outcomes as the events' table: `[events] from = "impressions"`.

A file holds the messages of one topic: JSON lines, or a parquet whose columns are the fields. The field `_appended_ms`
is the time of a message's append to the log, as `tessera topics export` writes it. Without the field, the message's own
time takes its place. Both topics are joined as the stream joins them (`features.shown.join`). An impression that has
not closed by the newest append in the files is left out, since its outcomes may not be there yet.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from features.dataset.descriptor import Events
from features.dataset.files import SourceTable, source_files
from features.dataset.jsonl import strict_lines
from features.dataset.plain_text import read_plain
from features.errors import DatasetError
from features.shown.declared import READ_US, SURFACE
from features.shown.join import Join, ShownRow
from features.shown.message import Impression, Outcome, Shadowed
from features.storage.copy import local_file
from features.storage.location import Location
from features.value.canonical import canonical_values
from features.value.mixed_column import column_of

APPENDED = "_appended_ms"
"""Field of an exported message: time of its append, milliseconds since 1970."""
_Message = Impression | Shadowed | Outcome


def load_impressions(events: Events, directory: Path) -> SourceTable:
    """Reads both topics from files and joins them.

    Args:
        events: Table of the events, `from = "impressions"`.
        directory: Directory to which paths are relative.

    Returns:
        (R, …): user, item, impression and surface String; time and position Int64; a column of 0 and 1 for each kind of
        outcome; a column for each field of [events.request] and [events.candidate]; `_event_id` UInt64; `_read_us`
        Int64 if an expression reads the clock.

    Raises:
        DatasetError: A file is missing, holds another message, or no impression of the files has closed.
    """
    impressions = source_files(events.topics()["impressions"], directory, "events")
    rows = joined_rows(events, directory)
    try:
        frame = rows_frame(rows, events)
    except TypeError as error:
        raise DatasetError(f"{impressions[0]}: [events] {error}; export the topic again") from error
    return SourceTable("events", frame, tuple(frame.columns), impressions, _heights(impressions, rows), "jsonl")


def joined_rows(events: Events, directory: Path) -> list[ShownRow]:
    """Returns the rows of the impressions that have closed, in the order of the join; see `load_impressions`."""
    topics = events.topics()
    impressions = source_files(topics["impressions"], directory, "events")
    join = Join(events.join_rule())
    messages = [
        *_messages(impressions, topics["impressions"].kind, shown=True),
        *_messages(source_files(topics["outcomes"], directory, "events"), topics["outcomes"].kind, shown=False),
    ]
    # Impressions come first among equal times. The sort is stable, so repeats stay in the order of the files.
    messages.sort(key=lambda pair: (pair[1], isinstance(pair[0], Outcome)))
    rows: list[ShownRow] = []
    for message, at_ms in messages:
        rows += join.close(at_ms)
        if isinstance(message, Outcome):
            join.note(message, at_ms)
        else:
            join.show(message, at_ms)
    rows += join.close(messages[-1][1] + 1 if messages else 0)
    if not rows:
        raise DatasetError(
            f"{impressions[0]}: [events] no impression has closed by the newest message of the logs "
            f"({len(join):,} are open, window = {events.window!r}); export longer logs, or give a shorter window"
        )
    return rows


def rows_frame(rows: list[ShownRow], events: Events) -> pl.DataFrame:
    """Returns rows of the join as the table of `load_impressions`.

    Raises:
        TypeError: A field has a value that is neither scalar nor a list of scalars.
    """
    labels = {
        kind: pl.Series(kind, [row.labels[place] for row in rows], pl.Int8)
        for place, kind in enumerate(events.outcomes)
    }
    fields = {name: _field(name, kind, rows) for name, kind in _fields_of(events).items()}
    columns = {
        "user": pl.Series([row.user for row in rows], dtype=pl.String),
        "item": pl.Series([row.item for row in rows], dtype=pl.String),
        "time": pl.Series([row.time_ms for row in rows], dtype=pl.Int64),
        "position": pl.Series([row.position for row in rows], dtype=pl.Int64),
        "surface": pl.Series([row.surface for row in rows], dtype=pl.String),
        "impression": pl.Series([row.impression for row in rows], dtype=pl.String),
        "_event_id": pl.Series([row.id for row in rows], dtype=pl.UInt64),
    }
    if events.read_at:
        columns[READ_US] = pl.Series([row.read_us for row in rows], dtype=pl.Int64)
    return pl.DataFrame(columns | labels | fields)


def _fields_of(events: Events) -> dict[str, str]:
    """Returns the types of the declared fields, by name. Each row has its surface anyway."""
    return {name: field.type for name, field in events.fields.items() if name != SURFACE}


def _field(name: str, kind: str, rows: list[ShownRow]) -> pl.Series:
    """Returns the values of a field as messages of these rows are read."""
    values = [row.fields.get(name) for row in rows]
    if kind == "number" and set(map(type, values)) <= {int, float, bool, type(None)}:
        return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
    return column_of(name, values) if kind == "time" else canonical_values(name, values)


def row_message(row: ShownRow, events: Events) -> bytes:
    """Encodes a row as a message of the topic `events`, with the columns of `rows_frame`."""
    fields: dict[str, Any] = {
        "user": row.user,
        "item": row.item,
        "time": row.time_ms,
        "position": row.position,
        "surface": row.surface,
        "impression": row.impression,
        "_event_id": row.id,
    }
    if events.read_at and row.read_us is not None:
        fields[READ_US] = row.read_us
    sent = {name: row.fields[name] for name in _fields_of(events) if row.fields.get(name) is not None}
    return msgspec.json.encode(fields | dict(zip(events.outcomes, row.labels, strict=True)) | sent)


def _heights(files: tuple[Location, ...], rows: list[ShownRow]) -> tuple[int, ...]:
    return (len(rows), *[0] * (len(files) - 1))


def _messages(files: tuple[Location, ...], kind: str, *, shown: bool) -> Iterator[tuple[_Message, int]]:
    """Yields the messages of files with the time of their append."""
    expected: Any = Impression | Shadowed if shown else Outcome
    default = {"kind": "shown"} if shown else {}
    for file in files:
        where = f"{file}: [events]"
        for number, fields in enumerate(_fields(file, kind, where), 1):
            try:
                message = msgspec.convert({**default, **fields}, type=expected)
            except msgspec.ValidationError as error:
                topic = "impression" if shown else "outcome"
                raise DatasetError(f"{where} row {number}: no {topic}: {error}; export the topic again") from error
            at_ms = fields.get(APPENDED, message.time_ms)
            if not isinstance(at_ms, int):
                raise DatasetError(f"{where} row {number}: {APPENDED} is {at_ms!r}; whole milliseconds are expected")
            yield message, at_ms


def _fields(file: Location, kind: str, where: str) -> Iterator[Mapping[str, Any]]:
    on_disk = local_file(file)
    try:
        if kind == "parquet":
            for row in pl.read_parquet(on_disk).iter_rows(named=True):
                yield {name: value for name, value in row.items() if value is not None}
            return
        data = read_plain(on_disk, where)
        for line in strict_lines(data, where) if data.strip() else ():
            yield msgspec.json.decode(line, type=dict[str, Any])
    except (OSError, pl.exceptions.PolarsError, msgspec.DecodeError) as error:
        raise DatasetError(f"{where} cannot be read as {kind} ({error}); check the file, and format") from error
