"""A published bundle into the online store: its rows and histories at sequence number 0."""

import uuid
from collections.abc import Sequence

import polars as pl

from features.errors import StoreError
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.delta import SNAPSHOT_SEQ
from serving.store.protocol import OnlineStore

_RECORDS = 10_000


def fill_store(store: OnlineStore, bundle: Bundle, *, storage: str = "float32") -> bool:
    """Puts a bundle where servers read, unless it is there; returns whether it had to.

    What the stream wrote since stays: it has higher sequence numbers. A load that was cut short is done again, since
    the mark that it is complete is written last. One that was to expire is kept.
    """
    if store.keep(bundle.id) and store.read_records(bundle.id, record.LOADED, ["bundle"]) != [None]:
        return False
    schema = bundle.schema
    store.create_table(bundle.id, rows=schema.rows, dim=schema.dim, storage=storage)
    store.load_rows(bundle.id, bundle.rows(), seq=SNAPSHOT_SEQ)
    visits = bundle.history.group_by("user_id", maintain_order=True).agg(pl.col("item_id"), pl.col("time"))
    users: Sequence[str] = visits["user_id"].to_list()
    payloads = [
        record.encode(record.HistoryRecord(items, times))
        for items, times in zip(visits["item_id"].to_list(), visits["time"].to_list(), strict=True)
    ]
    for start in range(0, len(users), _RECORDS):
        part = slice(start, start + _RECORDS)
        seqs = [SNAPSHOT_SEQ] * len(users[part])
        store.write_records(bundle.id, record.HISTORY, users[part], seqs, payloads[part])
    store.write_records(bundle.id, record.LOADED, ["bundle"], [SNAPSHOT_SEQ], [uuid.uuid4().hex.encode()])
    return True


def require_loaded(store: OnlineStore, bundle: Bundle) -> None:
    """Raises StoreError when the store does not hold the bundle."""
    if store.read_records(bundle.id, record.LOADED, ["bundle"]) == [None]:
        raise StoreError(f"bundle {bundle.id} is not loaded in the online store; start `tessera serve` or `stream`")
