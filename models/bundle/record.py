"""Records the online store keeps beside rows: an item as the ranker and retrieval need it, and a user's history."""

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError
from features.value.attribute import typed

_ADMITTED_KEYS = 16_384
ITEM = "item"
HISTORY = "history"
ADMITTED = "admitted"
"""Keys of values that were admitted: little-endian uint64, under a micro-batch's number or a hash of the keys."""

CHANGED = "changed"
"""Ids of changed items in deltas of releases before 0.2, which stores no longer need."""
LOADED = "loaded"
"""Marks, under the id "bundle", that the store holds a whole published bundle; the payload names this filling."""

TOMBSTONE = b""
"""Record of a deleted item."""


class ItemRecord(msgspec.Struct, frozen=True, array_like=True):
    """Item of the catalogue.

    Attributes:
        encoder: Id of the encoder that made `vector`, or "".
        vector: (D,) little-endian float32, empty without content.
        codes: Semantic ID, empty without content.
        features: Values of the item's feature columns, by column.
        codebook: Id of the codebook that made `codes`, or "".
    """

    encoder: str
    vector: bytes
    codes: list[int]
    features: dict[str, Any]
    codebook: str = ""

    def content(self) -> NDArray[np.float32]:
        """Returns the vector (D,) float32."""
        return np.frombuffer(self.vector, dtype="<f4")


class HistoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """Visits that are kept of a user, (item_id, time), oldest first, as two aligned lists."""

    items: list[str]
    times: list[int]


def encode(record: ItemRecord | HistoryRecord) -> bytes:
    """Encodes a record: a msgpack array in the order of the fields."""
    return msgspec.msgpack.encode(record)


def decode_item(data: bytes) -> ItemRecord:
    """Decodes an item; raises EventError on any other content."""
    try:
        return msgspec.msgpack.decode(data, type=ItemRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"item record: {error}") from error


def decode_history(data: bytes) -> HistoryRecord:
    """Decodes a history; raises EventError on any other content."""
    try:
        return msgspec.msgpack.decode(data, type=HistoryRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"history record: {error}") from error


def encode_admitted(keys: NDArray[np.uint64]) -> bytes:
    """Encodes keys (N,)."""
    return keys.astype("<u8").tobytes()


def decode_admitted(data: bytes) -> NDArray[np.uint64]:
    """Decodes keys (N,); raises EventError on any other content."""
    if len(data) % 8:
        raise EventError(f"admitted record: expected 8 bytes a key, got {len(data)} bytes")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def admitted_records(keys: NDArray[np.uint64]) -> Iterator[tuple[str, bytes]]:
    """Cuts keys (N,), sorted, into records of bounded size; yields ids, which are hashes of the keys, and payloads."""
    for start in range(0, len(keys), _ADMITTED_KEYS):
        payload = encode_admitted(keys[start : start + _ADMITTED_KEYS])
        yield hashlib.sha256(payload).hexdigest()[:32], payload


def is_full_admitted(data: bytes) -> bool:
    """Returns whether an admitted record is as large as `admitted_records` makes them."""
    return len(data) >= 8 * _ADMITTED_KEYS


def entity_frame(rows: list[dict[str, Any]], like: pl.DataFrame) -> pl.DataFrame:
    """Returns feature values by column as a frame with the columns and types of `like`; missing values are null."""
    return pl.DataFrame([typed(name, [row.get(name) for row in rows], dtype) for name, dtype in like.schema.items()])
