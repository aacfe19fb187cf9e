"""Records that the online store keeps beside rows: items, users' histories and admitted values."""

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError
from features.shown.consumed import FULL, HEAD, ConsumedItems, page_ids, page_user
from features.value.attribute import typed
from models.bundle.contents import BundleContents
from models.encoder.meaning.neighbours import LABELLED

_ADMITTED_KEYS = 16_384
ITEM = "item"
"""Kind of an item's record. The id is the item's id."""
HISTORY = "history"
"""Kind of a history's record. The id is the user's id."""
ADMITTED = "admitted"
"""Kind of a record of admitted keys, little-endian uint64. The id is a micro-batch's number or a hash of the keys."""
CHANGED = "changed"
"""Kind of a record with ids of changed items. Only deltas of releases before 0.2 have such records, and stores ignore
them."""
FORGOTTEN = "forgotten"
"""Kind of the record of a forgotten user, a `ForgottenRecord`. The id is the salted hash of the user's id."""
LOADED = "loaded"
"""Kind of the record "bundle", which marks that the store holds a whole published bundle. The payload names the
filling."""

TOMBSTONE = b""
"""Record of a deleted item."""


class ItemRecord(msgspec.Struct, frozen=True, array_like=True):
    """Item of the catalogue.

    Attributes:
        encoder: Id of the encoder that computed `vector`, or "".
        vector: (D,) little-endian float32, empty without content.
        codes: Semantic ID, empty without content.
        features: Values of the item's feature columns, by column.
        codebook: Id of the codebook that assigned `codes`, or "".
        terms: Terms of the item's text, see `features.content.lexical.pack_terms`. Empty without text, and in records
            of releases whose stream did not keep the terms.
    """

    encoder: str
    vector: bytes
    codes: list[int]
    features: dict[str, Any]
    codebook: str = ""
    terms: bytes = b""

    def content(self) -> NDArray[np.float32]:
        """Returns the vector (D,) float32."""
        return np.frombuffer(self.vector, dtype="<f4")


class HistoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """Kept visits of a user, oldest first, as two aligned lists.

    Attributes:
        items: Ids of the visited items.
        times: Times of the visits, in the unit of the events' time.
        labelled: Ids of the user's last labelled items, oldest first, if the bundle corrects new items by them.
        labels: Label of each labelled item, a byte 0 or 1.
    """

    items: list[str]
    times: list[int]
    labelled: list[str] = []
    labels: bytes = b""


class ForgottenRecord(msgspec.Struct, frozen=True, array_like=True):
    """Removal of a user's records that are older than the micro-batch of this record.

    Attributes:
        salt: Salt of the hash that is the record's id.
        at_us: Time of the request, microseconds since 1970.
        user: Id of the user whose history is removed. "" in a store, a snapshot and a rewritten log, where the salt and
            the hash find the id.
        aggregates: Ids of the records of aggregates that are removed. Empty in a store.
        full_pages: Full pages of the user's consumed items that are removed with their head; None if there are none.
    """

    salt: str
    at_us: int
    user: str = ""
    aggregates: list[str] = []
    full_pages: int | None = None

    def consumed(self, user: str) -> dict[str, list[str]]:
        """Returns the ids of the removed records of consumed items of the user, by kind."""
        return {} if self.full_pages is None else {HEAD: [user], FULL: page_ids(user, self.full_pages)}

    def anonymous(self) -> bytes:
        """Returns the encoded record without ids, as stores keep it."""
        return encode(ForgottenRecord(self.salt, self.at_us))


def decode_forgotten_record(data: bytes) -> ForgottenRecord:
    """Decodes the record of a forgotten user.

    Raises:
        EventError: The bytes are no such record.
    """
    try:
        return msgspec.msgpack.decode(data, type=ForgottenRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"record of a forgotten user: {error}") from error


def encode(record: ItemRecord | HistoryRecord | ForgottenRecord) -> bytes:
    """Encodes a record: a msgpack array in the order of the fields. Empty terms or labels have no field."""
    if isinstance(record, ItemRecord) and not record.terms:
        return msgspec.msgpack.encode(msgspec.structs.astuple(record)[:-1])
    if isinstance(record, ForgottenRecord) and record.full_pages is None:
        return msgspec.msgpack.encode(msgspec.structs.astuple(record)[:-1])
    if isinstance(record, HistoryRecord) and not record.labelled:
        return msgspec.msgpack.encode((record.items, record.times))
    return msgspec.msgpack.encode(record)


