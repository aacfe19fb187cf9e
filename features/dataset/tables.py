"""The three tables of a dataset as frames with fixed names and types.

Whatever format and types the files have, from here on an item is `item_id: String` and an event is `(event, user_id,
item_id, time, label)`. Rows keep the order of the files; the files are ordered by name.
Shape letter: R, the rows of a table.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.config import nearest
from features.content.content import FIELDS
from features.dataset import clock, column
from features.dataset.clock import Time
from features.dataset.descriptor import Dataset, Events, Items, Users
from features.dataset.files import FileSlice, SourceTable, infer, load
from features.dataset.label import TASK
from features.dataset.logs.impressions import load_impressions
from features.dataset.source import TableSource
from features.dataset.vectors.column import vector_field, with_vector_files
from features.errors import DatasetError
from features.value.attribute import moment
from features.value.crossed import stored_input
from features.value.expression import INPUT_TYPES, Input, evaluate
from features.value.field import filled, served
from features.value.forgotten import ForgottenUsers, read_forgotten
from features.value.mixed_column import wire

EVENT_ID = "_event_id"
"""Name of the column, or field of a message, that holds an event's id. Of two events with one id, only one counts."""


def read_table(source: TableSource, directory: Path, *, table: str) -> pl.DataFrame:
    """Returns all columns of a table's files, one file after another in sorted order; `infer` types those of a csv.

    Args:
        source: Location and format of the files.
        directory: Directory to which the source's path is relative.
        table: items, users or events; named in errors.

    Raises:
        DatasetError: A file is missing or cannot be read; names it, and the row if known.
    """
    found = load(source, directory, table=table)
    return found.frame if found.kind != "csv" else found.frame.select(infer(values) for values in found.frame)


def read_items(dataset: Dataset, *, fields: Sequence[str] = ()) -> pl.DataFrame | None:
    """Returns the catalogue, or None if the dataset has none.

    Args:
        dataset: Descriptor.
        fields: Columns of `[items] text`, and names of vectors, that become fields of the content too; see
            `content_fields`.

    Returns:
        (R, …): item_id String, unique; text String, the text columns joined by a line feed, "" where all are empty;
        then the categorical columns (String, or List(String) where multi-valued), the numeric ones (Float32), and
        those of filters, aspects and concepts that are not features too, as they are.

    Raises:
        DatasetError: A file, column or value cannot be used; names it, and the row if known.
    """
    table = load_items(dataset)
    return None if table is None or dataset.items is None else shape_items(table, dataset.items, fields=fields)


def read_users(dataset: Dataset) -> pl.DataFrame | None:
    """Returns the user profiles, or None if the dataset has none.

    Returns:
        (R, …): user_id String, unique; then the categorical and the numeric columns, as in `read_items`.

    Raises:
        DatasetError: A file, column or value cannot be used; names it, and the row if known.
    """
    table = load_users(dataset)
    return (
        None if table is None or dataset.users is None else remembered_users(shape_users(table, dataset.users), dataset)
    )


def read_events(dataset: Dataset) -> tuple[pl.DataFrame, int]:
    """Returns the labelled events, and how many rows were dropped because they are neither positive nor negative.

    Returns:
        (R, …): event UInt32, the row's 0-based position in the files; user_id and item_id String, each only where
        declared; time Int64, microseconds since 1970, or the order column's value, or without either the position;
        label Int8, 1 or 0; with several tasks the judged task's label, and `label.TASK` for each task, null where
        unknown; then the categorical and the numeric columns of the context, as in `read_items`, and the
        columns of the placement.
        And the number of rows dropped, so `event` may skip. Older events of forgotten users are dropped too.

    Raises:
        DatasetError: A file, column or value cannot be used; names it, and the row if known.
    """
    return remembered_events(*shape_events(load_events(dataset), dataset.events), dataset)


