"""Last job of a frame: gathers the examples of each block, with their aggregates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features.dataset.split import PARTS
from features.frame_blocks import block_path, write_block
from features.jobs.shuffle import gather, partition_of
from features.jobs.worklist import RowCounts

_KEYS = ["event", "ordinal"]
_JOINED = ("user", "item", "history")


@dataclass(frozen=True)
class WriteBlock:
    """Task that writes one block of examples.

    Args:
        examples: Files of `ByUser`, by block.
        aggregated: Files of `SpreadColumns`; none without aggregates.
        columns: Names of the aggregates' columns.
        blocks: Blocks of each part.
        out: Directory of the frame.
    """

    examples: tuple[Path, ...]
    aggregated: tuple[Path, ...]
    columns: tuple[str, ...]
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
            names = [name for name in examples.columns if name not in ("ordinal", "part", *_JOINED, *self.columns)]
            ordered = examples.select(*names, pl.lit(part).alias("split"), *_JOINED, *self.columns)
            write_block(ordered, made)
        height = pl.scan_parquet(made, glob=False).select(pl.len()).collect().item()
        return RowCounts(height, height, 0)

    def _part(self, number: int) -> tuple[str, int]:
        for part in PARTS:
            if number < self.blocks[part]:
                return part, number
            number -= self.blocks[part]
        raise IndexError(number)
