"""Rows of all entities of one source as one matrix on a device, made there from codes of distinct values.

Shape letters: N entities, n values in all, m distinct values, M places of a source, c chunks.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from models.table.schema import Feature


@dataclass(frozen=True)
class Column:
    """Values of one column on a device.

    Attributes:
        codes: (n,) int32 or int64 numbers of the values, entity after entity.
        lengths: (N,) number of the values of each entity; None if each has exactly one.
        rows: (m, c) int64 rows of the distinct values; -1 where a value has none.
        most: Most values of an entity, at least 1.
        known: True if every distinct value has rows.
    """

    codes: Tensor
    lengths: Tensor | None
    rows: Tensor
    most: int
    known: bool

    @property
    def single(self) -> bool:
        """True if each entity has exactly one value, and it has rows."""
        return self.lengths is None and self.known


@dataclass(frozen=True)
class Places:
    """Places of one feature in the matrix of its source.

    Attributes:
        feature: Number of the feature in the schema.
        start: First place.
        values: m, the most values of an entity.
        chunks: c. The places are c runs of m.
    """

    feature: int
    start: int
    values: int
    chunks: int


class SourceRows:
    """Table rows of all entities of one source.

    Nothing here waits for the device: sizes come from the columns' descriptions.

    Args:
        size: N.
        features: Features of the source, each with its number in the schema and its column.
        device: Device of a source without features.

    Attributes:
        rows: (N, M) int64 on the device, 0 where there is no value.
        counts: (N, features of the source) int64, the values of each feature; None if every feature has exactly one.
        places: Places of each feature.
        held, room: Values that there are, and places for them.
    """

    def __init__(self, size: int, features: Sequence[tuple[int, Feature, Column]], device: torch.device) -> None:
        matrices: list[Tensor] = []
        counts: list[Tensor] = []
        self.places: list[Places] = []
        start, self.held, self.room = 0, 0, 0
        for number, feature, column in features:
            matrix, count = _laid(column, size, feature.chunks)
            matrices.append(matrix)
            counts.append(count)
            self.places.append(Places(number, start, column.most, feature.chunks))
            start += column.most * feature.chunks
            self.held, self.room = self.held + len(column.codes), self.room + size * column.most
        nothing = torch.zeros((size, 0), dtype=torch.int64, device=device)
        self.rows = torch.cat(matrices, dim=1) if matrices else nothing
        whole = all(column.single for _, _, column in features)
        self.counts = None if whole or not counts else torch.stack(counts, dim=1)

    def taken(self, index: Tensor) -> "SourceRows":
        """Returns the source of entities `index` (N',) int64, in that order."""
        found = copy(self)
        found.rows = self.rows[index]
        found.counts = None if self.counts is None else self.counts[index]
        return found

    def __len__(self) -> int:
        return int(self.rows.shape[1])


def _laid(column: Column, size: int, chunks: int) -> tuple[Tensor, Tensor]:
    """Returns the rows of a column's entities (N, c · most), chunk after chunk, and their value counts (N,)."""
    found = column.rows[:, :chunks].index_select(0, column.codes)
    if column.single:
        return found, found.new_ones(size)
    lengths = found.new_ones(size) if column.lengths is None else column.lengths.long()
    owner = torch.repeat_interleave(torch.arange(size, device=found.device), lengths, output_size=len(found))
    known = found[:, 0] >= 0
    before = torch.cat([known.new_zeros(1, dtype=torch.int64), known.cumsum(0)])
    ends = lengths.cumsum(0)
    first, last = before[ends - lengths], before[ends]
    # A value without rows goes to a place behind the last, which is then dropped.
    place = torch.where(known, before[:-1] - first[owner], column.most)
    matrix = found.new_zeros((size, chunks, column.most + 1))
    matrix[owner.unsqueeze(1), torch.arange(chunks, device=found.device), place.unsqueeze(1)] = found
    return matrix[:, :, : column.most].reshape(size, -1), last - first
