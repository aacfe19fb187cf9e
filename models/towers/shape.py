"""The towers' schema: their features, under names of their own, in a range of the unified table that is theirs.

The ranker and the towers are trained one after the other. A row that both read would hold what trained last, and the
stream would move it on for the ranker alone. So the towers' values share rows with one another only.
"""

import math
from collections.abc import Iterator

import polars as pl

from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from features.frame import Frame
from models.table.default_schema import content_width, distinct_values, numeric_features
from models.table.schema import SEMANTIC_ID, Feature, Schema, Source
from models.towers.config import TowerConfig

PREFIX = "towers."
ITEM, USER = f"{PREFIX}item_id", f"{PREFIX}user_id"
CODES = f"{PREFIX}{SEMANTIC_ID}"
_SIGHTINGS = 1


def tower_schema(dataset: Dataset, frame: Frame, config: TowerConfig, *, dim: int, length: int) -> Schema:
    """Returns the features of both towers: ids, Semantic IDs and declared columns.

    The rows are those of the towers' range, counted from its start. Without a budget there is one for each lookup of a
    distinct value.

    Args:
        dataset: Descriptor of the events.
        frame: Frame with items and users.
        config: Shape of the towers.
        dim: D of the table.
        length: L, the visits of a user.

    Raises:
        DatasetError: The events have no user or no item.
        TrainingError: The width does not fit `dim`.
    """
    if not (dataset.events.user and dataset.events.item):
        raise DatasetError(
            f'{dataset.source}: retrieval = "towers" learns which users like which items, and [events] names no '
            f'{"item" if dataset.events.user else "user"}; name it, or set retrieval to "off"'
        )
    config.check(dim)
    wide = config.width // dim
    features = tuple(_features(dataset, frame, wide))
    tables = {"item": frame.items, "user": frame.users}
    lookups = sum(one.chunks * len(distinct_values([tables[one.of][one.column]])) for one in features)
    return Schema(
        features=features,
        numeric=tuple(one for one in numeric_features(dataset, frame) if one.of in ("item", "user")),
        rows=max(64, 64 * math.ceil(lookups / 64)) if config.budget is None else config.budget // (4 * dim),
        dim=dim,
        history_length=length,
        admission=_SIGHTINGS,
        content=content_width(frame, None),
    )


def check_events(dataset: Dataset) -> None:
    """Raises DatasetError if the events name no user or no item."""
    if not (dataset.events.user and dataset.events.item):
        raise DatasetError(
            f'{dataset.source}: retrieval = "towers" learns which users like which items, and [events] names no '
            f'{"item" if dataset.events.user else "user"}; name it, or set retrieval to "off"'
        )


def _features(dataset: Dataset, frame: Frame, wide: int) -> Iterator[Feature]:
    yield _feature("item", "item_id", ITEM, wide)
    if SEMANTIC_ID in frame.items.columns:
        yield _feature("item", SEMANTIC_ID, CODES, wide)
    for column in dataset.items.categorical_features if dataset.items else ():
        yield _feature("item", column, f"{PREFIX}item.{column}", 1)
    yield _feature("user", "user_id", USER, wide)
    for column in dataset.users.categorical_features if dataset.users else ():
        yield _feature("user", column, f"{PREFIX}user.{column}", 1)


def _feature(of: Source, column: str, name: str, chunks: int) -> Feature:
    return Feature(name, of, column, name, chunks, "mean" if chunks == 1 else "sum")


def columns_of(schema: Schema, of: Source) -> tuple[str, ...]:
    """Returns the columns that a tower reads of items or of users, content aside."""
    own = [one.column for one in schema.of(of)] + [one.column for one in schema.numeric if one.of == of]
    return tuple(dict.fromkeys(own))


def with_columns(frame: pl.DataFrame, schema: Schema, of: Source) -> pl.DataFrame:
    """Returns the frame with a column of nulls for each column that it lacks."""
    numbers = {one.column for one in schema.numeric}
    missing = [column for column in columns_of(schema, of) if column not in frame.columns]
    types = {column: pl.Float64 if column in numbers else pl.String for column in missing}
    return frame.with_columns(pl.lit(None, dtype=dtype).alias(column) for column, dtype in types.items())
