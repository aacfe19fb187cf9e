"""Tables of an export, as chunks of bounded size: examples, items, users and histories.

Row numbers of the frame become ids, times become timestamps, and each row gets the value of its partition.
Shape letter: N, rows of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import DatasetError, TesseraError
from features.hashing import fingerprint
from models.export.dtypes import TIMESTAMP
from models.export.schema import EVENT_TIMESTAMP, Partitioning
from models.export.source import ExportSource

By = Literal["split", "date"]
CHUNK_ROWS: Final = 65_536
BUCKET_ROWS: Final = 262_144
"""Rows of a hash partition of items or users, on average at most."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BUCKET, _DATE, _ORDER = "bucket", "event_date", "event_order"


@dataclass(frozen=True)
class TableRows:
    """Rows of one exported table.

    Attributes:
        name: Name of the table.
        keys: Columns of the entities' ids.
        timestamp: Column of the time from which a row is valid. None without a clock.
        rows: Number of rows.
        partitioning: Division into directories; every chunk has its column.
        scan: Source of the rows.
        shaped: Function from N rows of the source to N exported rows.
    """

    name: str
    keys: tuple[str, ...]
    timestamp: str | None
    rows: int
    partitioning: Partitioning
    scan: pl.LazyFrame
    shaped: Callable[[pl.DataFrame], pl.DataFrame]

    def empty(self) -> pl.DataFrame:
        """Returns the exported table without rows."""
        return self.shaped(self.scan.slice(0, 0).collect())

    def chunks(self, rows: int = CHUNK_ROWS) -> Iterator[pl.DataFrame]:
        """Yields the exported rows in their order, at most `rows` at once."""
        for start in range(0, self.rows, rows):
            yield self.shaped(self.scan.slice(start, rows).collect())


def tables_of(source: ExportSource, *, by: By = "split", buckets: int | None = None) -> list[TableRows]:
    """Returns the tables of an export; a table without rows is left out.

    Args:
        source: Run or bundle.
        by: Partitioning of the examples: part of the data, or date of the event in UTC.
        buckets: Number of hash partitions of items, users and histories. Default: one for each `BUCKET_ROWS` rows.

    Raises:
        DatasetError: The events have no clock, and the examples are to be partitioned by date.
    """
    found = [_dimension(source, name, buckets) for name in ("items", "users")]
    if source.visits is not None:
        found.append(_histories(source, source.visits, buckets))
    if source.examples is not None:
        found.insert(0, _examples(source, source.examples, by))
    return [table for table in found if table.rows]


def _dimension(source: ExportSource, name: str, buckets: int | None) -> TableRows:
    key = f"{name.removesuffix('s')}_id"
    scan: pl.LazyFrame = getattr(source, name)
    count = _height(scan)
    partitioning, bucket = _buckets(key, count, buckets)
    added = [pl.lit(_EPOCH, dtype=TIMESTAMP).alias(EVENT_TIMESTAMP)] if source.has_clock else []

    def shaped(rows: pl.DataFrame) -> pl.DataFrame:
        _refuse_taken(name, rows, [*(column.meta.output_name() for column in added), _BUCKET])
        return rows.select(key, *added, pl.exclude(key)).with_columns(bucket(rows))

    return TableRows(name, (key,), _timestamp(source), count, partitioning, scan, shaped)


def _histories(source: ExportSource, visits: pl.LazyFrame, buckets: int | None) -> TableRows:
    """Histories as of a microsecond after the newest visit: a visit is known to later events alone, not to ties."""
    last = (
        visits.group_by("user_id", maintain_order=True)
        .agg(pl.col("item_id").tail(source.history_length), pl.col("time").last())
        .collect()
    )
    partitioning, bucket = _buckets("user_id", last.height, buckets)
    since = _moment(source, pl.col("time") + 1)

    def shaped(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.select("user_id", since, history="item_id").with_columns(bucket(rows))

    return TableRows("histories", ("user_id",), _timestamp(source), last.height, partitioning, last.lazy(), shaped)


def _examples(source: ExportSource, examples: pl.LazyFrame, by: By) -> TableRows:
    if by == "date" and not source.has_clock:
        raise DatasetError(
            f"{source.name}: examples cannot be partitioned by date, since the events have no clock; "
            "partition by split, or give [events] a time and run again"
        )
    events = source.dataset.events
    keys = tuple(f"{kind}_id" for kind, column in (("user", events.user), ("item", events.item)) if column)
    ids = {"user": _ids(source.users, "user_id"), "item": _ids(source.items, "item_id")}
    date = pl.col(EVENT_TIMESTAMP).dt.date().cast(pl.String).alias(_DATE)
    meaning = "Date of the event, UTC." if by == "date" else "Part of the data: train, validation or test."
    partitioning = Partitioning(_DATE if by == "date" else "split", meaning)

    def shaped(rows: pl.DataFrame) -> pl.DataFrame:
        own = [name for name in rows.columns if name not in ("user", "item", "time", "event", "label", "split")]
        _refuse_taken("examples", rows, [_DATE, EVENT_TIMESTAMP, _ORDER])
        named = [ids[key.removesuffix("_id")].gather(rows[key.removesuffix("_id")]).alias(key) for key in keys]
        found = rows.select(*named, _moment(source, pl.col("time")), "event", "label", "split", *own)
        found = found.with_columns(_named_lists(rows["history"], ids["item"]))
        return found.with_columns(date) if by == "date" else found

    return TableRows("examples", keys, _timestamp(source), _height(examples), partitioning, examples, shaped)


def _named_lists(lists: pl.Series, ids: pl.Series) -> pl.Series:
    """Returns lists of row numbers (N,) as lists of ids."""
    lengths = lists.list.len()
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy())]).astype(np.int32)
    named = ids.gather(lists.filter(lengths > 0).explode())
    found = pa.ListArray.from_arrays(offsets, named.to_arrow(compat_level=pl.CompatLevel.oldest()))
    return pl.Series(lists.name, found)


def _moment(source: ExportSource, time: pl.Expr) -> pl.Expr:
    return time.cast(TIMESTAMP).alias(EVENT_TIMESTAMP) if source.has_clock else time.cast(pl.Int64).alias(_ORDER)


def _timestamp(source: ExportSource) -> str | None:
    return EVENT_TIMESTAMP if source.has_clock else None


def _buckets(key: str, rows: int, buckets: int | None) -> tuple[Partitioning, Callable[[pl.DataFrame], pl.Series]]:
    """Returns the hash partitioning by an id, and the function that computes its column."""
    number = buckets or max(1, -(-rows // BUCKET_ROWS))

    def bucket(frame: pl.DataFrame) -> pl.Series:
        places = fingerprint(frame[key].to_list()) % number
        return pl.Series(_BUCKET, places.astype("int32"))

    return Partitioning(_BUCKET, f"xxh3_64 of the UTF-8 of {key}, modulo {number}."), bucket


def _refuse_taken(table: str, rows: pl.DataFrame, names: list[str]) -> None:
    for name in names:
        if name in rows.columns:
            raise TesseraError(
                f"table {table}: an export adds a column {name!r}, and the dataset has one; rename the column in the "
                "files and the descriptor, and run again"
            )


def _height(scan: pl.LazyFrame) -> int:
    return int(scan.select(pl.len()).collect().item())


def _ids(scan: pl.LazyFrame, key: str) -> pl.Series:
    return scan.select(key).collect()[key]
