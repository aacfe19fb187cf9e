"""Messages on the wire: a row of the dataset's own tables as one JSON object.

A team sends what its files hold, under the same column names, so the descriptor that shaped the training frame shapes
the stream too: the same ids, times, labels and features come out. Types are checked as JSON is decoded; what only
shows when columns are converted is found by halving the batch, so one bad message costs a few conversions and never
its neighbours.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from features.column import typed
from features.dataset import Events, Items
from features.error import DatasetError, EventError
from features.source import Table
from features.table import shape_events, shape_items

MAX_BYTES = 1 << 20
WIRE_VERSION = 1
_SCALAR = str | int | float | bool
_MESSAGE = Path("message")
# What a message may say about itself, beside the columns: name on the wire, type, default.
_ENVELOPE: tuple[tuple[str, Any, Any], ...] = (
    ("_schema", int, WIRE_VERSION),
    ("_event_id", str | int | None, None),
    ("_version", int | None, None),
    ("_deleted", bool, False),
    ("_backfill", bool, False),
)


class Decoded(NamedTuple):
    """A message as a row of its table, and what it says about itself.

    Attributes:
        row: values in the order of `Decoder.columns`.
        event_id: of two events with one id the first counts; None: never a duplicate.
        version: of an item; the highest counts, and without one the last message.
        deleted: whether the item is gone.
        backfill: whether the event is old on purpose, and so never late.
    """

    row: tuple[Any, ...]
    event_id: str | int | None
    version: int | None
    deleted: bool
    backfill: bool = False


class Rows(NamedTuple):
    """Decoded rows of one table: column names, and the values of each row in their order."""

    columns: tuple[str, ...]
    values: list[tuple[Any, ...]]


class Decoder:
    """Bytes to rows of one table: decoding checks that every needed field is there and of a usable type.

    Args:
        name: `events` or `items`, named in errors.
        required: columns that must be present and not null.
        optional: columns that may be missing; anything else in a message is passed over.
    """

    def __init__(self, name: str, required: Sequence[str], optional: Sequence[str]) -> None:
        self._name = name
        self.columns = (*required, *optional)
        # Positional field names, since a column may be called anything; the JSON keys are the columns' own.
        rename = {f"f{position}": column for position, column in enumerate(self.columns)}
        rename |= {f"e{position}": name for position, (name, _, _) in enumerate(_ENVELOPE)}
        value = _SCALAR | list[_SCALAR] | None
        fields: list[Any] = [
            (f"f{position}", _SCALAR) if column in required else (f"f{position}", value, None)
            for position, column in enumerate(self.columns)
        ]
        fields += [(f"e{position}", kind, default) for position, (_, kind, default) in enumerate(_ENVELOPE)]
        kind = msgspec.defstruct(f"{name}_message", fields, rename=rename, frozen=True)
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, data: bytes) -> Decoded:
        """One message as a row.

        Raises:
            EventError: too large, not JSON, not an object, a field missing or of a wrong type; names the field.
        """
        if len(data) > MAX_BYTES:
            raise EventError(
                f"{self._name} message: {len(data)} bytes, at most {MAX_BYTES} are read", cause="oversized"
            )
        try:
            *row, schema, event_id, version, deleted, backfill = msgspec.structs.astuple(self._decoder.decode(data))
        except msgspec.ValidationError as error:
            raise EventError(f"{self._name} message: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EventError(f"{self._name} message: {error}", cause="undecodable") from error
        if schema != WIRE_VERSION:
            raise EventError(
                f"{self._name} message: _schema {schema}, this release reads {WIRE_VERSION}", cause="unknown-version"
            )
        return Decoded(tuple(row), event_id, version, deleted, backfill)


def event_decoder(events: Events) -> Decoder:
    """Reads messages of the topic `events`: what the events' table needs."""
    keys = (events.user, events.item, events.time.column if events.time else events.order, events.label.column)
    return Decoder("events", [key for key in keys if key], [*events.categorical, *events.numeric])


def item_decoder(items: Items) -> Decoder:
    """Reads messages of the topic `items`: the id, and whatever texts, features and filters the item has."""
    optional = dict.fromkeys((*items.text, *items.categorical, *items.numeric, *items.filterable))
    return Decoder("items", [items.id], [name for name in optional if name != items.id])


def event_rows(rows: Rows, events: Events) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded event messages.

    Returns:
        The frame of `features.table.read_events`, its categorical columns all lists; `event` is the position in `rows`.
        A row whose label is neither positive nor negative is left out. And by position the reason of each row that
        cannot be used.
    """

    def shape(table: Table) -> pl.DataFrame:
        return _conform(shape_events(table, events)[0], dict.fromkeys(events.categorical, pl.List(pl.String)))

    return _shape(rows, "events", shape)


def item_rows(rows: Rows, items: Items, types: Mapping[str, pl.DataType]) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded item messages: the frame of `read_items` with `message_row`, the position in `rows`; and the bad.

    An id that comes twice is kept twice, in order. Columns get the types that the catalogue has; a value that does not
    fit makes its message a bad one.
    """

    def shape(table: Table) -> pl.DataFrame:
        # One by one: an id may come again, which the files' check for duplicates would refuse.
        shaped = [shape_items(_table("items", table.frame[row]), items) for row in range(table.frame.height)]
        return pl.concat([_conform(row, types) for row in shaped]).with_row_index("message_row")

    return _shape(rows, "items", shape)


def _shape(rows: Rows, name: str, shape: Callable[[Table], pl.DataFrame]) -> tuple[pl.DataFrame, dict[int, str]]:
    good: list[pl.DataFrame] = []
    bad: dict[int, str] = {}
    pending = [(0, len(rows.values))] if rows.values else []
    while pending:
        start, stop = pending.pop()
        try:
            columns = zip(*rows.values[start:stop], strict=True)
            frame = pl.DataFrame(dict(zip(rows.columns, map(list, columns), strict=True)), strict=True)
            shaped = shape(_table(name, frame))
        except (DatasetError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
            if stop - start == 1:
                bad[start] = str(error)
            else:
                middle = (start + stop) // 2
                pending += [(middle, stop), (start, middle)]
            continue
        position = shaped.columns[0]
        good.append(shaped.with_columns(pl.col(position) + pl.lit(start, dtype=pl.UInt32)))
    return (pl.concat(good, how="vertical_relaxed") if good else pl.DataFrame()), bad


def _conform(frame: pl.DataFrame, types: Mapping[str, Any]) -> pl.DataFrame:
    """Gives columns their types, whatever one message holds: a lone value of a list column is a list of one."""
    for name, dtype in types.items():
        if name not in frame.columns:
            continue
        try:
            frame = frame.with_columns(_cast(frame[name], dtype))
        except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
            raise DatasetError(f"column {name!r} holds {dtype}: {error}") from error
    return frame


def _cast(values: pl.Series, dtype: Any) -> pl.Series:
    if isinstance(dtype, pl.List) and not isinstance(values.dtype, pl.List):
        text = values.cast(dtype.inner)
        return pl.Series(values.name, [None if v is None else [v] for v in text], dtype=dtype)
    if isinstance(dtype, pl.Date | pl.Datetime) and values.dtype == pl.String:
        return typed(values.name, values.to_list(), dtype)
    return values.cast(dtype, strict=True)


def _table(name: str, frame: pl.DataFrame) -> Table:
    return Table(name, frame, tuple(frame.columns), (_MESSAGE,), (frame.height,))
