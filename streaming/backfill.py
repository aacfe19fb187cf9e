"""Backfill: history from files into the log, once, so that the very same step takes it in.

Before each chunk the log's ends are noted beside the shards; who goes on after a crash reads from there which of the
chunk's events had arrived, and appends only the others.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import polars as pl

from features.durable import write_file
from features.error import EventError
from streaming.log import EventLog

_CHUNK = 2_000


class _Note(msgspec.Struct, frozen=True):
    """The chunk in hand: its number, and the topic's ends before it."""

    chunk: int
    ends: dict[int, int]


class _Id(msgspec.Struct, frozen=True, rename={"event_id": "_event_id"}):
    event_id: str | int | None = None


def send_history(
    log: EventLog, topic: str, shards: Sequence[Path], *, progress: Callable[[int], None] = lambda sent: None
) -> int:
    """Appends the messages of shards in their order, each exactly once over any number of calls that were cut short.

    Args:
        topic: exists.
        shards: parquet with `event_id`, `key` and `value`; `sent.json` beside them says how far an earlier call came.
        progress: called with how many messages are in the log.

    Returns:
        How many messages this call appended.
    """
    messages = pl.concat([pl.read_parquet(shard) for shard in shards])
    path = shards[0].with_name("sent.json")
    note = msgspec.json.decode(path.read_bytes(), type=_Note) if path.exists() else None
    appended = 0
    for chunk, start in enumerate(range(0, messages.height, _CHUNK)):
        if note is not None and chunk < note.chunk:
            continue
        part = messages[start : start + _CHUNK]
        if note is not None and chunk == note.chunk:
            part = part.filter(~pl.col("event_id").is_in(list(_arrived(log, topic, note.ends))))
        else:
            _write(path, _Note(chunk, log.end_offsets(topic)))
        log.append(topic, list(zip(part["key"].to_list(), part["value"].to_list(), strict=True)))
        appended += part.height
        progress(min(start + _CHUNK, messages.height))
    _write(path, _Note(-(-messages.height // _CHUNK), log.end_offsets(topic)))
    return appended


def _arrived(log: EventLog, topic: str, ends: dict[int, int]) -> set[str]:
    found = set()
    now = log.end_offsets(topic)
    for partition, end in ends.items():
        for message in log.read(topic, partition, end, now[partition]):
            try:
                found.add(str(msgspec.json.decode(message.value, type=_Id).event_id))
            except (msgspec.DecodeError, UnicodeDecodeError, EventError):
                continue
    return found


def _write(path: Path, note: _Note) -> None:
    write_file(path, msgspec.json.encode(note))
