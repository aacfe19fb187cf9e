"""Turns examples into batches: users and items are lists of rows, looked up once and gathered for each batch.

Shape letters: N entities, n values in all, c chunks, K lookups, B batch, V rows read by a batch, L history length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.aggregate.plan import AggregatePlan, column_of
from features.device import Device
from features.history import Jagged
from models.table.admission import Admission
from models.table.column_rows import Coded, ColumnValues, Growable
from models.table.placement import placement_cells
from models.table.schema import Feature, Numeric, Schema, Source

# Limit of a scaled value: a value far beyond those of training must not dominate all others.
_MOST_STDS = 10.0
# Rows of values (n, c), the number of a list's values with a row, and the number of all its values, which is the same
# array if every value has a row.
_Found = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
_NO_SIGHTINGS = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)


def log_scaled(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Returns `sign(x) * log1p(|x|)`, NaN kept: it compresses counts and prices of any size."""
    wide = values.astype(np.float64)
    return (np.sign(wide) * np.log1p(np.abs(wide))).astype(np.float32)


def standardised(values: NDArray[np.float32], numeric: Numeric) -> NDArray[np.float32]:
    """Returns `(values - mean) / std` within ±10, 0 for a missing value."""
    scaled = np.clip((values - numeric.mean) / numeric.std, -_MOST_STDS, _MOST_STDS)
    found: NDArray[np.float32] = np.where(np.isfinite(values), scaled, 0.0)
    return found


