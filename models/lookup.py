"""From values to table rows, once per entity: users and items as lists of rows, ready to be gathered into batches.

Shape letters: N entities, n values in all, c chunks, K lookups, B batch, V rows read by a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.hashing import HashSpec, fingerprint
from features.history import Jagged
from models.schema import Feature, Schema, Source

# A value far beyond what training saw must not drown all others.
_MOST_STDS = 10.0

Scalar = TypeVar("Scalar", bound=np.generic)


class Growable(Generic[Scalar]):
    """A numpy array that is appended to along its first axis, at amortised constant cost."""

    def __init__(self, start: NDArray[Scalar]) -> None:
        self._buffer = start
        self._size = len(start)

    @property
    def array(self) -> NDArray[Scalar]:
        return self._buffer[: self._size]

    def extend(self, more: NDArray[Scalar]) -> None:
        needed = self._size + len(more)
        if needed > len(self._buffer):
            grown = np.zeros((max(needed, 2 * len(self._buffer)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            grown[: self._size] = self.array
            self._buffer = grown
        self._buffer[self._size : needed] = more
        self._size = needed


class ValueRows:
    """Rows of one column: entity i reads `rows[offsets[i]:offsets[i + 1]]`, (values, c) int64."""

    def __init__(self, rows: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
        self._rows = Growable(rows)
        self._offsets = Growable(offsets)

    def take(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gathers entities (M,): their rows (n, c) and their value counts (M,)."""
        offsets = self._offsets.array
        starts, lengths = offsets[index], offsets[index + 1] - offsets[index]
        if lengths.size and lengths.min() == lengths.max() == 1:
            return self._rows.array[starts], lengths
        ends = np.cumsum(lengths)
        positions = np.repeat(starts - ends + lengths, lengths) + np.arange(int(lengths.sum()))
        return self._rows.array[positions], lengths

    def extend(self, more: "ValueRows") -> None:
        """Appends the entities of `more`."""
        last = self._offsets.array[-1]
        self._rows.extend(more._rows.array)
        self._offsets.extend(more._offsets.array[1:] + last)


def value_rows(column: pl.Series, spec: HashSpec, *, salt: str, chunks: int) -> ValueRows:
    """Looks up a column of strings, or lists of strings, (N,); null and empty lists read no row.

    Each distinct value is hashed once.
    """
    if column.dtype == pl.List:
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = column.filter(column.list.len().fill_null(0) > 0).explode()
    else:
        lengths = column.is_not_null().to_numpy().astype(np.int64)
        flat = column.drop_nulls()
    distinct = flat.unique(maintain_order=True)
    codes = flat.cast(pl.Enum(distinct)).to_physical().to_numpy() if len(flat) else np.zeros(0, dtype=np.int64)
    rows = spec.lookup(salt, chunks, fingerprint(distinct.to_list()))[codes]
    return ValueRows(rows, np.concatenate([[0], np.cumsum(lengths)]))


