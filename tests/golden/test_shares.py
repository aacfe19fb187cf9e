"""The places of keys on a Redis Cluster, frozen: a store that is filled must be found by every later version."""

import hashlib

import numpy as np

from models.bundle import record
from serving.store.page import table_mark
from serving.store.protocol import StoredTable
from serving.store.redis.spread import SHARES, SLOTS, Spread, share_tags


def test_tags_and_their_slots_never_change() -> None:
    tags = share_tags(64)
    assert tags[:4] == ["0.178", "1.12", "2.343", "3.42"]
    assert hashlib.sha256(" ".join(tags).encode()).hexdigest()[:16] == "a4e6c518082dd494"


def test_keys_of_pages_and_records_never_change() -> None:
    spread = Spread("b-1", 64)
    assert spread.page_keys(np.array([1, 65, 200])) == [
        b"tessera:b-1:{1.12}:page:1",
        b"tessera:b-1:{1.12}:page:65",
        b"tessera:b-1:{8.50}:page:200",
    ]
    assert spread.shares_of("history", [b"u1", b"u2", "ü".encode()]) == [54, 12, 21]
    assert spread.shares_of(record.ADMITTED, [b"1", b"2"]) == [2, 2]
    assert spread.shares_of(record.FORGOTTEN, [b"1"]) == [50]
    assert spread.key(63, "table") == b"tessera:b-1:{63.148}:table"
    assert Spread("b-1").page_keys(np.array([1])) == [b"tessera:{b-1}:page:1"]
    table = StoredTable(rows=9, dim=2, storage="int8")
    assert table_mark(table, 64) == b"rows=9 dim=2 storage=int8 page=64 shares=64"
    assert SHARES == 64


def test_slots_of_the_tags_lie_evenly() -> None:
    slots = sorted(Spread("b", 64).slot(share) for share in range(64))
    assert [slot * 64 // SLOTS for slot in slots] == list(range(64))
