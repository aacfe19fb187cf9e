"""Blocks of a frame's parts: the unit in which a frame is stored and in which training reads it.

A part (train, validation or test) is divided into blocks of about `BLOCK_ROWS` examples by a hash of the event. Each
block is therefore a uniform sample of its part, and a reader that holds one block needs memory for one block, however
many events there are. The examples of one event, a positive and its drawn negatives, are in one block. Within a block
the examples keep the order of the frame, which is that of their events.

Files: `examples/{part}-{block:05d}.parquet`, each with all columns of `Frame.examples`.
Shape letter: E examples.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.split import PARTS
from features.durable import write_file
from features.hashing import splitmix64

BLOCK_ROWS: Final = 1 << 20
"""Examples of a block, about; a part of at most this many is one block."""
DIRECTORY: Final = "examples"
_EVENT = "event"
Value = TypeVar("Value", bound=np.generic)


def block_count(rows: int) -> int:
    """Returns the number of blocks of a part of `rows` examples; an empty part is one empty block."""
    return max(1, -(-rows // BLOCK_ROWS))


def block_of(events: NDArray[np.integer], blocks: int) -> NDArray[np.int64]:
    """Returns the block (E,) of each example by its event (E,), from 0 to `blocks` - 1."""
    if blocks == 1:
        return np.zeros(len(events), dtype=np.int64)
    with np.errstate(over="ignore"):
        mixed = splitmix64(events.astype(np.uint64))
    return (mixed % np.uint64(blocks)).astype(np.int64)


@dataclass(frozen=True)
class BlockShare:
    """Share of one process among several: consecutive rows of every block.

    Attributes:
        number: Number of the process, from 0.
        count: Number of processes.
    """

    number: int
    count: int

    def of(self, height: int) -> tuple[int, int]:
        """Returns the first row of a block of `height` rows, and the row after the last."""
        return height * self.number // self.count, height * (self.number + 1) // self.count


@dataclass(frozen=True)
class Blocks:
    """Blocks of one part, each read when asked for and never kept.

    Attributes:
        heights: Number of examples of each block.
        reader: Function from a block's number, and the names of columns or None for all, to its examples.
    """

    heights: tuple[int, ...]
    reader: Callable[[int, Sequence[str] | None], pl.DataFrame]

    def __len__(self) -> int:
        return len(self.heights)

    @property
    def height(self) -> int:
        """E, the number of examples of the part."""
        return sum(self.heights)

    def read(self, number: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Reads the examples of one block, all columns by default."""
        return self.reader(number, columns)

    def frames(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Reads block after block; without names, all columns."""
        for number in range(len(self)):
            yield self.read(number, columns or None)

    def mapped(self, change: Callable[[pl.DataFrame], pl.DataFrame], *, of: Collection[str] | None = None) -> "Blocks":
        """Returns the blocks whose examples `change` replaces as they are read; it must keep their number and order.

        Args:
            change: Function from the examples of a block, with all columns, to others.
            of: Names of the columns that `change` makes; a read of other columns alone is passed on. None: all.
        """

        def reader(number: int, columns: Sequence[str] | None) -> pl.DataFrame:
            if of is not None and columns is not None and not set(of) & set(columns):
                return self.read(number, columns)
            changed = change(self.read(number))
            return changed if columns is None else changed.select(columns)

        return Blocks(self.heights, reader)

    def with_columns(self, columns: pl.DataFrame) -> "Blocks":
        """Returns the blocks with columns (E rows, in the order of the part) added, or put in place of their own."""
        order = self._order()
        if order is not None:
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            columns = columns[place]
        starts = np.cumsum([0, *self.heights])

        def reader(number: int, names: Sequence[str] | None) -> pl.DataFrame:
            own = columns[int(starts[number]) : int(starts[number + 1])]
            if names is None:
                return self.read(number).drop(columns.columns, strict=False).hstack(own)
            stored = [name for name in names if name not in columns.columns]
            # Of a block without columns, polars does not know the height.
            return (self.read(number, stored).hstack(own) if stored else own).select(names)

        return Blocks(self.heights, reader)

    def whole(self, *columns: str) -> pl.DataFrame:
        """Returns all examples in the order of the part; without names, all columns."""
        found = pl.concat(list(self.frames(*columns)))
        order = self._order()
        return found if order is None else found[order]

    def arranged(self, values: Sequence[NDArray[Value]]) -> NDArray[Value]:
        """Returns the values (E, …) of all examples in the order of the part, given block by block."""
        found = np.concatenate(values)
        order = self._order()
        return found if order is None else found[order]

    def _order(self) -> NDArray[np.int64] | None:
        """Returns places among the blocks (E,) in the order of the part; None for one block."""
        if len(self) == 1:
            return None
        events = np.concatenate([block[_EVENT].to_numpy() for block in self.frames(_EVENT)])
        # Stable, so drawn negatives stay behind their positive.
        return np.argsort(events, kind="stable")


def held_blocks(part: pl.DataFrame, count: int | None = None) -> Blocks:
    """Returns the blocks of a part in memory, as many as `block_count` says by default; one is the part itself."""
    count = block_count(part.height) if count is None else count
    if count == 1:
        return Blocks((part.height,), lambda number, columns: part if columns is None else part.select(columns))
    numbers = pl.Series(block_of(part[_EVENT].to_numpy(), count).astype(np.int32))

    def reader(number: int, columns: Sequence[str] | None) -> pl.DataFrame:
        return (part if columns is None else part.select(columns)).filter(numbers == number)

    return Blocks(tuple(np.bincount(numbers.to_numpy(), minlength=count).tolist()), reader)


def chained(parts: Sequence[Blocks]) -> Blocks:
    """Returns the blocks of several parts as those of one, part after part."""
    places = [(blocks, number) for blocks in parts for number in range(len(blocks))]

    def reader(place: int, columns: Sequence[str] | None) -> pl.DataFrame:
        blocks, number = places[place]
        return blocks.read(number, columns)

    return Blocks(tuple(blocks.heights[number] for blocks, number in places), reader)


def shown_items(train: Blocks, items: int, *, positive: bool = False) -> NDArray[np.int64]:
    """Returns the number of a part's examples (N,) of each of N = `items` items, or of those with label 1."""
    shown = np.zeros(items, dtype=np.int64)
    for block in train.frames("item", "label"):
        chosen = block.filter(pl.col("label") == 1) if positive else block
        shown += np.bincount(chosen["item"].to_numpy(), minlength=items)[:items]
    return shown


def without_visits(examples: pl.DataFrame, items: NDArray[np.bool_]) -> pl.DataFrame:
    """Returns examples whose histories have no visit of some items.

    Args:
        examples: Examples with `history`, lists of item rows.
        items: (N,) True for each item whose visits are taken out.
    """
    numbers = pl.Series(np.flatnonzero(items), dtype=pl.UInt32).implode()
    return examples.with_columns(pl.col("history").list.eval(pl.element().filter(~pl.element().is_in(numbers))))


def stored_blocks(directory: Path, share: BlockShare | None = None) -> dict[str, Blocks]:
    """Opens the blocks of each part below `directory`; only the numbers of rows are read.

    Args:
        directory: Directory of the frame.
        share: Rows of each block that one process reads. Default: all rows.
    """
    return {part: _stored(sorted((directory / DIRECTORY).glob(f"{part}-*.parquet")), share) for part in PARTS}


def block_path(directory: Path, part: str, block: int) -> Path:
    """Returns the file of a block below the frame's directory."""
    return directory / DIRECTORY / f"{part}-{block:05d}.parquet"


def example_files(directory: Path) -> list[Path]:
    """Returns the files of a stored frame's examples: parts in order of time, and the blocks of each in order.

    Of a frame of an earlier release it is the one file `examples.parquet`.
    """
    if not (directory / DIRECTORY).is_dir():
        return [directory / f"{DIRECTORY}.parquet"]
    return [path for part in PARTS for path in sorted((directory / DIRECTORY).glob(f"{part}-*.parquet"))]


def write_blocks(parts: Mapping[str, Blocks], directory: Path) -> None:
    """Writes the blocks of each part below an existing directory, each file whole or not at all."""
    (directory / DIRECTORY).mkdir(exist_ok=True)
    for part, blocks in parts.items():
        for number, block in enumerate(blocks.frames()):
            write_block(block, block_path(directory, part, number))


def write_block(block: pl.DataFrame, path: Path) -> None:
    """Writes the examples of one block durably."""

    def fill(aside: Path) -> None:
        with aside.open("wb") as file:
            block.write_parquet(file, compression="zstd", statistics=False)

    write_file(path, fill)


def _stored(paths: Sequence[Path], share: BlockShare | None) -> Blocks:
    scans = [pl.scan_parquet(path, glob=False) for path in paths]
    heights = tuple(int(scan.select(pl.len()).collect().item()) for scan in scans)
    if share is None:

        def reader(number: int, columns: Sequence[str] | None) -> pl.DataFrame:
            return pl.read_parquet(paths[number], columns=None if columns is None else list(columns), glob=False)

        return Blocks(heights, reader)
    ranges = [share.of(height) for height in heights]

    def own_rows(number: int, columns: Sequence[str] | None) -> pl.DataFrame:
        low, high = ranges[number]
        scan = pl.scan_parquet(paths[number], glob=False)
        return (scan if columns is None else scan.select(columns)).slice(low, high - low).collect()

    return Blocks(tuple(high - low for low, high in ranges), own_rows)
