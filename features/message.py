"""Shapes decoded messages: rows of the dataset's own tables.

A team sends what its files hold, under the same column names. So the descriptor that shaped the training frame shapes
the stream too, with the same ids, times, labels and features. Rows of `features.wire.decoder` become columns here, and
an Arrow batch stays columns. A fault that appears only when columns are converted is found by halving the batch, so one
bad message costs a few conversions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from features.dataset.descriptor import Events, Items
from features.dataset.files import SourceTable
from features.dataset.source import TableSource
from features.dataset.tables import features, shape_events, shape_items
from features.errors import DatasetError
from features.value import canonical_v1
from features.value.attribute import fit, listed, typed
from features.value.canonical import VERSION, canonical, canonical_values, cell, cells
from features.value.mixed_column import column_of

_MISFITS = (DatasetError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError)
_MESSAGE = Path("message")


class Rows(NamedTuple):
    """Decoded rows of one table.

    Attributes:
        columns: Names of the columns.
        values: (R,) values of each row, in the order of the columns. None for a row of a batch.
        batches: Rows of a batch as columns, by the position of the first row.
    """

    columns: tuple[str, ...]
    values: list[tuple[Any, ...] | None]
    batches: Mapping[int, pl.DataFrame] = {}


def event_rows(rows: Rows, events: Events, *, version: int = VERSION) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded event messages.

    Args:
        rows: Rows decoded by `event_decoder`.
        events: Table of the rows.
        version: Version of the canonical form, from the bundle.

    Returns:
        The frame of `features.dataset.tables.read_events`, with all its categorical columns as lists; `event` is the
        position in `rows`. A row whose label is neither positive nor negative is left out. The second value maps the
        position of each unusable row to the reason.
    """
    clock = events.time.column if events.time else events.order
    form = _Form(version, events.kind == "csv")
    readers = form.readers(events) | dict.fromkeys([events.user, events.item], form.text)
    readers |= dict.fromkeys([clock, *events.label_columns], form.as_is)
    many = dict.fromkeys(events.categorical, pl.List(pl.String))

    def shape(places: Sequence[int]) -> pl.DataFrame:
        return _conform(shape_events(form.table("events", rows, places, readers), events)[0], many)

    frame, bad = _shape(
        _alike(rows, exact=(clock, *events.label_columns, *read_times(events)), lists=events.categorical), shape
    )
    if clock is None and frame.height:
        frame = frame.with_columns(time=pl.col("event").cast(pl.Int64))
    return frame, bad


def context_rows(
    values: Mapping[str, Any],
    events: Events,
    *,
    version: int = VERSION,
    at_us: int | None = None,
    candidates: Mapping[str, Sequence[Any]] | None = None,
    count: int = 1,
) -> pl.DataFrame:
    """Shapes the context of one request: rows of the events' features, null where absent.

    Args:
        values: Values by column, which all rows share: categorical, numeric, and those that expressions read.
        events: Table of the columns.
        version: Version of the canonical form, from the bundle.
        at_us: Time of the request for expressions that read the clock, microseconds since 1970.
        candidates: (n,) values of the candidates' fields, by column.
        count: Number of rows, n.

    Returns:
        (n, …) features, then the columns that features of several tables read.

    Raises:
        DatasetError, TypeError, ValueError, OverflowError: A value does not fit its column.
    """
    form = _Form(version, events.kind == "csv")
    readers, own = form.readers(events), candidates or {}
    names = (*events.categorical, *events.numeric, *events.read)
    columns = (own[name] if name in own else [values.get(name)] * count for name in names)
    frame = pl.DataFrame([readers[name](name, list(column)) for name, column in zip(names, columns, strict=True)])
    table = SourceTable("context", frame, tuple(frame.columns), (_MESSAGE,), (count,), version=version)
    time = pl.Series("time", [at_us], dtype=pl.Int64).extend_constant(at_us, count - 1)
    return pl.DataFrame(features(table, events, time))


