"""Messages on the wire: a row of the dataset's own tables as one JSON object.

A team sends what its files hold, under the same column names. So the descriptor that shaped the training frame shapes
the stream too, with the same ids, times, labels and features. Types are checked as JSON is decoded. Each value gets its
canonical form before there is a column, so it never depends on its neighbours. A fault that appears only when columns
are converted is found by halving the batch, so one bad message costs a few conversions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from features.dataset.descriptor import Events, Items
from features.dataset.files import SourceTable
from features.dataset.source import TableSource
from features.dataset.tables import features, shape_events, shape_items
from features.errors import DatasetError, EventError
from features.value.attribute import fit, listed, typed
from features.value.canonical import VERSION, canonical_values, cell
from features.value.mixed_column import column_of

MAX_BYTES = 1 << 20
WIRE_VERSION = 1
_SCALAR = str | int | float | bool
_MISFITS = (DatasetError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError)
_MESSAGE = Path("message")
# Deltas and snapshots hold integers in 64 bits: a larger number is refused here, with the message that holds it.
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_EVENT_IDS = range(-(2**63), 2**64)
# Fields of a message about itself, beside the columns: name on the wire, type, default.
_ENVELOPE: tuple[tuple[str, Any, Any], ...] = (
    ("_schema", _Int64, WIRE_VERSION),
    ("_event_id", str | int | None, None),
    ("_version", _Int64 | None, None),
    ("_deleted", bool, False),
    ("_backfill", bool, False),
)


class Decoded(NamedTuple):
    """Message as a row of its table, with the fields it has about itself.

    Attributes:
        row: Values in the order of `Decoder.columns`.
        event_id: Of two events with one id, the first counts; None: never a duplicate.
        version: Version of an item. The highest counts; without versions, the last message counts.
        deleted: True if the item is deleted.
        backfill: True if the event is old on purpose, and so never late.
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
    """Decoder of bytes to rows of one table. It checks that every needed field is present and of a usable type.

    Args:
        name: `events` or `items`, named in errors.
        required: Columns that must be present and not null.
        optional: Columns that may be missing. All other fields of a message are ignored.
        vectors: Optional columns that hold lists of numbers.
    """

    def __init__(
        self, name: str, required: Sequence[str], optional: Sequence[str], vectors: Sequence[str] = ()
    ) -> None:
        self._name = name
        self.columns = (*required, *optional)
        # Field names are positional, since a column may have any name; the JSON keys are the names of the columns.
        rename = {f"f{position}": column for position, column in enumerate(self.columns)}
        rename |= {f"e{position}": name for position, (name, _, _) in enumerate(_ENVELOPE)}
        value = _SCALAR | list[_SCALAR | None] | None
        kinds = dict.fromkeys(optional, value) | dict.fromkeys(vectors, list[float] | None)
        fields: list[Any] = [
            (f"f{position}", _SCALAR) if column in required else (f"f{position}", kinds[column], None)
            for position, column in enumerate(self.columns)
        ]
        fields += [(f"e{position}", kind, default) for position, (_, kind, default) in enumerate(_ENVELOPE)]
        kind = msgspec.defstruct(f"{name}_message", fields, rename=rename, frozen=True)
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, data: bytes) -> Decoded:
        """Decodes one message as a row.

        Raises:
            EventError: The message is too large, not JSON, not an object, or lacks a field or has a wrong type in it.
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
        if isinstance(event_id, int) and event_id not in _EVENT_IDS:
            raise EventError(f"{self._name} message: _event_id of more than 64 bits; send longer ids as text")
        return Decoded(tuple(row), event_id, version, deleted, backfill)


def event_decoder(events: Events) -> Decoder:
    """Returns a decoder of the topic `events`: the columns that the events table needs."""
    keys = (events.user, events.item, events.time.column if events.time else events.order, events.label.column)
    return Decoder("events", [key for key in keys if key], [*events.categorical, *events.numeric, *events.read])


def item_decoder(items: Items) -> Decoder:
    """Returns a decoder of the topic `items`: the id, and all texts, vectors, features and filters the item has."""
    vectors = [given.column for given in items.vectors.values()]
    declared = (*items.text, *items.categorical, *items.numeric, *items.read, *items.attributes)
    optional = dict.fromkeys((*declared, *vectors, *items.vector_columns))
    return Decoder("items", [items.id], [name for name in optional if name != items.id], vectors)


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
    readers |= dict.fromkeys([clock, events.label.column], form.as_is)
    many = dict.fromkeys(events.categorical, pl.List(pl.String))

    def shape(places: Sequence[int]) -> pl.DataFrame:
        return _conform(shape_events(form.table("events", rows, places, readers), events)[0], many)

    frame, bad = _shape(
        _alike(rows, exact=(clock, events.label.column, *read_times(events)), lists=events.categorical), shape
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
        value = rows.values[place][rows.columns.index(name)]
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


_Reader = Callable[[str, list[Any]], pl.Series]


class _Form(NamedTuple):
    """Readers of the values of messages. Each reader takes the name and the values of a column."""

    version: int
    of_csv: bool

    def readers(self, source: TableSource) -> "dict[str | None, _Reader]":
        """Returns the readers of a table's features and of the columns that its expressions read."""
        by_type = {"text": self.text, "number": self.number, "time": self.as_is}
        found: dict[str | None, _Reader] = dict.fromkeys(source.numeric, self.number)
        found |= dict.fromkeys(source.categorical, self.text)
        return found | {name: by_type[kind] for name, kind in source.read.items()}

    def text(self, name: str, values: list[Any]) -> pl.Series:
        """Reads canonical text, (R,) String or List(String)."""
        return canonical_values(name, values, version=self.version, of_csv=self.of_csv)

    def number(self, name: str, values: list[Any]) -> pl.Series:
        """Reads numbers, (R,) Float64; if a value is text, all of them are text."""
        if set(map(type, values)) <= {int, float, bool, type(None)}:
            return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
        return self.text(name, values)

    def as_is(self, name: str, values: list[Any]) -> pl.Series:
        """Reads values of one type in that type."""
        return column_of(name, [cell(value) if self.of_csv and type(value) is str else value for value in values])

    def vectors(self, name: str, values: list[Any]) -> pl.Series:
        """Reads vectors, (R,) List(Float64)."""
        return pl.Series(name, values, dtype=pl.List(pl.Float64))

    def attribute(self, value: Any, dtype: pl.DataType) -> Any:
        """Returns the value of a filterable column; see `features.value.attribute.fit`."""
        return fit(listed(value, dtype), dtype, of_csv=self.of_csv)

    def table(self, name: str, rows: Rows, places: Sequence[int], readers: Mapping[str | None, _Reader]) -> SourceTable:
        """Returns rows as a table; a column without a reader is left out."""
        columns = zip(rows.columns, zip(*[rows.values[place] for place in places], strict=True), strict=True)
        frame = pl.DataFrame([readers[column](column, list(values)) for column, values in columns if column in readers])
        return SourceTable(name, frame, tuple(frame.columns), (_MESSAGE,), (frame.height,), version=self.version)


