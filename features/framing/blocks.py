"""Last job of a frame: gathers the examples of each block, with their aggregates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features.dataset.split import PARTS
from features.frame_blocks import block_path, write_block
from features.framing.dimension import Dimension
from features.jobs.shuffle import gather, partition_of
from features.jobs.worklist import RowCounts
from features.value.crossed import crossing_columns, with_crossed
from features.value.expression import Expression

_KEYS = ["event", "ordinal"]
_JOINED = ("user", "item", "history")


@dataclass(frozen=True)
class WriteBlock:
    """Task that writes one block of examples.

    Args:
        examples: Files of `ByUser`, by block.
        aggregated: Files of `SpreadColumns`; none without aggregates.
        columns: Names of the aggregates' columns.
        crossed: Features of several tables.
        dimensions: Rows of users and items.
        blocks: Blocks of each part.
        out: Directory of the frame.
    """

    examples: tuple[Path, ...]
    aggregated: tuple[Path, ...]
    columns: tuple[str, ...]
    crossed: tuple[Expression, ...]
    dimensions: Mapping[str, Dimension]
    blocks: Mapping[str, int]
    out: Path

    def __call__(self, path: Path) -> RowCounts:
        number = partition_of(path)
        part, block = self._part(number)
        made = block_path(self.out, part, block)
        if not made.exists():
            examples = gather(self.examples, number).sort(_KEYS)
            if self.columns:
                more = gather(self.aggregated, number).sort(_KEYS)
                if not examples.select(_KEYS).equals(more.select(_KEYS)):
                    raise ValueError(f"block {number}: the aggregates are of other examples")
                examples = examples.with_columns(more.select(self.columns))
            examples = with_crossed(examples, self.crossed, self._kept())
            own = (*(one.name for one in self.crossed), *self.columns)
            names = [name for name in examples.columns if name not in ("ordinal", "part", *_JOINED, *own)]
            ordered = examples.select(*names, pl.lit(part).alias("split"), *_JOINED, *own)
            write_block(ordered, made)
        height = pl.scan_parquet(made, glob=False).select(pl.len()).collect().item()
        return RowCounts(height, height, 0)

    def _kept(self) -> dict[str, pl.DataFrame]:
        """Returns the columns of users and items that features of several tables read."""
        return {kind: one.columns(crossing_columns(self.crossed, kind)) for kind, one in self.dimensions.items()}

    def _part(self, number: int) -> tuple[str, int]:
        for part in PARTS:
            if number < self.blocks[part]:
                return part, number
            number -= self.blocks[part]
        raise IndexError(number)
