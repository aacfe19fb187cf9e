"""Embeddings by feature value, for rankers that run elsewhere: the same rows by the same hash contract.

Shape letters: B values, c lookups of the feature, D dimension of the table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from features.column import canonical
from features.error import EventError
from models.admission import Admission
from models.schema import Feature, Schema
from models.values import ColumnValues
from serving.rows import RowReader
from serving.store import Float32

Value = str | int | float | bool | None


class EmbeddingClient:
    """Looks values up in one bundle's table.

    Args:
        schema: of the bundle.
        admission: which values read rows; shared with whoever takes new admissions in.
        rows: where rows are read.
    """

    def __init__(self, schema: Schema, admission: Admission, rows: RowReader) -> None:
        self._schema = schema
        self._admission = admission
        self._rows = rows
        self._features = {feature.name: feature for feature in schema.features}

    def width(self, feature: str) -> int:
        """Numbers of a value's embedding: c times D.

        Raises:
            EventError: the bundle has no such feature.
        """
        return self._feature(feature).chunks * self._schema.dim

    def lookup(self, feature: str, values: Sequence[Value | Sequence[Value]]) -> Float32:
        """Embeddings of values, of several values pooled as the feature pools them: (B, c · D) float32.

        A value that is missing, not admitted yet, or unknown to an exact feature, is zero, as it is in the ranker. A
        feature that the network weighs by the candidate has no embedding of its own; its values are averaged.

        Raises:
            EventError: the bundle has no such feature, or values are of mixed or wrong types.
            StoreError: the store does not answer.
        """
        found = self._feature(feature)
        try:
            column = canonical(pl.Series("values", _even(values), strict=True))
        except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
            raise EventError(f"values: expected values of one type, or lists of them: {error}") from error
        looked_up = ColumnValues(column, self._schema, found, self._admission)
        rows, lengths = looked_up.rows(np.arange(len(column)))
        distinct, place = np.unique(rows, return_inverse=True)
        width = self.width(feature)
        vectors = self._rows.read_rows(distinct)[place.reshape(-1)].reshape(len(rows), width)
        pooled = np.zeros((len(column), width), dtype=np.float32)
        np.add.at(pooled, np.repeat(np.arange(len(column)), lengths), vectors)
        if found.pooling != "sum":
            pooled /= np.maximum(lengths, 1).astype(np.float32)[:, None]
        return pooled

    def _feature(self, name: str) -> Feature:
        if name not in self._features:
            raise EventError(f"feature {name!r} is unknown; the bundle has {', '.join(self._features)}")
        return self._features[name]


def _even(values: Sequence[Value | Sequence[Value]]) -> list[Any]:
    """Values as they are, or all of them as lists where one is."""
    if not any(isinstance(value, (list, tuple)) for value in values):
        return list(values)
    return [list(v) if isinstance(v, (list, tuple)) else [] if v is None else [v] for v in values]
