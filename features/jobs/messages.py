"""History as messages: the rows of a dataset's events, in time order, as the bytes that the stream reads.

Rows are parsed and ordered once, then cut into shards that Beam encodes; a shard done is not redone.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import polars as pl

from features.dataset import Dataset
from features.error import DatasetError
from features.jobs.shard import Progress, map_shards, write_shards
from features.table import load_events, shape_events

_ROWS = 20_000


def encode_rows(rows: pl.DataFrame) -> list[bytes]:
    """Rows of the events' table as messages, without what is null."""
    names = rows.columns
    return [
        msgspec.json.encode(
            {name: value for name, value in zip(names, row, strict=True) if value is not None}, enc_hook=str
        )
        for row in rows.iter_rows()
    ]


class _Encode:
    """Rows to messages; picklable."""

    def __init__(self, user: str | None, prefix: str) -> None:
        self._user = user
        self._prefix = prefix

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        keys: Sequence[object] = frame[self._user].to_list() if self._user else [None] * frame.height
        own = frame.drop("_event", "_time")
        values = [
            msgspec.json.encode(
                {name: value for name, value in row.items() if value is not None}
                | {"_event_id": f"{self._prefix}:{event}", "_backfill": True},
                enc_hook=str,
            )
            for row, event in zip(own.iter_rows(named=True), frame["_event"].to_list(), strict=True)
        ]
        return pl.DataFrame(
            {
                "event_id": [f"{self._prefix}:{event}" for event in frame["_event"].to_list()],
                "key": [None if key is None else str(key).encode() for key in keys],
                "value": values,
            },
            schema={"event_id": pl.String, "key": pl.Binary, "value": pl.Binary},
        )


def event_messages(
    dataset: Dataset,
    directory: Path,
    *,
    start: int | None = None,
    stop: int | None = None,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Writes a dataset's events as messages, oldest first.

    Args:
        dataset: whose events.
        directory: of the shards; what is there from an earlier call with the same arguments is kept.
        start, stop: event times, start included and stop not, in the unit of the frame's `time`.
        runner, options, progress: of the Beam job.

    Returns:
        Parquet shards in order, with `event_id`, `key` (the user's id) and `value` (the message).

    Raises:
        DatasetError: the events cannot be read, or none lies in the range.
    """
    table = load_events(dataset)
    shaped, _ = shape_events(table, dataset.events)
    times = shaped.select(pl.col("event").alias("_event"), pl.col("time").alias("_time"))
    if start is not None:
        times = times.filter(pl.col("_time") >= start)
    if stop is not None:
        times = times.filter(pl.col("_time") < stop)
    if not times.height:
        raise DatasetError(f"{dataset.source}: no event lies in the range; widen --from and --to")
    times = times.sort("_time", "_event", maintain_order=True)
    rows = table.frame[times["_event"].to_numpy()].with_columns(times["_event"], times["_time"])
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in table.files]
    identity = hashlib.sha256(repr((files, start, stop)).encode()).hexdigest()
    prefix = f"{dataset.name}-{identity[:12]}"
    place = directory / prefix
    sources = place / "rows"
    shards = write_shards(rows, sources, rows=_ROWS)
    out = place / "messages"
    map_shards(
        _Encode(dataset.events.user, prefix),
        shards,
        out,
        label="backfill",
        runner=runner,
        options=options,
        progress=progress,
    )
    return [out / shard.name for shard in shards]
