"""Users or items of a frame as shards: the rows of their table, then the ids that only events have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features.framing.numbers import Numbers

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Dimension:
    """Rows of users or items.

    Attributes:
        kind: `user` or `item`.
        shards: Shards of the table, in order; none without a table.
        listed: Rows of the table.
        numbers: Row numbers of the ids, None if events have no such id.
    """

    kind: str
    shards: tuple[Path, ...]
    listed: int
    numbers: Numbers | None

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.listed if self.numbers is None else self.numbers.size

    def columns(self, names: Sequence[str]) -> pl.DataFrame:
        """Returns columns of all rows; a row without a table has only its id."""
        if not names:
            return pl.DataFrame()
        listed = [pl.read_parquet(shard, columns=list(names)) for shard in self.shards]
        return pl.concat([*listed, self._unknown().select(pl.col(f"{self.kind}_id"))], how="diagonal").select(names)

    def slices(self) -> Iterator[pl.DataFrame]:
        """Yields all rows in order, with `listed` as their last column, a shard at a time."""
        for shard in self.shards:
            yield pl.read_parquet(shard).with_columns(listed=pl.lit(True))
        unknown = self._unknown().with_columns(listed=pl.lit(False))
        if self.shards:
            empty = pl.read_parquet(self.shards[0]).clear().with_columns(listed=pl.lit(True))
            unknown = pl.concat([empty, unknown], how="diagonal")
        if unknown.height or not self.shards:
            yield from unknown.iter_slices(_AT_ONCE) if unknown.height else [unknown]

    def unknown_id(self, row: int | None) -> str | None:
        """Returns the id of a row that is not in the table; None for no row."""
        return None if row is None or self.numbers is None else str(self.numbers.unknown[row - self.listed])

    def _unknown(self) -> pl.DataFrame:
        name = f"{self.kind}_id"
        if self.numbers is None:
            return pl.DataFrame(schema={name: pl.String})
        return self.numbers.unknown.alias(name).to_frame()
