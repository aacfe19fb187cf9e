"""The default schema of a dataset: what the profile of its frame suggests, before anybody tunes."""

import math

import numpy as np
import polars as pl

from features.dataset import Dataset
from features.frame import Frame
from models.lookup import log_scaled
from models.schema import SEMANTIC_ID, Feature, Numeric, Schema, Source

_WIDE_FROM = 1_000
_MIN_ROWS = 1_024
_FLAT = 1e-6
_OWN_NAMES = ("user_id", "item_id", SEMANTIC_ID)


def default_schema(dataset: Dataset, frame: Frame, *, dim: int = 16, history_length: int = 20) -> Schema:
    """All declared features and ids; two lookups for columns of many values; rows for every value there is.

    Item columns and Semantic IDs are read for the item at hand and, by their mean, for the user's history, from the
    same rows.
    """
    features: list[Feature] = []
    cardinalities: dict[str, int] = {}

    def add(of: Source, column: str, table: pl.DataFrame) -> Feature:
        name = column if column in _OWN_NAMES else f"{of}.{column}"
        cardinalities[name] = _cardinality(table[column])
        chunks = 2 if cardinalities[name] >= _WIDE_FROM else 1
        features.append(Feature(name, of, column, name, chunks, "sum" if column == SEMANTIC_ID else "mean"))
        return features[-1]

    if dataset.events.user:
        for column in ("user_id", *(dataset.users.categorical if dataset.users else ())):
            add("user", column, frame.users)
    if dataset.events.item:
        columns = ["item_id", *(dataset.items.categorical if dataset.items else ())]
        columns += [SEMANTIC_ID] if SEMANTIC_ID in frame.items.columns else []
        read = [add("item", column, frame.items) for column in columns]
        if dataset.events.user:
            features += [Feature(f"history.{item.name}", "history", item.column, item.salt) for item in read]
    for column in dataset.events.categorical:
        add("event", column, frame.examples)
    return Schema(
        features=tuple(features),
        numeric=numeric_features(dataset, frame),
        rows=max(_MIN_ROWS, 64 * math.ceil(sum(cardinalities.values()) / 64)),
        dim=dim,
        history_length=history_length,
    )


def hashed_id_schema(schema: Schema) -> Schema:
    """The hashed-id baseline at the same budget: one lookup a feature, an item known by its hashed id alone."""
    kept = [feature for feature in schema.features if not (_is_item_feature(feature) and feature.column != "item_id")]
    single = tuple(Feature(f.name, f.of, f.column, f.salt, 1, f.pooling) for f in kept)
    numeric = tuple(numeric for numeric in schema.numeric if numeric.of != "item")
    return Schema(single, numeric, schema.rows, schema.dim, schema.history_length)


def _is_item_feature(feature: Feature) -> bool:
    return feature.of in ("item", "history")


def _cardinality(column: pl.Series) -> int:
    flat = column.explode(empty_as_null=False) if column.dtype == pl.List else column
    return int(flat.drop_nulls().n_unique())


def numeric_features(dataset: Dataset, frame: Frame) -> tuple[Numeric, ...]:
    """The declared numeric columns with mean and deviation over their tables, and the length of the history."""
    train = frame.part("train")
    found: list[Numeric] = []
    sources: tuple[tuple[Source, tuple[str, ...], pl.DataFrame], ...] = (
        ("user", dataset.users.numeric if dataset.users else (), frame.users),
        ("item", dataset.items.numeric if dataset.items else (), frame.items),
        ("event", dataset.events.numeric, train),
    )
    for of, columns, table in sources:
        for column in columns:
            values = log_scaled(table[column].cast(pl.Float64).drop_nulls().to_numpy())
            mean, std = (float(values.mean()), float(values.std())) if len(values) else (0.0, 1.0)
            # A column of one value says nothing, and must not shout when another value comes.
            found.append(Numeric(f"{of}.{column}", of, column, mean, std if std > _FLAT else 1.0))
    if dataset.events.user and dataset.events.item:
        lengths = log_scaled(train["history"].list.len().to_numpy())
        found.append(Numeric("history.length", "history", "history", float(np.mean(lengths)), 1.0))
    return tuple(found)