class DatasetTables:
    """The tables of a dataset, each read from its files once and kept until it is released.

    A run reads the items for the encoder and all tables for the frame and the profile; parsing files is the slow part.

    Args:
        dataset: Descriptor of the tables.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    @cached_property
    def raw_items(self) -> SourceTable | None:
        """The catalogue as `load_items` returns it."""
        return load_items(self._dataset)

    @cached_property
    def raw_events(self) -> SourceTable:
        """The events as `load_events` returns them."""
        return load_events(self._dataset)

    @cached_property
    def items(self) -> pl.DataFrame | None:
        """The catalogue as `read_items` returns it."""
        declared = self._dataset.items
        return None if self.raw_items is None or declared is None else shape_items(self.raw_items, declared)

    @cached_property
    def users(self) -> pl.DataFrame | None:
        """The user profiles as `read_users` returns them."""
        return read_users(self._dataset)

    @cached_property
    def events(self) -> tuple[pl.DataFrame, int]:
        """The events as `read_events` returns them."""
        return remembered_events(*shape_events(self.raw_events, self._dataset.events), self._dataset)

    def release_raw(self) -> None:
        """Frees the tables as the files hold them; the shaped tables stay."""
        for name in ("raw_items", "raw_events"):
            self.__dict__.pop(name, None)

    def release(self) -> None:
        """Frees all tables; a table that is asked for later is read again."""
        self.__dict__ = {"_dataset": self._dataset}


def load_items(dataset: Dataset, only: FileSlice | None = None) -> SourceTable | None:
    """Returns the catalogue's declared columns as the files hold them, or as a slice of a file does."""
    if dataset.items is None:
        return None
    items = dataset.items
    declared = {items.id, *items.text, *items.categorical, *items.numeric, *items.read, *items.attributes}
    many = {*items.text, *items.categorical, *items.attributes, *items.vector_columns}
    wanted = {*declared, *items.vector_columns}
    found = load(items, dataset.directory, table="items", wanted=wanted, many=many, only=only)
    return with_vector_files(found, items, dataset.directory, only)


def load_users(dataset: Dataset, only: FileSlice | None = None) -> SourceTable | None:
    """Returns the users' declared columns as the files hold them, or as a slice of a file does."""
    if dataset.users is None:
        return None
    users = dataset.users
    wanted = {users.id, *users.categorical, *users.numeric, *users.read}
    return load(users, dataset.directory, table="users", wanted=wanted, many=users.categorical, only=only)


def load_events(dataset: Dataset, only: FileSlice | None = None) -> SourceTable:
    """Returns the events' declared columns as the files hold them, or as a slice of a file does."""
    events = dataset.events
    if events.origin == "impressions":
        return load_impressions(events, dataset.directory)
    clock = events.time.column if events.time else events.order
    keys = {name for name in (events.user, events.item, clock, *events.label_columns) if name is not None}
    wanted = keys | {*events.categorical, *events.numeric, *events.read, *events.placed, EVENT_ID}
    return load(events, dataset.directory, table="events", wanted=wanted, many=events.categorical, only=only)


def message_columns(table: SourceTable, events: Events) -> pl.DataFrame:
    """Returns the events' columns (R rows) as messages carry them.

    A message then means the same as its row in the files.
    """
    read = {name for name, kind in events.read.items() if kind == "text"}
    placed = events.placement.categorical if events.placement is not None else ()
    texts = {EVENT_ID, events.user, events.item, *events.categorical, *read, *placed}
    parsed = [infer(own) if table.kind == "csv" and own.name not in texts else own for own in table.frame]
    return pl.DataFrame([wire(own) for own in parsed])


def shape_items(table: SourceTable, items: Items, *, unique: bool = True, fields: Sequence[str] = ()) -> pl.DataFrame:
    """Returns the frame of `read_items`.

    Args:
        table: The catalogue's declared columns.
        items: Descriptor of the items.
        unique: False if an id may occur more than once.
        fields: Columns of `[items] text` that become fields of the content too; see `content_fields`.
    """
    for name, field in items.named_for_meaning.items():
        if name not in table.names:
            raise DatasetError(
                f"{table.files[0]}: {field}: column '{name}' does not exist; the nearest existing column is "
                f"'{nearest(name, table.names)}' (there are: {', '.join(table.names)}); fix the name in the descriptor"
            )
    return pl.DataFrame(
        [
            (column.unique_ids if unique else column.ids)(table, items.id).alias("item_id"),
            _joined_text(table, items),
            *([content_fields(table, items, fields)] if fields else []),
            *features(table, items),
            *(column.attribute(table, name) for name in items.attributes),
        ]
    )