def decode_item(data: bytes) -> ItemRecord:
    """Decodes an item.

    Raises:
        EventError: The bytes are no item.
    """
    try:
        return msgspec.msgpack.decode(data, type=ItemRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"item record: {error}") from error


def decode_history(data: bytes) -> HistoryRecord:
    """Decodes a history.

    Raises:
        EventError: The bytes are no history.
    """
    try:
        found = msgspec.msgpack.decode(data, type=HistoryRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"history record: {error}") from error
    if len(found.labelled) != len(found.labels):
        raise EventError(f"history record: {len(found.labelled)} labelled items, but {len(found.labels)} labels")
    return found


def encode_admitted(keys: NDArray[np.uint64]) -> bytes:
    """Encodes admitted keys (N,)."""
    return keys.astype("<u8").tobytes()


def decode_admitted(data: bytes) -> NDArray[np.uint64]:
    """Decodes admitted keys (N,).

    Raises:
        EventError: The bytes are no keys.
    """
    if len(data) % 8:
        raise EventError(f"admitted record: expected 8 bytes a key, got {len(data)} bytes")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def admitted_records(keys: NDArray[np.uint64]) -> Iterator[tuple[str, bytes]]:
    """Cuts sorted keys (N,) into records of bounded size.

    Yields:
        Id of a record, a hash of its keys, and the payload.
    """
    for start in range(0, len(keys), _ADMITTED_KEYS):
        payload = encode_admitted(keys[start : start + _ADMITTED_KEYS])
        yield hashlib.sha256(payload).hexdigest()[:32], payload


def is_full_admitted(data: bytes) -> bool:
    """Returns whether an admitted record has the full size of the records of `admitted_records`."""
    return len(data) >= 8 * _ADMITTED_KEYS


def entity_frame(rows: list[dict[str, Any]], like: pl.DataFrame) -> pl.DataFrame:
    """Returns rows as a frame with the columns and types of `like`. Missing values are null.

    Args:
        rows: Values of each row by column.
        like: Frame with the columns.
    """
    return pl.DataFrame([typed(name, [row.get(name) for row in rows], dtype) for name, dtype in like.schema.items()])


def published_histories(bundle: BundleContents, user: str | None = None) -> Iterator[tuple[str, HistoryRecord]]:
    """Yields users with their published histories, users with a visit first, each in the order of its file.

    Args:
        bundle: The bundle.
        user: Id of a user. None: all users.
    """
    visits = _by_user(bundle.history, user, "item_id", "time")
    labelled = _by_user(bundle.labelled, user, "item_id", "label")
    labels = {name: (items[-LABELLED:], own[-LABELLED:]) for name, items, own in labelled.iter_rows()}
    for name, items, times in visits.iter_rows():
        yield name, _record(items, times, *labels.pop(name, ([], [])))
    for name, (items, own) in labels.items():
        yield name, _record([], [], items, own)


def published_consumed(bundle: BundleContents) -> tuple[ConsumedItems, list[str]]:
    """Returns the consumed items of a published bundle, and the users' ids by number."""
    users = bundle.consumed["user_id"].unique(maintain_order=True)
    state = ConsumedItems()
    numbers = dict(zip(users.to_list(), range(len(users)), strict=True))
    if numbers:
        own = bundle.consumed["user_id"].replace_strict(numbers, return_dtype=pl.Int64).to_numpy()
        state.advance(own, bundle.consumed["key"].to_numpy())
    return state, users.to_list()


def consumed_user(kind: str, name: str) -> str | None:
    """Returns the user of a record of consumed items, by its kind and id; None for another kind."""
    return name if kind == HEAD else page_user(name) if kind == FULL else None


def labels_bytes(labels: list[int]) -> bytes:
    """Returns labels as a record keeps them, a byte each."""
    return np.array(labels, dtype=np.uint8).tobytes()


def _record(items: list[str], times: list[int], labelled: list[str], labels: list[int]) -> HistoryRecord:
    return HistoryRecord(items, times, labelled, labels_bytes(labels))


def _by_user(frame: pl.DataFrame, user: str | None, *columns: str) -> pl.DataFrame:
    chosen = frame if user is None else frame.filter(pl.col("user_id") == user)
    return chosen.group_by("user_id", maintain_order=True).agg(*columns)
