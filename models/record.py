"""What the online store keeps beside rows: an item as the ranker and retrieval need it, and a user's history."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.attribute import typed
from features.error import EventError

ITEM = "item"
HISTORY = "history"
ADMITTED = "admitted"
"""Keys of values that a micro-batch admitted, under the batch's number: little-endian uint64."""

CHANGED = "changed"
"""Ids of the items whose records a micro-batch wrote, under the batch's number: a msgpack array of strings."""
TOMBSTONE = b""
"""The record of an item that was deleted."""


class ItemRecord(msgspec.Struct, frozen=True, array_like=True):
    """One item.

    Attributes:
        encoder: id of the encoder that made `vector`, or "".
        vector: (D,) little-endian float32, empty without content.
        codes: the Semantic ID, empty without content.
        features: the values of the item's feature columns, by column.
        codebook: id of the codebook that made `codes`, or "".
    """

    encoder: str
    vector: bytes
    codes: list[int]
    features: dict[str, Any]
    codebook: str = ""

    def content(self) -> NDArray[np.float32]:
        """The vector (D,) float32."""
        return np.frombuffer(self.vector, dtype="<f4")


class HistoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """A user's kept visits, (item_id, time), oldest first; and their ids in the same order."""

    items: list[str]
    times: list[int]


def encode(record: ItemRecord | HistoryRecord) -> bytes:
    """Record to bytes: a msgpack array in the order of the fields."""
    return msgspec.msgpack.encode(record)


def decode_item(data: bytes) -> ItemRecord:
    """Bytes to item; raises EventError on anything else."""
    try:
        return msgspec.msgpack.decode(data, type=ItemRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"item record: {error}") from error


def decode_history(data: bytes) -> HistoryRecord:
    """Bytes to history; raises EventError on anything else."""
    try:
        return msgspec.msgpack.decode(data, type=HistoryRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"history record: {error}") from error


def encode_admitted(keys: NDArray[np.uint64]) -> bytes:
    """Keys (N,) to bytes."""
    return keys.astype("<u8").tobytes()


def decode_admitted(data: bytes) -> NDArray[np.uint64]:
    """Bytes to keys (N,); raises EventError on anything else."""
    if len(data) % 8:
        raise EventError(f"admitted record: expected 8 bytes a key, got {len(data)} bytes")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def encode_changed(ids: Sequence[str]) -> bytes:
    """Item ids to bytes."""
    return msgspec.msgpack.encode(list(ids))


def cut(ids: Sequence[str], limit: int) -> Iterator[Sequence[str]]:
    """Cuts ids, in order, into parts of at most `limit` bytes of text; an id that is longer is a part by itself."""
    start = size = 0
    for place, name in enumerate(ids):
        own = len(name.encode()) + 5
        if place > start and size + own > limit:
            yield ids[start:place]
            start, size = place, 0
        size += own
    if start < len(ids):
        yield ids[start:]


def decode_changed(data: bytes) -> list[str]:
    """Bytes to item ids; raises EventError on anything else."""
    try:
        return msgspec.msgpack.decode(data, type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"changed record: {error}") from error


def entity_frame(rows: list[dict[str, Any]], like: pl.DataFrame) -> pl.DataFrame:
    """Feature values by column as a frame with the columns and types of `like`; what is missing is null."""
    return pl.DataFrame([typed(name, [row.get(name) for row in rows], dtype) for name, dtype in like.schema.items()])