def shape_users(table: SourceTable, users: Users, *, unique: bool = True) -> pl.DataFrame:
    """Returns the frame of `read_users`. Without `unique`, an id may occur more than once."""
    ids = (column.unique_ids if unique else column.ids)(table, users.id)
    return pl.DataFrame([ids.alias("user_id"), *features(table, users)])


def shape_events(table: SourceTable, events: Events) -> tuple[pl.DataFrame, int]:
    """Returns the frame of `read_events`, and the number of rows it drops."""
    event = pl.Series("event", np.arange(table.frame.height, dtype=np.uint32))
    columns = [event]
    if events.user is not None:
        columns.append(column.ids(table, events.user).alias("user_id"))
    if events.item is not None:
        columns.append(column.ids(table, events.item).alias("item_id"))
    if events.time is not None:
        time = clock.times(table, events.time)
    elif events.order is not None:
        time = clock.positions(table, events.order)
    else:
        time = event.cast(pl.Int64)
    made = features(table, events, _read_times(table, events, time))
    labels = _labels(table, events)
    frame = pl.DataFrame([*columns, time.alias("time"), *labels, *made, *_placed(table, events)])
    if not frame["label"].null_count():
        return frame, 0
    labelled = frame.select(pl.any_horizontal(pl.col(one.name).is_not_null() for one in labels)).to_series()
    kept = frame[np.flatnonzero(labelled.to_numpy())]
    return kept, frame.height - kept.height


def _labels(table: SourceTable, events: Events) -> list[pl.Series]:
    """Returns the label, and with several tasks that of each task, null where it is unknown."""
    if events.tasks is None:
        return [column.labels(table, events.label).alias("label")]
    found = [column.labels(table, label).alias(f"{TASK}{name}") for name, label in events.labels.items()]
    judged = next(one for one in found if one.name == f"{TASK}{events.judge}")
    return [judged.alias("label"), *found]


def _read_times(table: SourceTable, events: Events, time: pl.Series) -> pl.Series:
    """Returns the time (R,) that expressions over the clock read.

    A server ranks at another time than it writes the impression, or as of the time of the request. Rows of impressions
    therefore hold the time that the server read.
    """
    for name in events.read_at:
        time = clock.moments(table, Time(column=name, unit="us")).cast(pl.Int64).fill_null(time)
    return time


def _placed(table: SourceTable, events: Events) -> list[pl.Series]:
    """Returns the columns of the placement: the position (R,) Int32 from 0, the others (R,) String."""
    if events.placement is None:
        return []
    found: list[pl.Series] = []
    for name in events.placed:
        if name == events.placement.position:
            found.append(column.positions_shown(table, name, least=events.first_position))
            continue
        values = column.texts(table, name)
        if isinstance(values.dtype, pl.List):
            raise table.error(name, "holds lists, but a column of the placement has one value; name another column")
        found.append(values)
    return found


def remembered_events(frame: pl.DataFrame, dropped: int, dataset: Dataset) -> tuple[pl.DataFrame, int]:
    """Returns the events (R, …) that are not of forgotten users, and the number of dropped rows.

    An event after the request to forget its user stays. Without a clock no event of the user stays.

    Args:
        frame: Frame of `shape_events`.
        dropped: Number of rows that were dropped before.
        dataset: Descriptor of the events.

    Raises:
        DatasetError: The list of forgotten users cannot be read.
    """
    users = forgotten_users(dataset)
    if not len(users):
        return frame, dropped
    times = frame["time"].to_numpy() if dataset.events.time is not None else np.zeros(frame.height, dtype=np.int64)
    gone = users.left_out(frame["user_id"], times)
    return frame.filter(pl.Series(~gone)), dropped + int(gone.sum())


def remembered_users(frame: pl.DataFrame, dataset: Dataset) -> pl.DataFrame:
    """Returns the users (R, …) who were never forgotten; see `remembered_events`."""
    gone = forgotten_users(dataset).named(frame["user_id"].to_list())
    return frame.filter(~pl.col("user_id").is_in(gone)) if gone else frame


def forgotten_users(dataset: Dataset) -> ForgottenUsers:
    """Returns the users of the list that the events name; none without a list."""
    listed = dataset.events.forgotten
    return ForgottenUsers() if listed is None else read_forgotten(dataset.directory / listed)


