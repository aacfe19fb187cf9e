"""Backfill: appends history from files to the log, each event once. The stream's step then applies the events.

The ids of all events in the log are read first, and only events with other ids are appended. An interrupted call, a
range that overlaps an earlier range, and files that have grown therefore repeat no event. The ids are kept in a file
beside the shards, so that the next call reads only the log after them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.durable import make_directory, write_file
from features.errors import EventError, StreamError
from features.lock import locked
from features.wire.decoder import Decoded, Decoder
from features.wire.fields import DeclaredFields
from features.wire.schemas import Schemas
from streaming.lateness import id_key
from streaming.log.protocol import EventLog

_CHUNK = 2_000
_FORMAT = 1


class _Kept(msgspec.Struct, frozen=True):
    """Keys of all ids of a topic, up to the position of each partition."""

    format: int
    topic: str
    identity: str
    positions: dict[int, int]
    keys: bytes


class _Sent:
    """Keys (64 bits) of the ids in a topic. Among 10^8 ids, two have the same key with a probability of 3e-4."""

    def __init__(self, log: EventLog, topic: str, path: Path, schemas: Schemas | None) -> None:
        self._log = log
        self._decode = Decoder(DeclaredFields("events", (), ()), schemas)
        self._topic = topic
        self._path = path
        self._identity = log.identity(topic)
        kept = self._read()
        self._positions = dict(kept.positions) if kept else {}
        self._keys: NDArray[np.uint64] = np.frombuffer(kept.keys if kept else b"", dtype="<u8").astype(np.uint64)
        self._new: set[int] = set()

    def _read(self) -> _Kept | None:
        try:
            kept = msgspec.msgpack.decode(self._path.read_bytes(), type=_Kept)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            # Without a readable file, all ids are read from the log.
            return None
        expected = (_FORMAT, self._topic, self._identity)
        return kept if (kept.format, kept.topic, kept.identity) == expected else None

    def follow(self) -> None:
        """Reads the ids of new messages, and writes all keys to the file."""
        ends, kept = self._log.end_offsets(self._topic), self._log.offsets_at(self._topic, 0)
        for partition, end in ends.items():
            start = max(self._positions.get(partition, 0), kept[partition])
            for message in self._log.read(self._topic, partition, start, end) if start < end else ():
                self._new.update(id_key(event_id) for event_id in self._ids(message.value) if event_id is not None)
            self._positions[partition] = max(start, end)
        self._keys = np.union1d(self._keys, np.fromiter(self._new, dtype=np.uint64, count=len(self._new)))
        self._new.clear()
        known = _Kept(_FORMAT, self._topic, self._identity, self._positions, self._keys.astype("<u8").tobytes())
        write_file(self._path, msgspec.msgpack.encode(known))

    def _ids(self, value: bytes) -> Sequence[str | int | None]:
        try:
            decoded = self._decode.read(value)
        except (EventError, StreamError):
            return ()
        return [decoded.event_id] if isinstance(decoded, Decoded) else decoded.event_ids

    def fresh(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Marks the ids (N,) that the topic does not have, each once. Marked ids count as sent from now on."""
        keys = np.array([id_key(name) for name in ids], dtype=np.uint64)
        index = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        known = self._keys[index] == keys if len(self._keys) else np.zeros(len(keys), dtype=np.bool_)
        fresh = np.zeros(len(keys), dtype=np.bool_)
        for number in np.flatnonzero(~known):
            key = int(keys[number])
            fresh[number] = key not in self._new
            self._new.add(key)
        return fresh


def send_history(
    log: EventLog,
    topic: str,
    shards: Sequence[Path],
    *,
    sent: Path,
    schemas: Schemas | None = None,
    progress: Callable[[int], None] = lambda sent: None,
) -> int:
    """Appends the messages of shards in their order, each once over any number of calls.

    Args:
        log: Log of the topic.
        topic: Name of an existing topic.
        shards: Parquet files with `event_id`, `key` and `value`.
        sent: File with the keys of the topic's ids. If the file is missing, the topic is read from its start.
        schemas: Schemas of messages in Avro and Protobuf, which hold ids too.
        progress: Called with the number of messages of the shards that are in the log.

    Returns:
        Number of messages that this call appended.

    Raises:
        TesseraError: Another backfill is running.
        LogError: The log does not answer. The same call continues after the last appended message.
    """
    make_directory(sent.parent)
    appended = seen = 0
    with locked(sent, wait_s=0):
        known = _Sent(log, topic, sent, schemas)
        known.follow()
        for shard in shards:
            messages = pl.read_parquet(shard)
            for start in range(0, messages.height, _CHUNK):
                part = messages[start : start + _CHUNK]
                seen += part.height
                part = part.filter(pl.Series(known.fresh(part["event_id"].to_list())))
                if part.height:
                    log.append(topic, list(zip(part["key"].to_list(), part["value"].to_list(), strict=True)))
                appended += part.height
                progress(seen)
        known.follow()
    return appended