def read_times(source: TableSource) -> list[str]:
    """Returns the columns of times that only expressions read."""
    return [name for name, kind in source.read.items() if kind == "time"]


def _alike(rows: Rows, *, exact: Sequence[str | None] = (), lists: Iterable[str] = ()) -> list[list[int]]:
    """Groups the positions of rows that can share columns.

    In a group, values of the `exact` columns have one type, where null counts as text. Values of the `lists` columns
    are all lists or none.

    Rules and clocks read text and numbers differently, and a column holds lists or scalars.
    """
    kinds = {type(None): str}
    chosen = [rows.columns.index(name) for name in exact if name is not None]
    listed_in = [rows.columns.index(name) for name in lists]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows.values):
        key = (
            *(kinds.get(type(row[number]), type(row[number])) for number in chosen),
            *(type(row[number]) is list for number in listed_in),
        )
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _shape(
    groups: Sequence[list[int]], shape: Callable[[Sequence[int]], pl.DataFrame]
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
        lists = [None if value is None else [value] for value in values.cast(dtype.inner)]
        return pl.Series(values.name, lists, dtype=dtype)
    if isinstance(values.dtype, pl.List) and not isinstance(dtype, pl.List):
        raise DatasetError(f"column {values.name!r} holds one value, got a list: {values[0].to_list()}")
    return values.cast(dtype, strict=True)
