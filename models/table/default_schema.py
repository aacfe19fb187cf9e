"""The default schema of a dataset, derived from the profile of its frame without tuning."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.errors import BundleError
from features.frame import Frame
from features.history import DEFAULT_LENGTH
from models.table.batch import log_scaled
from models.table.placement import MOST_POSITIONS, PlacementColumn, place_numbers
from models.table.schema import SEMANTIC_ID, Feature, Numeric, Schema, Source

_WIDE_FROM = 1_000
_EXACT_UP_TO = 8
_MOST_CHUNKS = 16
_MIN_ROWS = 1_024
_FLAT = 1e-6
Pooling = Literal["auto", "mean", "attention"]
_OWN_NAMES = ("user_id", "item_id", SEMANTIC_ID)


@dataclass(frozen=True)
class TableOptions:
    """Options of the table that an operator may set; the rest follows from the data.

    Attributes:
        dim: D.
        budget: Bytes of the rows' weights, R · D · 4; None for one row per distinct value.
        chunks: Lookups by feature, instead of one, or two for a feature of many values.
        exact: Features whose values share no rows; None for features of at most eight values.
        admission: Sightings after which a hashed value reads rows; 0 admits every value.
        history: Pooling of a user's history. `auto` is the mean here; a run takes `attention` for a network that reads
            the history as a sequence.
        content: True if the network reads the item's content vector; None: true if there is one.
    """

    dim: int = 16
    budget: int | None = None
    chunks: Mapping[str, int] = field(default_factory=dict)
    exact: tuple[str, ...] | None = None
    admission: int = 2
    history: Pooling = "auto"
    content: bool | None = None


def default_schema(
    dataset: Dataset, frame: Frame, options: TableOptions = TableOptions(), *, history_length: int = DEFAULT_LENGTH
) -> Schema:
    """Returns all declared features and ids, as the profile of the frame suggests and the options say.

    Item columns and Semantic IDs are read for the item at hand and for the user's history, from the same rows.

    Raises:
        BundleError: An option names no feature, or the budget does not hold the exact features.
    """
    read: list[Feature] = []
    vocabularies: dict[str, list[str]] = {}

    def add(of: Source, column: str, tables: Iterable[pl.DataFrame]) -> None:
        name = column if column in _OWN_NAMES else f"{of}.{column}"
        vocabularies[name] = distinct_values(table[column] for table in tables)
        read.append(Feature(name, of, column, name, 1, "sum" if column == SEMANTIC_ID else "mean"))

    if dataset.events.user:
        for column in ("user_id", *(dataset.users.categorical_features if dataset.users else ())):
            add("user", column, [frame.users])
    if dataset.events.item:
        semantic = [SEMANTIC_ID] if SEMANTIC_ID in frame.items.columns else []
        for column in ("item_id", *(dataset.items.categorical_features if dataset.items else ()), *semantic):
            add("item", column, [frame.items])
    for column in dataset.events.categorical_features:
        add("event", column, frame.all_blocks().frames(column))
    _check_names(options, vocabularies)
    shaped = [_shaped(feature, vocabularies[feature.name], options) for feature in read]
    with_history = [feature for feature in shaped if feature.of != "event"]
    if dataset.events.user and dataset.events.item:
        past = [replace(f, name=f"history.{f.name}", of="history") for f in shaped if f.of == "item"]
        # A mean over many items needs no width to separate values; attention compares the candidate with past items.
        one = {"pooling": "attention"} if options.history == "attention" else {"pooling": "mean", "chunks": 1}
        with_history += [replace(feature, **one) for feature in past]
    values = sum(len(found) for found in vocabularies.values())
    rows = max(_MIN_ROWS, 64 * math.ceil(values / 64))
    return Schema(
        features=(*with_history, *(feature for feature in shaped if feature.of == "event")),
        numeric=numeric_features(dataset, frame),
        rows=rows if options.budget is None else options.budget // (4 * options.dim),
        dim=options.dim,
        history_length=history_length,
        admission=options.admission,
        content=content_width(frame, options.content),
        aggregates=frame.aggregates,
        placement=placement_columns(dataset, frame),
    )


def placement_columns(dataset: Dataset, frame: Frame) -> tuple[PlacementColumn, ...]:
    """Returns the columns of the position path, with the positions of training and the words of all parts."""
    declared = dataset.events.placement
    if declared is None:
        return ()
    found: list[PlacementColumn] = []
    for name in declared.columns:
        if name == declared.position:
            most = [block[name].max() for block in frame.blocks("train").frames(name)]
            last = max((int(one) for one in most if one is not None), default=0)  # type: ignore[arg-type]
            found.append(PlacementColumn(name, positions=min(last + 1, MOST_POSITIONS)))
        else:
            words = tuple(distinct_values(block[name] for block in frame.all_blocks().frames(name)))
            found.append(PlacementColumn(name, vocabulary=words))
    return tuple(found)


def places_of(dataset: Dataset, frame: Frame, part: str) -> NDArray[np.int64] | None:
    """Returns the number (N,) of the place of each example of a part; None if the dataset has no placement."""
    columns = placement_columns(dataset, frame)
    return place_numbers(columns, frame.blocks(part).whole(*(one.column for one in columns))) if columns else None


def hashed_id_schema(schema: Schema) -> Schema:
    """Returns the hashed-id baseline at the same budget: one lookup a feature, an item known by its hashed id alone."""
    kept = [feature for feature in schema.features if not (_is_item_feature(feature) and feature.column != "item_id")]
    single = tuple(Feature(f.name, f.of, f.column, f.salt) for f in kept)
    numeric = tuple(numeric for numeric in schema.numeric if numeric.of not in ("item", "aggregate"))
    return Schema(single, numeric, schema.rows, schema.dim, schema.history_length, placement=schema.placement)


def _shaped(feature: Feature, vocabulary: Sequence[str], options: TableOptions) -> Feature:
    exact = options.exact
    chosen = len(vocabulary) <= _EXACT_UP_TO if exact is None else feature.name in exact
    chunks = options.chunks.get(feature.name, 2 if len(vocabulary) >= _WIDE_FROM else 1)
    return replace(feature, chunks=chunks, vocabulary=tuple(vocabulary) if chosen else ())


def _check_names(options: TableOptions, known: Mapping[str, Any]) -> None:
    for option, names in (("chunks", options.chunks), ("exact", options.exact or ())):
        for name in names:
            if name not in known:
                raise BundleError(f"{option}: there is no feature {name!r}; the features are {', '.join(known)}")
    for name, count in options.chunks.items():
        if not 1 <= count <= _MOST_CHUNKS:
            raise BundleError(f"chunks: {name}: expected 1 to {_MOST_CHUNKS} lookups, got {count}")


def content_width(frame: Frame, wanted: bool | None) -> int:
    """Returns the width of the items' content vectors, 0 if the items have none or they are not wanted.

    Raises:
        BundleError: They are wanted and the items have none.
    """
    has = "content_vector" in frame.items.columns
    if wanted and not has:
        raise BundleError("content: the items have no content vectors; declare [items] text, or leave content out")
    if not has or wanted is False:
        return 0
    return int(frame.items.schema["content_vector"].shape[0])  # type: ignore[attr-defined]


def _is_item_feature(feature: Feature) -> bool:
    return feature.of in ("item", "history")


def distinct_values(columns: Iterable[pl.Series]) -> list[str]:
    """Returns the distinct values of a column, sorted, given block by block."""
    found = pl.Series([], dtype=pl.String)
    for column in columns:
        flat = column.explode(empty_as_null=False) if column.dtype == pl.List else column
        found = pl.concat([found, flat.drop_nulls().unique().cast(pl.String)]).unique()
    return list(found.sort())


def numeric_features(dataset: Dataset, frame: Frame) -> tuple[Numeric, ...]:
    """Returns the numeric features: declared columns with mean and deviation, history's length, and aggregates."""
    train = frame.blocks("train")
    found: list[Numeric] = []
    sources: tuple[tuple[Source, tuple[str, ...], Callable[[str], Iterable[pl.DataFrame]]], ...] = (
        ("user", dataset.users.numeric_features if dataset.users else (), lambda column: [frame.users]),
        ("item", dataset.items.numeric_features if dataset.items else (), lambda column: [frame.items]),
        ("event", dataset.events.numeric_features, train.frames),
    )
    for of, columns, tables in sources:
        for column in columns:
            values = (table[column].cast(pl.Float64).drop_nulls().to_numpy() for table in tables(column))
            found.append(Numeric(f"{of}.{column}", of, column, *_scale(map(log_scaled, values))))
    if dataset.events.user and dataset.events.item:
        lengths = (block["history"].list.len().to_numpy() for block in train.frames("history"))
        mean, _ = mean_and_deviation(map(log_scaled, lengths))
        found.append(Numeric("history.length", "history", "history", mean, 1.0))
    for column in frame.aggregates.columns:
        values = (block[column].fill_nan(None).drop_nulls().to_numpy() for block in train.frames(column))
        found.append(Numeric(column, "aggregate", column, *_scale(values)))
    return tuple(found)


def _scale(blocks: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    mean, std = mean_and_deviation(blocks)
    # A column of one value carries no information, and must stay small when another value comes.
    return mean, std if std > _FLAT else 1.0


def mean_and_deviation(blocks: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Returns the mean and the standard deviation of values that come in blocks; 0 and 1 without values.

    Counts, means and sums of squared distances are merged in order of the blocks (Chan, Golub & LeVeque, 1979). Of one
    block the result has the bits of numpy's.
    """
    count, mean, std = 0, 0.0, 1.0
    for values in blocks:
        if not len(values):
            continue
        own, own_mean, own_std = len(values), float(values.mean()), float(values.std())
        if not count:
            count, mean, std = own, own_mean, own_std
            continue
        total, apart = count + own, own_mean - mean
        squares = count * std**2 + own * own_std**2 + apart**2 * count * own / total
        count, mean, std = total, mean + apart * own / total, math.sqrt(squares / total)
    return mean, std