def features(table: SourceTable, source: Items | Users | Events, time: pl.Series | None = None) -> list[pl.Series]:
    """Returns the categorical columns, then the numeric ones, then the features that expressions make, each (R,).

    Args:
        table: Table of R rows.
        source: Declaration of the table.
        time: (R,) Int64 times of events, microseconds since 1970. None where the events have no clock.
    """
    defaults = defaults_of(source)
    categorical = [column.categories(table, name, options) for name, options in source.categorical.items()]
    declared = categorical + [column.numbers(table, name) for name in source.numeric]
    if defaults:
        declared = [filled(own, defaults.get(own.name)) for own in declared]
    return declared + derived_features(table, source, time)


def defaults_of(source: Items | Users | Events) -> dict[str, Any]:
    """Returns the default of each field of the events that has one, by name, as features read it."""
    fields = source.fields if isinstance(source, Events) else {}
    return {name: served(name, one, one.default) for name, one in fields.items() if one.default is not None}


def derived_features(
    table: SourceTable, source: Items | Users | Events, time: pl.Series | None = None
) -> list[pl.Series]:
    """Returns the features that expressions make, each (R,) String or Float32, then the columns of `crossing`.

    Features of several tables are made later, from the columns of `crossing` (`features.value.crossed`).

    Raises:
        DatasetError: A column that an expression reads has a value that cannot be used.
    """
    types = source.readable()
    names = dict.fromkeys(name.partition(".")[2] for one in source.derived for name in one.reads)
    if not names and not source.crossing:
        return []
    known: dict[str, pl.Series] = {}
    if time is not None and isinstance(source, Events) and source.time is not None:
        known[source.time.column] = time.cast(INPUT_TYPES["time"])
    defaults = defaults_of(source)
    inputs = [
        (known[name] if name in known else _input(table, name, types[name], defaults.get(name))).alias(
            f"{source.entity}.{name}"
        )
        for name in dict.fromkeys((*names, *source.crossing))
    ]
    made = evaluate(source.derived, pl.DataFrame(inputs), version=table.version) if names else []
    kept = {f"{source.entity}.{name}" for name in source.crossing}
    return made + [stored_input(own) for own in inputs if own.name in kept]


def _input(table: SourceTable, name: str, kind: Input, default: Any) -> pl.Series:
    """Returns a column as expressions read it. Several values are joined by a comma."""
    if kind == "text":
        values = column.texts(table, name)
        found = values.list.join(",") if isinstance(values.dtype, pl.List) else values
        return filled(found, default)
    if kind == "number":
        return filled(column.wide_numbers(table, name), default)
    found = clock.moments(table, Time(column=name))
    return filled(found, None if default is None else moment(default).replace(tzinfo=None))


def content_fields(table: SourceTable, items: Items, names: Sequence[str]) -> pl.Series:
    """Returns columns of `[items] text`, and vectors, as fields of the content.

    Returns:
        (R,) Struct of String, "" where a value is null; a vector as `features.value.vector` writes it.

    Raises:
        DatasetError: A name is neither a column of `[items] text` nor a name of vectors, or a vector cannot be used.
    """
    known = (*items.text, *items.vectors)
    for name in names:
        if name not in known:
            raise DatasetError(
                f"field {name!r} of the encoder is no column of [items] text, and no name of its vectors; the nearest "
                f"is {nearest(name, known)!r} (there are: {', '.join(known)})"
            )
    parts = [
        (vector_field(table, items, name) if name in items.vectors else _text(table, name)).alias(name).fill_null("")
        for name in names
    ]
    return pl.DataFrame(parts).to_struct(FIELDS)


def _text(table: SourceTable, name: str) -> pl.Series:
    """Returns a text column, (R,) String; a list is joined by a comma."""
    values = column.texts(table, name)
    return values.list.join(", ") if isinstance(values.dtype, pl.List) else values


def _joined_text(table: SourceTable, items: Items) -> pl.Series:
    """Returns the text that the encoder reads: (R,) String, columns joined by a line feed, lists by a comma."""
    parts = [_text(table, name).alias(str(index)) for index, name in enumerate(items.text)]
    if not parts:
        return pl.repeat("", table.frame.height, dtype=pl.String, eager=True).alias("text")
    filled = [pl.when(pl.col(part.name) != "").then(part.name) for part in parts]
    return (
        pl.DataFrame(parts).select(pl.concat_str(filled, separator="\n", ignore_nulls=True).alias("text")).to_series()
    )