def log_scaled(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """`sign(x) * log1p(|x|)`, NaN kept: tames counts and prices of any size."""
    wide = values.astype(np.float64)
    return (np.sign(wide) * np.log1p(np.abs(wide))).astype(np.float32)


class Entities:
    """Users, items or events: per column the rows they read, and their scaled numeric features.

    Args:
        schema: which columns matter.
        of: whose columns they are.
        frame: one row an entity; columns as the schema names them.
    """

    def __init__(self, schema: Schema, of: Source, frame: pl.DataFrame) -> None:
        assert of != "history"
        self._schema = schema
        self._of: Source = of
        self._columns = schema.columns(of)
        self._numeric_features = [numeric for numeric in schema.numeric if numeric.of == of]
        self._rows = {
            name: value_rows(frame[name], schema.hash_spec, salt=feature.salt, chunks=feature.chunks)
            for name, feature in self._columns.items()
        }
        self._numeric = Growable(self._scaled(frame))
        # Where each entity's current version lies; an update appends a version and points here.
        self._at = Growable(np.arange(frame.height, dtype=np.int64))

    @property
    def size(self) -> int:
        """N, the number of entities."""
        return len(self._at.array)

    def rows(self, column: str, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gathers a column of entities (M,): the rows of their values (n, c) and their value counts (M,)."""
        return self._rows[column].take(self._at.array[index])

    def numeric(self, name: str, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """(M,) float32 of one numeric feature, standardised, missing values 0."""
        position = [feature.name for feature in self._numeric_features].index(name)
        found: NDArray[np.float32] = self._numeric.array[self._at.array[index], position]
        return found

    def append(self, frame: pl.DataFrame) -> None:
        """Adds entities after the last one."""
        versions = len(self._numeric.array)
        self._add_versions(frame)
        self._at.extend(np.arange(versions, versions + frame.height, dtype=np.int64))

    def replace(self, index: NDArray[np.int64], frame: pl.DataFrame) -> None:
        """Gives the entities `index` (M,) new values; of an entity that stands there twice the last ones count."""
        versions = len(self._numeric.array)
        self._add_versions(frame)
        self._at.array[index] = np.arange(versions, versions + frame.height, dtype=np.int64)

    def _add_versions(self, frame: pl.DataFrame) -> None:
        more = Entities(self._schema, self._of, frame)
        for name, rows in more._rows.items():
            self._rows[name].extend(rows)
        self._numeric.extend(more._numeric.array)

    def _scaled(self, frame: pl.DataFrame) -> NDArray[np.float32]:
        out = np.zeros((frame.height, len(self._numeric_features)), dtype=np.float32)
        for position, numeric in enumerate(self._numeric_features):
            values = log_scaled(frame[numeric.column].cast(pl.Float64).fill_null(np.nan).to_numpy())
            scaled = np.clip((values - numeric.mean) / numeric.std, -_MOST_STDS, _MOST_STDS)
            out[:, position] = np.where(np.isfinite(values), scaled, 0.0)
        return out


@dataclass(frozen=True)
class Batch:
    """What the table and the network read for B examples.

    Attributes:
        values: (V,) int64 rows, lookup-major: all of lookup 0's, then all of lookup 1's, …
        lengths: (K · B,) int64 values per lookup and example, in the same order.
        scale: (B, K) float32, 1 / count where a feature is pooled by its mean.
        numeric: (B, numeric features) float32.
        labels: (B,) float32 in {0, 1}, or empty when unknown.
    """

    values: Tensor
    lengths: Tensor
    scale: Tensor
    numeric: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class Examples:
    """Aligned columns (B,) that, with the entities, make a batch.

    Attributes:
        user: int64 index into users; item: int64 index into items.
        history: item indices per example.
        labels: (B,) float32, may be empty.
        context: index (B,) into the events' entities.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    history: Jagged
    labels: NDArray[np.float32]
    context: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Examples":
        """The examples at `index`, in that order."""
        labels = self.labels[index] if self.labels.size else self.labels
        return Examples(self.user[index], self.item[index], self.history.take(index), labels, self.context[index])

    def __len__(self) -> int:
        return len(self.user)


class Assembler:
    """Gathers batches: the only way, offline, in the stream and in serving, from examples to table rows.

    Args:
        schema: the ranker's input.
        users, items, events: the entities that examples point into.
    """

    def __init__(self, schema: Schema, users: Entities, items: Entities, events: Entities) -> None:
        self.schema = schema
        self.users = users
        self.items = items
        self.events = events

    def batch(self, examples: Examples, features: Sequence[Feature] | None = None) -> Batch:
        """Returns the batch of B examples.

        Args:
            examples: what to gather.
            features: the lookups to make, all of the schema's by default; serving makes a user's once for all items.
        """
        values: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        scales: list[NDArray[np.float32]] = []
        one = np.ones(len(examples), dtype=np.float32)
        for feature in self.schema.features if features is None else features:
            rows, count = self._rows(feature.of, feature.column, examples)
            values.append(rows[:, : feature.chunks].T.ravel())
            lengths.extend([count] * feature.chunks)
            scale = (1.0 / np.maximum(count, 1)).astype(np.float32) if feature.pooling == "mean" else one
            scales.extend([scale] * feature.chunks)
        return Batch(
            values=torch.from_numpy(np.concatenate(values) if values else np.zeros(0, dtype=np.int64)),
            lengths=torch.from_numpy(np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)),
            scale=torch.from_numpy(np.stack(scales, axis=1) if scales else np.zeros((len(examples), 0), np.float32)),
            numeric=torch.from_numpy(self.numeric(examples)),
            labels=torch.from_numpy(examples.labels),
        )

    def _rows(self, of: Source, column: str, examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if of == "user":
            return self.users.rows(column, examples.user)
        if of == "item":
            return self.items.rows(column, examples.item)
        if of == "event":
            return self.events.rows(column, examples.context)
        rows, counts = self.items.rows(column, examples.history.values)
        ends = np.concatenate([[0], np.cumsum(counts)])[examples.history.offsets]
        return rows, ends[1:] - ends[:-1]

    def numeric(self, examples: Examples) -> NDArray[np.float32]:
        """The numeric features of B examples, (B, numeric features) float32."""
        sources = {
            "user": (self.users, examples.user),
            "item": (self.items, examples.item),
            "event": (self.events, examples.context),
        }
        out = np.zeros((len(examples), len(self.schema.numeric)), dtype=np.float32)
        for position, numeric in enumerate(self.schema.numeric):
            if numeric.of == "history":
                count = np.diff(examples.history.offsets)
                out[:, position] = (log_scaled(count) - numeric.mean) / numeric.std
            else:
                entities, index = sources[numeric.of]
                out[:, position] = entities.numeric(numeric.name, index)
        return out
