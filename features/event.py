"""Messages on the wire: a row of the dataset's own tables as one JSON object.

A team sends what its files hold, under the same column names, so the descriptor that shaped the training frame shapes
the stream too: the same ids, times, labels and features come out. Types are checked as JSON is decoded; what only
shows when columns are converted is found by halving the batch, so one bad message costs a few conversions and never
its neighbours.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from features.dataset import Events, Items
from features.error import DatasetError, EventError
from features.source import Table
from features.table import shape_events, shape_items

MAX_BYTES = 1 << 20
_SCALAR = str | int | float | bool
_MESSAGE = Path("message")


class Decoder:
    """Bytes to rows of one table: decoding checks that every needed field is there and of a usable type.

    Args:
        name: `events` or `items`, named in errors.
        required: columns that must be present and not null.
        optional: columns that may be missing; anything else in a message is passed over.
    """

    def __init__(self, name: str, required: Sequence[str], optional: Sequence[str]) -> None:
        self._name = name
        self._columns = (*required, *optional)
        # Positional field names, since a column may be called anything; the JSON keys are the columns' own.
        rename = {f"f{position}": column for position, column in enumerate(self._columns)}
        value = _SCALAR | list[_SCALAR] | None
        fields: list[Any] = [
            (f"f{position}", _SCALAR) if column in required else (f"f{position}", value, None)
            for position, column in enumerate(self._columns)
        ]
        kind = msgspec.defstruct(f"{name}_message", fields, rename=rename, frozen=True)
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, data: bytes) -> dict[str, Any]:
        """One message as a row.

        Raises:
            EventError: too large, not JSON, not an object, a field missing or of a wrong type; names the field.
        """
        if len(data) > MAX_BYTES:
            raise EventError(f"{self._name} message: {len(data)} bytes, at most {MAX_BYTES} are read")
        try:
            return msgspec.to_builtins(self._decoder.decode(data))  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EventError(f"{self._name} message: {error}") from error


def event_decoder(events: Events) -> Decoder:
    """Reads messages of the topic `events`: what the events' table needs."""
    keys = (events.user, events.item, events.time.column if events.time else events.order, events.label.column)
    return Decoder("events", [key for key in keys if key], [*events.categorical, *events.numeric])


def item_decoder(items: Items) -> Decoder:
    """Reads messages of the topic `items`: the id, and whatever texts, features and filters the item has."""
    optional = dict.fromkeys((*items.text, *items.categorical, *items.numeric, *items.filterable))
    return Decoder("items", [items.id], [name for name in optional if name != items.id])


def event_rows(rows: Sequence[dict[str, Any]], events: Events) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded event messages.

    Returns:
        The frame of `features.table.read_events`, its categorical columns all lists; `event` is the position in `rows`.
        A row whose label is neither positive nor negative is left out. And by position the reason of each row that
        cannot be used.
    """

    def shape(table: Table) -> pl.DataFrame:
        return _conform(shape_events(table, events)[0], dict.fromkeys(events.categorical, pl.List(pl.String)))

    return _shape(rows, "events", shape)


def item_rows(
    rows: Sequence[dict[str, Any]], items: Items, types: Mapping[str, pl.DataType]
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded item messages: the frame of `read_items` with `message_row`, the position in `rows`; and the bad.

    An id that comes twice is kept twice, in order. Columns get the types that the catalogue has; a value that does not
    fit makes its message a bad one.
    """

    def shape(table: Table) -> pl.DataFrame:
        # One by one: an id may come again, which the files' check for duplicates would refuse.
        shaped = [shape_items(_table("items", table.frame[row]), items) for row in range(table.frame.height)]
        return pl.concat([_conform(row, types) for row in shaped]).with_row_index("message_row")

    return _shape(rows, "items", shape)


def _shape(
    rows: Sequence[dict[str, Any]], name: str, shape: Callable[[Table], pl.DataFrame]
) -> tuple[pl.DataFrame, dict[int, str]]:
    good: list[pl.DataFrame] = []
    bad: dict[int, str] = {}
    pending = [(0, len(rows))] if rows else []
    while pending:
        start, stop = pending.pop()
        try:
            frame = pl.DataFrame(list(rows[start:stop]), infer_schema_length=None, strict=True)
            shaped = shape(_table(name, frame))
        except (DatasetError, pl.exceptions.PolarsError, TypeError, OverflowError) as error:
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
        if isinstance(dtype, pl.List) and not isinstance(frame.schema[name], pl.List):
            text = frame[name].cast(dtype.inner)
            frame = frame.with_columns(pl.Series(name, [None if v is None else [v] for v in text], dtype=dtype))
        frame = frame.with_columns(frame[name].cast(dtype, strict=True))
    return frame


def _table(name: str, frame: pl.DataFrame) -> Table:
    return Table(name, frame, tuple(frame.columns), (_MESSAGE,), (frame.height,))