class Entities:
    """Users, items or events: per column the rows they read, and their scaled numeric features.

    Args:
        schema: Schema that names the columns to read.
        of: Source of the columns.
        frame: One row per entity; columns as the schema names them.
        admission: Rule that decides which values read rows.
    """

    def __init__(self, schema: Schema, of: Source, frame: pl.DataFrame, admission: Admission) -> None:
        assert of != "history"
        assert of != "aggregate"
        self._schema = schema
        self._of: Source = of
        self.admission = admission
        self._numeric_features = [numeric for numeric in schema.numeric if numeric.of == of]
        self._columns = {
            name: ColumnValues(frame[name], schema, feature, admission) for name, feature in schema.columns(of).items()
        }
        self._numeric = Growable(self._scaled(frame))
        # (N, C) cells of the position path; None for entities without a place, such as a server's request.
        self.placement = placement_cells(schema.placement, frame) if of == "event" else None

    @property
    def size(self) -> int:
        """N, the number of entities."""
        return len(self._numeric.array)

    def rows(self, column: str, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Gathers a column of entities (M,): the rows of their values (n, c) and their value counts (M,)."""
        return self._columns[column].rows(index)

    def lookup(self, column: str, index: NDArray[np.int64]) -> _Found:
        """Gathers a column of entities (M,): as `rows`, and the number of values that each holds, with rows or not."""
        return self._columns[column].lookup(index)

    def coded(self, column: str) -> Coded:
        """Returns a column of all entities as numbers of its distinct values, see `ColumnValues.coded`."""
        return self._columns[column].coded()

    def values(self, column: str) -> int:
        """Returns the number of distinct values of a column that has not changed since it was made."""
        return self._columns[column].values

    def sightings(self, column: str, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the keys of the hashed values that entities (M,) hold in a column, and how often each is held."""
        return self._columns[column].sightings(index)

    def waiting(self, column: str, index: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the part of `sightings` whose values read no row yet."""
        return self._columns[column].waiting(index)

    def keys(self, column: str, index: NDArray[np.int64]) -> Jagged:
        """Returns the keys of all values that entities (M,) hold in a column, as lists of uint64 viewed as int64."""
        keys, lengths = self._columns[column].keys(index)
        return Jagged(keys.view(np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def numeric(self, name: str, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns (M,) float32 of one numeric feature, standardised, missing values 0."""
        position = [feature.name for feature in self._numeric_features].index(name)
        found: NDArray[np.float32] = self._numeric.array[index, position]
        return found

    def admit(self, admission: Admission) -> None:
        """Replaces the admission for every value, now and from now on."""
        self.admission = admission
        for column in self._columns.values():
            column.admit(admission)

    def append(self, frame: pl.DataFrame) -> None:
        """Adds entities after the last one."""
        index = np.arange(self.size, self.size + frame.height, dtype=np.int64)
        self._numeric.extend(np.zeros((frame.height, len(self._numeric_features)), dtype=np.float32))
        self._put(index, frame)

    def replace(self, index: NDArray[np.int64], frame: pl.DataFrame) -> None:
        """Gives the entities `index` (M,) new values; if an entity occurs twice, its last values count."""
        distinct, place = np.unique(index[::-1], return_index=True)
        if len(distinct) < len(index):
            index, frame = distinct, frame[(len(index) - 1 - place).tolist()]
        self._put(index, frame)

    def _put(self, index: NDArray[np.int64], frame: pl.DataFrame) -> None:
        more = Entities(self._schema, self._of, frame, self.admission)
        for name, values in more._columns.items():
            self._columns[name].put(index, values)
        self._numeric.array[index] = more._numeric.array

    def _scaled(self, frame: pl.DataFrame) -> NDArray[np.float32]:
        out = np.zeros((frame.height, len(self._numeric_features)), dtype=np.float32)
        for position, numeric in enumerate(self._numeric_features):
            values = log_scaled(frame[numeric.column].cast(pl.Float64).fill_null(np.nan).to_numpy())
            out[:, position] = standardised(values, numeric)
        return out


@dataclass(frozen=True)
class Batch:
    """Input of the table and the network for B examples.

    Attributes:
        values: (V,) int64 rows, lookup-major: all of lookup 0, then all of lookup 1, …
        lengths: (K · B,) int64 values per lookup and example, in the same order.
        scale: (B, K) float32, 1 / count where a feature is pooled by its mean.
        numeric: (B, numeric features) float32.
        labels: (B,) float32 in {0, 1}, or empty when unknown. Of several tasks (B, T), NaN where unknown.
        visits: (B,) int64 items in each history, for attention; None if the schema has no attention.
        content: (B, width) float32 content vectors of the items; None if the network reads none.
        offsets: (B · K + 1,) int64 first place of each bag among `values`, if the bags are example by example and not
            lookup by lookup; None in a batch that `lengths` describes.
        weights: (V,) float32 weight of each value of a batch with offsets, in place of `scale`; None for all 1.
        placement: (B, C) int64 cells of the position path; None at a server, whose scores use the path's constant.
        unread: (B, F) int64 number of values without a row, by feature; None if it was not asked for.
    """

    values: Tensor
    lengths: Tensor
    scale: Tensor
    numeric: Tensor
    labels: Tensor
    visits: Tensor | None = None
    content: Tensor | None = None
    offsets: Tensor | None = None
    weights: Tensor | None = None
    placement: Tensor | None = None
    unread: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.scale)

    def to(self, device: Device) -> "Batch":
        """Returns the batch on a device."""
        if device.is_cpu:
            return self
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {name: None if part is None else device.put(part) for name, part in parts.items()}
        return Batch(**moved)


@dataclass(frozen=True)
class Examples:
    """Aligned columns (B,) that, with the entities, make a batch.

    Attributes:
        user: int64 index into users; item: int64 index into items. Examples that wait to be taken may hold uint32.
        history: item indices per example, int64 or uint32 alike.
        labels: (B,) float32, may be empty. Of several tasks the judged task's, NaN where unknown.
        context: index (B,) into the events' entities.
        aggregates: (B, A) float32 columns of the schema's plan of aggregates; None where it has none.
        tasks: (B, T) float32 labels of several tasks, NaN where unknown; None for one label.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    history: Jagged
    labels: NDArray[np.float32]
    context: NDArray[np.int64]
    aggregates: NDArray[np.float32] | None = None
    tasks: NDArray[np.float32] | None = None

    @property
    def targets(self) -> NDArray[np.float32]:
        """Labels (B,) that a ranker learns, or (B, T) of several tasks."""
        return self.labels if self.tasks is None else self.tasks

    def take(self, index: NDArray[np.int64]) -> "Examples":
        """Returns the examples at `index`, in that order, with indices of int64."""
        labels = self.labels[index] if self.labels.size else self.labels
        aggregates = None if self.aggregates is None else self.aggregates[index]
        tasks = None if self.tasks is None else self.tasks[index]
        visits, offsets = self.history.take(index)
        user, item, visits = (
            found.astype(np.int64, copy=False) for found in (self.user[index], self.item[index], visits)
        )
        return Examples(user, item, Jagged(visits, offsets), labels, self.context[index], aggregates, tasks)

    def __len__(self) -> int:
        return len(self.user)


def aggregate_keys(plan: AggregatePlan, users: Entities, items: Entities, examples: Examples) -> dict[str, Jagged]:
    """Returns, by part of a plan of aggregates, the keys of each example's values."""
    sources = {"user": (users, examples.user), "item": (items, examples.item)}
    found: dict[str, Jagged] = {}
    for part in plan.parts:
        entity, column = column_of(part)
        entities, index = sources[entity]
        found[part] = entities.keys(column, index)
    return found


class Assembler:
    """Gatherer of batches: the only way, offline, in the stream and in serving, from examples to table rows.

    Args:
        schema: Input of the ranker.
        users, items, events: Entities that the examples index.
        vectors: (items, width) float32 content vectors, if the schema reads them.
    """

    def __init__(
        self,
        schema: Schema,
        users: Entities,
        items: Entities,
        events: Entities,
        vectors: NDArray[np.float32] | None = None,
    ) -> None:
        self.schema = schema
        self.users = users
        self.items = items
        self.events = events
        self.admission = users.admission
        self.vectors = vectors

    def with_events(self, events: pl.DataFrame) -> "Assembler":
        """Returns an assembler of other events, given as their columns, with the same users and items."""
        found = Entities(self.schema, "event", events, self.admission)
        return Assembler(self.schema, self.users, self.items, found, self.vectors)

    def batch(
        self,
        examples: Examples,
        features: Sequence[Feature] | None = None,
        *,
        limits: NDArray[np.uint8] | None = None,
        unread: bool = False,
    ) -> Batch:
        """Returns the batch of B examples.

        Args:
            examples: Examples to gather.
            features: Lookups to make, by default all of the schema's. Serving makes a user's lookups once for all
                items.
            limits: (B, features), the largest number of a feature's values an example reads, the first ones; with 0 it
                reads as if none were admitted.
            unread: True counts the values without a row, too.
        """
        size = len(examples)
        without = np.zeros((size, len(self.schema.features if features is None else features)), dtype=np.int64)
        values: list[NDArray[np.int64]] = []
        lengths: list[NDArray[np.int64]] = []
        scales: list[NDArray[np.float32]] = []
        for place, feature in enumerate(self.schema.features if features is None else features):
            if feature.pooling == "attention":
                rows, count, held = self._by_slot(feature, examples)
            else:
                rows, count, held = self._rows(feature.of, feature.column, examples)
                if limits is not None:
                    rows, count = _first(rows, count, limits[:, place])
            bags = count.reshape(self.schema.slots(feature), size)
            if unread and held is not count:
                without[:, place] = (held - count).reshape(bags.shape).sum(axis=0)
            ends = np.concatenate([[0], np.cumsum(bags.sum(axis=1))])
            scale = (1.0 / np.maximum(bags, 1)).astype(np.float32) if feature.pooling != "sum" else np.ones_like(bags)
            for slot, bag in enumerate(bags):
                values.append(rows[ends[slot] : ends[slot + 1], : feature.chunks].T.ravel())
                lengths += [bag] * feature.chunks
                scales += [scale[slot]] * feature.chunks
        placement = self.events.placement
        return Batch(
            values=torch.from_numpy(np.concatenate(values) if values else np.zeros(0, dtype=np.int64)),
            lengths=torch.from_numpy(np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)),
            scale=torch.from_numpy(np.stack(scales, axis=1, dtype=np.float32) if scales else np.zeros((size, 0), "f4")),
            numeric=torch.from_numpy(self.numeric(examples)),
            labels=torch.from_numpy(examples.targets),
            visits=torch.from_numpy(np.diff(examples.history.offsets)) if self.schema.attends else None,
            content=torch.from_numpy(self._content(examples)) if self.schema.content else None,
            placement=None if placement is None else torch.from_numpy(placement[examples.context]),
            unread=torch.from_numpy(without) if unread else None,
        )

    def sightings(self, examples: Examples) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the keys (N,) of the hashed values that examples hold, and how often each is held.

        A value in a history was sighted when its item was, so it is not counted again.
        """
        found = self.sightings_by_column(examples)
        keys, times = (np.concatenate(arrays) for arrays in zip(*found, strict=True)) if found else _NO_SIGHTINGS
        return keys, times

    def waiting(self, examples: Examples) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Returns the part of `sightings` that an admission counts: of the values that read no row yet."""
        found = [
            entities.waiting(column, index)
            for source, entities, index in self._sources(examples)
            for column in dict.fromkeys(feature.column for feature in self.schema.of(source))
        ]
        found = [one for one in found if len(one[0])]
        keys, times = (np.concatenate(arrays) for arrays in zip(*found, strict=True)) if found else _NO_SIGHTINGS
        return keys, times

    def sightings_by_column(self, examples: Examples) -> list[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Returns what `sightings` returns, for each column of the schema by itself; its keys are distinct."""
        return [
            entities.sightings(column, index)
            for source, entities, index in self._sources(examples)
            for column in dict.fromkeys(feature.column for feature in self.schema.of(source))
        ]

    def admit(self, admission: Admission) -> None:
        """Replaces the admission for every value, now and from now on."""
        self.admission = admission
        for entities in (self.users, self.items, self.events):
            entities.admit(admission)

    def numeric(self, examples: Examples) -> NDArray[np.float32]:
        """Returns the numeric features of B examples, (B, numeric features) float32."""
        sources = {name: (entities, index) for name, entities, index in self._sources(examples)}
        out = np.zeros((len(examples), len(self.schema.numeric)), dtype=np.float32)
        for position, numeric in enumerate(self.schema.numeric):
            if numeric.of == "history":
                count = np.diff(examples.history.offsets)
                out[:, position] = (log_scaled(count) - numeric.mean) / numeric.std
            elif numeric.of == "aggregate":
                assert examples.aggregates is not None, "the schema reads aggregates; the examples have none"
                column = examples.aggregates[:, self.schema.aggregates.columns.index(numeric.column)]
                out[:, position] = standardised(column, numeric)
            else:
                entities, index = sources[numeric.of]
                out[:, position] = entities.numeric(numeric.name, index)
        return out

    def _sources(self, examples: Examples) -> tuple[tuple[Source, Entities, NDArray[np.int64]], ...]:
        return (
            ("user", self.users, examples.user),
            ("item", self.items, examples.item),
            ("event", self.events, examples.context),
        )

    def _rows(self, of: Source, column: str, examples: Examples) -> _Found:
        for source, entities, index in self._sources(examples):
            if source == of:
                return entities.lookup(column, index)
        rows, counts, held = self.items.lookup(column, examples.history.values)
        summed = _summed(counts, examples.history.offsets)
        return rows, summed, summed if held is counts else _summed(held, examples.history.offsets)

    def _by_slot(self, feature: Feature, examples: Examples) -> _Found:
        """Returns the history item by item: rows (n, c) and counts (L · B,), slot-major; slot 0 is the oldest."""
        size, offsets = len(examples), examples.history.offsets
        visits = np.diff(offsets)
        slot = np.arange(offsets[-1]) - np.repeat(offsets[:-1], visits)
        bag = slot * size + np.repeat(np.arange(size), visits)
        order = np.argsort(bag, kind="stable")
        rows, counts, held = self.items.lookup(feature.column, examples.history.values[order])
        lengths = np.zeros(self.schema.slots(feature) * size, dtype=np.int64)
        lengths[bag[order]] = counts
        if held is counts:
            return rows, lengths, lengths
        every = np.zeros_like(lengths)
        every[bag[order]] = held
        return rows, lengths, every

    def _content(self, examples: Examples) -> NDArray[np.float32]:
        assert self.vectors is not None, "the schema reads content vectors; the assembler was given none"
        found: NDArray[np.float32] = self.vectors[examples.item]
        return found


def _summed(counts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums counts (n,) list by list."""
    ends = np.concatenate([[0], np.cumsum(counts)])[offsets]
    found: NDArray[np.int64] = ends[1:] - ends[:-1]
    return found


def _first(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], limits: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if (lengths <= limits).all():
        return rows, lengths
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(rows)) - np.repeat(starts, lengths)
    return rows[place < np.repeat(limits, lengths)], np.minimum(lengths, limits)
