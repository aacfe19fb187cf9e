"""Writes history as messages: the rows of a dataset's events, in time order, as the bytes that the stream reads.

Rows are parsed and ordered once, then cut into shards that Beam encodes. A finished shard is not encoded again.

An event's id is its row's own `_event_id`, or a function of the event alone: of the values that the stream makes of the
row, and of the number of equal rows. So an event has one id, however its file is named, touched or extended.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import polars as pl
from xxhash import xxh3_128_hexdigest

from features.dataset import column
from features.dataset.descriptor import Dataset
from features.dataset.input_files import forgotten_hash
from features.dataset.tables import EVENT_ID, load_events, message_columns, remembered_events, shape_events
from features.errors import DatasetError
from features.jobs.engine import Engine
from features.jobs.shard import write_shards
from features.storage.file import stamps
from features.value.canonical import canonical

_ROWS = 20_000
# Version of the shards; shards of another release are not used.
_FORMAT = 2


def encode_rows(rows: pl.DataFrame) -> list[bytes]:
    """Encodes rows of `features.dataset.tables.message_columns` as messages, without null values."""
    names = rows.columns
    return [
        msgspec.json.encode({name: value for name, value in zip(names, row, strict=True) if value is not None})
        for row in rows.iter_rows()
    ]


class _Encode:
    """Function from rows to messages; picklable."""

    def __init__(self, user: str | None) -> None:
        self._user = user

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        keys: Sequence[str | None] = canonical(frame[self._user]).to_list() if self._user else [None] * frame.height
        values = [
            msgspec.json.encode({name: value for name, value in row.items() if value is not None} | {"_backfill": True})
            for row in frame.iter_rows(named=True)
        ]
        return pl.DataFrame(
            {
                "event_id": frame[EVENT_ID],
                "key": [None if key is None else key.encode() for key in keys],
                "value": values,
            },
            schema={"event_id": pl.String, "key": pl.Binary, "value": pl.Binary},
        )


def event_ids(shaped: pl.DataFrame, own: pl.Series | None = None) -> pl.Series:
    """Returns an id for each event.

    Args:
        shaped: (R, …) frame of `features.dataset.tables.read_events`.
        own: (R,) String, ids that the rows have themselves; a null is filled in.

    Returns:
        (R,) String. Equal rows are numbered, so that each counts. All other ids are a hash of the row's content.
    """
    content = shaped.drop("event")
    hashes = [xxh3_128_hexdigest(msgspec.json.encode(row)) for row in content.iter_rows()]
    frame = pl.DataFrame({"hash": pl.Series(hashes, dtype=pl.String)})
    ordinal = pl.col("hash").cum_count().over("hash") - 1
    made = pl.when(ordinal > 0).then(pl.format("{}-{}", "hash", ordinal)).otherwise("hash")
    found = frame.select(made.alias(EVENT_ID)).to_series()
    return found if own is None else own.zip_with(own.is_not_null(), found)


def event_messages(
    dataset: Dataset,
    directory: Path,
    *,
    start: int | None = None,
    stop: int | None = None,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes a dataset's events as messages, oldest first.

    Args:
        dataset: Dataset of the events.
        directory: Directory of the shards. Shards of an earlier call with the same arguments are kept.
        start, stop: Event times, start included and stop not, in the unit of the frame's `time`.
        engine: Engine of the Beam job; by default this process.
        progress: Called with (shards done, shards) from time to time.

    Returns:
        Parquet shards in order, with `event_id`, `key` (the user's id) and `value` (the message).

    Raises:
        DatasetError: The events cannot be read, or no event is in the range.
    """
    from features.jobs.beam import map_shards

    table = load_events(dataset)
    shaped, _ = remembered_events(*shape_events(table, dataset.events), dataset)
    own = column.texts(table, EVENT_ID)[shaped["event"].to_numpy()] if EVENT_ID in table.frame.columns else None
    times = shaped.select(
        pl.col("event").alias("_event"), pl.col("time").alias("_time"), event_ids(shaped, own).alias(EVENT_ID)
    )
    if start is not None:
        times = times.filter(pl.col("_time") >= start)
    if stop is not None:
        times = times.filter(pl.col("_time") < stop)
    if not times.height:
        raise DatasetError(f"{dataset.source}: no event lies in the range; widen --from and --to")
    times = times.sort("_time", "_event", maintain_order=True)
    rows = message_columns(table, dataset.events)[times["_event"].to_numpy()].with_columns(times[EVENT_ID])
    files = [(path.name, *found) for path, found in zip(table.files, stamps(table.files), strict=True)]
    # The key names only the shards, which another call makes again; no part of the key is in a message.
    of = (_FORMAT, files, start, stop) + ((forgotten_hash(dataset),) if dataset.events.forgotten else ())
    identity = hashlib.sha256(repr(of).encode()).hexdigest()
    place = directory / f"{dataset.name}-{identity[:12]}"
    sources = place / "rows"
    shards = write_shards(rows, sources, rows=_ROWS)
    out = place / "messages"
    map_shards(
        _Encode(dataset.events.user),
        shards,
        out,
        label="backfill",
        engine=engine,
        keeps_rows=True,
        progress=progress,
    )
    return [out / shard.name for shard in shards]
