"""Inputs of a tower: the rows that items or users read, and their numbers, gathered and pooled at once.

Shape letters: N items or users, M gathered, n values in all, c chunks, D dim, W width, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.content.encoder import unit
from models.ranker.loading import content_vectors
from models.table.admission import Admission
from models.table.batch import Entities
from models.table.column_rows import gather
from models.table.schema import Schema, Source
from models.towers.network import TowerParts, TowerReads
from models.towers.shape import CODES, ITEM, USER, with_columns

ReadRows = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Reads rows of the unified table: distinct ascending numbers (m,) become (m, D) float32."""


@dataclass(frozen=True)
class _Column:
    """Rows (n, c) of a column's values, list after list, the lists' lengths (N,), and True for their mean."""

    name: str
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    mean: bool

    def take(self, index: NDArray[np.int64]) -> "_Column":
        starts = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths[index]
        return _Column(self.name, self.rows[gather(starts[index], lengths)], lengths, self.mean)

    def pooled(self, table: Tensor, *, sparse: bool) -> Tensor:
        """Returns (N, c · D): the sum or the mean of each list's rows, chunk beside chunk."""
        count, width = len(self.rows), self.rows.shape[1] * table.shape[1]
        numbers = torch.from_numpy(self.rows.reshape(-1))
        if count == len(self.lengths) and (self.lengths == 1).all():
            return functional.embedding(numbers, table, sparse=sparse).view(count, width)
        # Bags of one chunk each, so that a chunk of a list is summed with the same chunk of its other values.
        of_list = np.repeat(np.arange(len(self.lengths)), self.lengths)
        weights = 1 / np.maximum(self.lengths, 1) if self.mean else np.ones(len(self.lengths))
        scaled = functional.embedding(numbers, table, sparse=sparse).view(count, width)
        scaled = scaled * torch.from_numpy(weights[of_list].astype(np.float32)).unsqueeze(1)
        into = table.new_zeros(len(self.lengths), width)
        return into.index_add(0, torch.from_numpy(of_list), scaled)


@dataclass(frozen=True)
class TowerInputs:
    """Inputs of N items or users.

    Attributes:
        columns: Rows by column.
        numbers: (N, Q) float32 numbers and content; Q may be 0.
        size: N.
    """

    columns: tuple[_Column, ...]
    numbers: NDArray[np.float32]

    @property
    def size(self) -> int:
        """N."""
        return len(self.numbers)

    def take(self, index: NDArray[np.int64]) -> "TowerInputs":
        """Returns the inputs of some of the items or users (M,)."""
        return TowerInputs(tuple(one.take(index) for one in self.columns), self.numbers[index])

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the rows (n,) that each reads, one after the other, and their numbers (N,)."""
        lengths = [one.lengths * one.rows.shape[1] for one in self.columns]
        total = np.stack(lengths).sum(axis=0)
        of_list = [np.repeat(np.arange(self.size), own) for own in lengths]
        order = np.argsort(np.concatenate(of_list), kind="stable")
        return np.concatenate([one.rows.reshape(-1) for one in self.columns])[order], total

    def numbered(self, numbers: NDArray[np.int64]) -> "TowerInputs":
        """Returns the inputs with each row replaced by its place among distinct ascending numbers."""
        columns = (_Column(one.name, np.searchsorted(numbers, one.rows), one.lengths, one.mean) for one in self.columns)
        return TowerInputs(tuple(columns), self.numbers)

    def parts(self, table: Tensor, *, sparse: bool = False) -> TowerParts:
        """Reads rows of a table (R, D). With `sparse`, the table's gradient has the rows that were read alone."""
        pooled = {one.name: one.pooled(table, sparse=sparse) for one in self.columns}
        own = pooled.pop(ITEM) if ITEM in pooled else pooled.pop(USER)
        codes = pooled.pop(CODES, None)
        return TowerParts(own, codes, torch.cat([*pooled.values(), torch.from_numpy(self.numbers)], dim=1))


def tower_inputs(schema: Schema, of: Source, frame: pl.DataFrame, admission: Admission, *, start: int) -> TowerInputs:
    """Looks up the rows of items or users.

    Args:
        schema: Schema of the towers.
        of: `item` or `user`.
        frame: One row for each. A column that it lacks is missing for all.
        admission: Values that read rows; others read none.
        start: First row of the towers' range.
    """
    frame = with_columns(frame, schema, of)
    entities = Entities(schema, of, frame, admission)
    index = np.arange(frame.height, dtype=np.int64)
    columns = []
    for feature in schema.of(of):
        rows, lengths = entities.rows(feature.column, index)
        columns.append(_Column(feature.name, rows + start, lengths, feature.pooling == "mean"))
    numbers = [entities.numeric(one.name, index) for one in schema.numeric if one.of == of]
    content = [_content(frame, schema.content)] if of == "item" else []
    wide = [one[:, None] for one in numbers] + content
    nothing = np.zeros((frame.height, 0), dtype=np.float32)
    return TowerInputs(tuple(columns), np.concatenate([nothing, *wide], axis=1))


def tower_reads(schema: Schema) -> TowerReads:
    """Returns the widths of what the towers read beside ids and codes."""

    def width(of: Source) -> int:
        pooled = sum(one.chunks * schema.dim for one in schema.of(of) if one.name not in (ITEM, USER, CODES))
        return pooled + sum(one.of == of for one in schema.numeric)

    return TowerReads(item=width("item") + schema.content, user=width("user"))


def _content(frame: pl.DataFrame, width: int) -> NDArray[np.float32]:
    """Returns the content vectors (N, E) at unit length; 0 for an item without one."""
    if not width or "content_vector" not in frame.columns:
        return np.zeros((frame.height, width), dtype=np.float32)
    return unit(content_vectors(frame))