def item_rows(
    rows: Rows,
    items: Items,
    types: Mapping[str, pl.DataType],
    *,
    version: int = VERSION,
    fields: Sequence[str] = (),
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes decoded item messages.

    An id that comes twice is kept twice, in order. Features get the types of the catalogue, and so does an attribute
    unless its value would change (see `features.value.attribute`). A message with a value that does not fit is
    unusable.

    Args:
        rows: Rows decoded by `item_decoder`.
        items: Table of the rows.
        types: Types of the catalogue's columns.
        version: Version of the canonical form, from the bundle.
        fields: Columns of `[items] text` that become fields of the content too. Vectors always do.

    Returns:
        The frame of `read_items` with `message_row`, the position in `rows`. The second value maps the position of each
        unusable row to the reason.
    """
    form = _Form(version, items.kind == "csv")
    readers = form.readers(items) | dict.fromkeys([items.id, *items.text], form.text)
    for given in items.vectors.values():
        readers[given.column] = form.vectors
        if given.space_column is not None:
            readers[given.space_column] = form.text
    fields = tuple(dict.fromkeys((*fields, *items.vectors)))
    featured = {*items.categorical_features, *items.numeric_features}
    feature_types = {name: dtype for name, dtype in types.items() if name in featured}
    attributes = items.attributes
    featuring = items.model_copy(update={"filterable": (), "aspects": {}, "concepts": None})

    def attribute(place: int, name: str) -> Any:
        row = rows.values[place]
        assert row is not None, "items come as rows"
        value = row[rows.columns.index(name)]
        try:
            return form.attribute(value, types[name]) if name in types else value
        except ValueError as error:
            raise DatasetError(f"column {name!r} holds {types[name]}: {error}") from error

    def shape(places: Sequence[int]) -> pl.DataFrame:
        for place in places:
            for name in attributes:
                attribute(place, name)
        shaped = shape_items(form.table("items", rows, places, readers), featuring, unique=False, fields=fields)
        return _conform(shaped, feature_types).with_row_index("message_row")

    frame, bad = _shape(_alike(rows, exact=read_times(items), lists=(*items.text, *items.categorical)), shape)
    if not frame.height:
        return frame, bad
    kept = {name: [attribute(place, name) for place in frame["message_row"]] for name in attributes}
    # A message's number is not cut to 32 bits.
    wide = {name: pl.Float64() if dtype == pl.Float32 else dtype for name, dtype in types.items()}
    own = [typed(name, found, wide[name]) if name in types else column_of(name, found) for name, found in kept.items()]
    return frame.with_columns(own), bad


_Reader = Callable[[str, list[Any] | pl.Series], pl.Series]


class _Form(NamedTuple):
    """Readers of the values of messages. Each reader takes the name and the values of a column."""

    version: int
    of_csv: bool

    def readers(self, source: TableSource) -> "dict[str | None, _Reader]":
        """Returns the readers of a table's features and of the columns that its expressions read."""
        by_type = {"text": self.text, "number": self.number, "time": self.as_is}
        found: dict[str | None, _Reader] = dict.fromkeys(source.numeric, self.number)
        found |= dict.fromkeys(source.categorical, self.text)
        if isinstance(source, Events) and source.placement is not None:
            found |= dict.fromkeys(source.placement.categorical, self.text)
            found |= {source.placement.position: self.number} if source.placement.position else {}
        if isinstance(source, Events):
            found |= dict.fromkeys(source.read_at, self.as_is)
        return found | {name: by_type[kind] for name, kind in source.read.items()}

    def text(self, name: str, values: list[Any] | pl.Series) -> pl.Series:
        """Reads canonical text, (R,) String or List(String)."""
        if isinstance(values, pl.Series):
            cut = self.of_csv and self.version != canonical_v1.VERSION
            if not (cut and isinstance(values.dtype, pl.List)):
                cut = cut and values.dtype == pl.String
                return canonical(cells(values) if cut else values, version=self.version)
            values = values.to_list()
        return canonical_values(name, values, version=self.version, of_csv=self.of_csv)

    def number(self, name: str, values: list[Any] | pl.Series) -> pl.Series:
        """Reads numbers, (R,) Float64; if a value is text, all of them are text."""
        if isinstance(values, pl.Series):
            return values.cast(pl.Float64)
        if set(map(type, values)) <= {int, float, bool, type(None)}:
            return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
        return self.text(name, values)

    def as_is(self, name: str, values: list[Any] | pl.Series) -> pl.Series:
        """Reads values of one type in that type."""
        if isinstance(values, pl.Series):
            return cells(values) if self.of_csv and values.dtype == pl.String else values
        if self.of_csv:
            values = [cell(value) if type(value) is str else value for value in values]
        return column_of(name, values)

    def vectors(self, name: str, values: list[Any] | pl.Series) -> pl.Series:
        """Reads vectors, (R,) List(Float64)."""
        return pl.Series(name, values, dtype=pl.List(pl.Float64))

    def attribute(self, value: Any, dtype: pl.DataType) -> Any:
        """Returns the value of a filterable column; see `features.value.attribute.fit`."""
        return fit(listed(value, dtype), dtype, of_csv=self.of_csv)

    def table(self, name: str, rows: Rows, places: Sequence[int], readers: Mapping[str | None, _Reader]) -> SourceTable:
        """Returns rows as a table; a column without a reader is left out.

        A range of places is of one batch. All other places are of rows.
        """
        if isinstance(places, range):
            start = max(first for first in rows.batches if first <= places.start)
            batch = rows.batches[start][places.start - start : places.stop - start]
            columns: Iterable[tuple[str, Any]] = [(values.name, values) for values in batch]
        else:
            whole = len(places) == len(rows.values)
            taken = rows.values if whole else [rows.values[place] for place in places]
            columns = zip(rows.columns, map(list, zip(*taken, strict=True)), strict=True)
        frame = pl.DataFrame([readers[column](column, values) for column, values in columns if column in readers])
        return SourceTable(name, frame, tuple(frame.columns), (_MESSAGE,), (frame.height,), version=self.version)


def read_times(source: TableSource) -> list[str]:
    """Returns the columns of times that only expressions read."""
    return [name for name, kind in source.read.items() if kind == "time"]


def _alike(rows: Rows, *, exact: Sequence[str | None] = (), lists: Iterable[str] = ()) -> list[Sequence[int]]:
    """Groups the positions of rows that can share columns. A batch is a group, and its positions are a range.

    In a group, values of the `exact` columns have one type, where null counts as text. Values of the `lists` columns
    are all lists or none.

    Rules and clocks read text and numbers differently, and a column holds lists or scalars.
    """
    kinds = {type(None): str}
    chosen = [rows.columns.index(name) for name in exact if name is not None]
    listed_in = [rows.columns.index(name) for name in lists]
    if rows.values and not rows.batches and _share(rows.values, chosen, listed_in):
        return [list(range(len(rows.values)))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows.values):
        if row is None:
            continue
        key = (
            *(kinds.get(type(row[number]), type(row[number])) for number in chosen),
            *(type(row[number]) is list for number in listed_in),
        )
        groups.setdefault(key, []).append(place)
    batches = [range(start, start + batch.height) for start, batch in rows.batches.items()]
    return [*groups.values(), *batches]


def _share(rows: Sequence[Any], exact: Sequence[int], lists: Sequence[int]) -> bool:
    """Returns whether all rows can share columns, from the types of whole columns."""
    columns = list(zip(*rows, strict=True))
    types = {number: set(map(type, columns[number])) for number in {*exact, *lists}}
    scalars = (types[number] | {str} if type(None) in types[number] else types[number] for number in exact)
    return all(len(held - {type(None)}) <= 1 for held in scalars) and all(
        list not in types[number] or len(types[number]) == 1 for number in lists
    )


def _shape(
    groups: Sequence[Sequence[int]], shape: Callable[[Sequence[int]], pl.DataFrame]
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Shapes groups of rows and halves a group that cannot be shaped. The first column of the frame is the position."""
    good: list[pl.DataFrame] = []
    bad: dict[int, str] = {}
    pending = list(groups)
    while pending:
        places = pending.pop()
        try:
            shaped = shape(places)
        except (*_MISFITS, pl.exceptions.PanicException) as error:
            if len(places) == 1:
                bad[places[0]] = str(error)
            else:
                middle = len(places) // 2
                pending += [places[:middle], places[middle:]]
            continue
        position = shaped.columns[0]
        own = np.array(places, dtype=np.uint32)[shaped[position].to_numpy()]
        good.append(shaped.replace_column(0, pl.Series(position, own)))
    if not good:
        return pl.DataFrame(), bad
    if len(good) == 1:
        # The rows of a group are in order.
        return good[0], bad
    return pl.concat(good, how="vertical_relaxed").sort(good[0].columns[0], maintain_order=True), bad


def _conform(frame: pl.DataFrame, types: Mapping[str, Any]) -> pl.DataFrame:
    """Converts features to their types, whatever one message holds: a lone value of a list column is a list of one."""
    wrong = [name for name, dtype in types.items() if name in frame.columns and frame.schema[name] != dtype]
    return frame.with_columns(_cast(frame[name], types[name]) for name in wrong) if wrong else frame


def _cast(values: pl.Series, dtype: Any) -> pl.Series:
    if isinstance(dtype, pl.List) and not isinstance(values.dtype, pl.List):
        # A column of lists without a loop over rows: a null value is no list of one.
        lists = values.cast(dtype.inner).reshape((-1, 1)).arr.to_list().alias(values.name)
        return (
            lists if not values.null_count() else lists.zip_with(values.is_not_null(), pl.Series([None], dtype=dtype))
        )
    if isinstance(values.dtype, pl.List) and not isinstance(dtype, pl.List):
        raise DatasetError(f"column {values.name!r} holds one value, got a list: {values[0].to_list()}")
    return values.cast(dtype, strict=True)
