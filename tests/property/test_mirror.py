"""The mirror is the store's fold: whatever order pages and deltas come in, each row keeps its newest value."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.aggregate.plan import NOTHING
from features.errors import StoreError
from models.bundle.delta import VERSION, Delta
from serving.ranking.mirror import Mirror
from serving.store.memory import MemoryStore

ROWS, DIM = 20, 4
WRITES = st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 9)), max_size=25, unique=True)


def _delta(row: int, seq: int, bundle: str = "b") -> Delta:
    vector = np.full(DIM, row + seq / 7, dtype="<f4")
    number = np.array([row], dtype="<u4").tobytes()
    return Delta(VERSION, bundle, seq, DIM, number, vector.tobytes(), bytes(4), [], [])


def _write(store: MemoryStore, change: Delta) -> None:
    seqs = np.full(len(change.row_numbers), change.seq, dtype=np.int64)
    store.write_rows(change.bundle, change.row_numbers, seqs, change.vectors)


@given(WRITES, st.randoms(), st.integers(0, 25), st.sampled_from(["float32", "float16", "int8"]))
def test_pages_and_deltas_in_any_order_give_the_stores_rows(
    writes: list[tuple[int, int]], chance: random.Random, cut: int, storage: str
) -> None:
    store = MemoryStore()
    store.create_table("b", rows=ROWS, dim=DIM, storage=storage)
    store.load_rows("b", np.zeros((ROWS, DIM), dtype=np.float32), seq=0)
    changes = [_delta(row, seq) for row, seq in writes]
    for change in changes[:cut]:
        _write(store, change)
    mirror = Mirror(store, "b", NOTHING)
    for change in changes[cut:]:
        _write(store, change)
    followed = list(changes)
    chance.shuffle(followed)
    for change in followed:
        mirror.fold(change)
    every = np.arange(ROWS)
    assert mirror.fold(_delta(0, 99, bundle="another")) == 0
    np.testing.assert_array_equal(mirror.read_rows(every), store.read_rows("b", every))
    np.testing.assert_array_equal(mirror.seqs(), store.read_seqs("b", every))


def test_a_row_beyond_the_table_is_refused() -> None:
    store = MemoryStore()
    store.create_table("b", rows=ROWS, dim=DIM)
    with pytest.raises(StoreError, match=r"rows 0\.\.19"):
        Mirror(store, "b", NOTHING).read_rows(np.array([ROWS]))
