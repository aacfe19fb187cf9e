"""The mirror is the store's fold: whatever order pages and deltas come in, each row keeps its newest value."""

import contextlib
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.aggregate.aggregator import Aggregator
from features.aggregate.plan import NOTHING, AggregatePlan, Aggregation
from features.errors import StoreError
from models.bundle import aggregate_record, record
from models.bundle.delta import VERSION, Delta, Record
from serving.ranking.mirror import Mirror
from serving.ranking.shared_rows import SharedRows
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


@given(WRITES, st.randoms(), st.integers(0, 25), st.sampled_from(["float32", "float16", "int8"]), st.integers(0, 3))
def test_pages_and_deltas_in_any_order_give_the_stores_rows(
    writes: list[tuple[int, int]], chance: random.Random, cut: int, storage: str, sharing: int
) -> None:
    # 0: a mirror of its own rows. Else as many mirrors as processes, which share theirs.
    store = MemoryStore()
    store.create_table("b", rows=ROWS, dim=DIM, storage=storage)
    store.load_rows("b", np.zeros((ROWS, DIM), dtype=np.float32), seq=0)
    changes = [_delta(row, seq) for row, seq in writes]
    for change in changes[:cut]:
        _write(store, change)
    every = np.arange(ROWS)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        held = [stack.enter_context(contextlib.closing(SharedRows(place, store, "b", (0,)))) for _ in range(sharing)]
        mirrors = [Mirror(store, "b", NOTHING, one) for one in held or [None]]
        for change in changes[cut:]:
            _write(store, change)
        for change in chance.sample(changes, len(changes)):
            # The first mirror folds the delta; the others find it done.
            assert sum(mirror.fold(change) for mirror in chance.sample(mirrors, len(mirrors))) <= 1
        for mirror in mirrors:
            assert mirror.fold(_delta(0, 99, bundle="another")) == 0
            np.testing.assert_array_equal(mirror.read_rows(every), store.read_rows("b", every))
            np.testing.assert_array_equal(mirror.seqs(), store.read_seqs("b", every))


def test_a_row_beyond_the_table_is_refused() -> None:
    store = MemoryStore()
    store.create_table("b", rows=ROWS, dim=DIM)
    with pytest.raises(StoreError, match=r"rows 0\.\.19"):
        Mirror(store, "b", NOTHING).read_rows(np.array([ROWS]))


def test_keys_that_the_trainer_has_forgotten_take_no_memory_and_the_others_answer_as_before() -> None:
    plan = AggregatePlan((Aggregation("visits", ("user",), "count", windows=("all",)),))
    store, each = MemoryStore(), 400
    store.create_table("b", rows=ROWS, dim=DIM)
    store.load_rows("b", np.zeros((ROWS, DIM), dtype=np.float32), seq=0)
    mirror = Mirror(store, "b", plan)
    trainer = Aggregator(plan).states["user",]
    for seq in range(1, 21):
        keys = np.arange(each * seq, each * (seq + 1), dtype=np.uint64)
        ones = np.ones((each, 1), dtype=np.int64)
        trainer.advance(keys, np.full(each, seq), ones, ones[:, 0] > 0)
        changed = aggregate_record.batch_records(0, keys, trainer.take(keys), limit=1 << 20)
        gone = [
            Record(aggregate_record.AGGREGATE, aggregate_record.key_id(0, int(key)), record.TOMBSTONE)
            for key in trainer.forget(each)
        ]
        mirror.fold(Delta(VERSION, "b", seq, DIM, b"", b"", b"", [*changed, *gone], []))
    held = mirror._aggregates.states["user",]
    assert len(trainer) == each
    assert len(held) <= 2 * each + 1_024
    assert not held.differ(trainer.keys, trainer.rows).any()
