"""Loads a published bundle into the online store: rows and histories at sequence number 0."""

import itertools
import uuid

from features.errors import StoreError
from features.shown.consumed import FULL, HEAD
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle
from models.bundle.delta import SNAPSHOT_SEQ
from serving.store.protocol import OnlineStore

_RECORDS = 10_000


def fill_store(store: OnlineStore, bundle: Bundle, *, storage: str = "float32") -> bool:
    """Loads a bundle into the store, unless the store has the bundle.

    Writes of the stream stay, since they have higher sequence numbers. An interrupted load is repeated, since the mark
    of a complete load is written last. If the bundle was about to expire, it is kept.

    Args:
        store: Store to fill.
        bundle: Bundle to load.
        storage: Format of the rows: float32, float16 or int8.

    Returns:
        True if the bundle was loaded, False if the store had the bundle.

    Raises:
        StoreError: The store does not answer, or has a table of another shape or storage.
    """
    if store.keep(bundle.id) and store.read_records(bundle.id, record.LOADED, ["bundle"]) != [None]:
        return False
    schema = bundle.schema
    store.create_table(bundle.id, rows=schema.rows, dim=schema.dim, storage=storage)
    store.load_rows(bundle.id, bundle.rows(), seq=SNAPSHOT_SEQ)
    histories = record.published_histories(bundle)
    while published := list(itertools.islice(histories, _RECORDS)):
        users, payloads = [user for user, _ in published], [record.encode(history) for _, history in published]
        store.write_records(bundle.id, record.HISTORY, users, [SNAPSHOT_SEQ] * len(users), payloads)
    consumed, names = record.published_consumed(bundle)
    rows = consumed.all_records(names)
    while part := list(itertools.islice(rows, _RECORDS)):
        for kind in (FULL, HEAD):
            own = [(name, payload) for of, name, payload in part if of == kind]
            if own:
                ids, pages = [name for name, _ in own], [payload for _, payload in own]
                store.write_records(bundle.id, kind, ids, [SNAPSHOT_SEQ] * len(ids), pages)
    aggregates = aggregate_record.state_records(bundle.aggregates())
    while chunk := list(itertools.islice(aggregates, _RECORDS)):
        ids, seqs = [one.id for one in chunk], [SNAPSHOT_SEQ] * len(chunk)
        store.write_records(bundle.id, aggregate_record.AGGREGATE, ids, seqs, [one.payload for one in chunk])
    store.write_records(bundle.id, record.LOADED, ["bundle"], [SNAPSHOT_SEQ], [uuid.uuid4().hex.encode()])
    return True


def require_loaded(store: OnlineStore, bundle: Bundle) -> None:
    """Raises StoreError if the bundle is not in the store."""
    if store.read_records(bundle.id, record.LOADED, ["bundle"]) == [None]:
        raise StoreError(f"bundle {bundle.id} is not loaded in the online store; start `tessera serve` or `stream`")
