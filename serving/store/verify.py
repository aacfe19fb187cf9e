"""Verifies a store and repairs it: `verify` compares it with the fold of the log, `replay` fills it from the fold."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from features.shown.consumed import FULL, HEAD
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle
from serving.store.fill import fill_store, require_loaded
from serving.store.forget import forget_histories
from serving.store.page import pack, unpack
from serving.store.protocol import OnlineStore
from serving.store.writer import filling_of, note_position, position_of
from streaming.fold import Fold
from streaming.log.protocol import EventLog, Offsets, offset_in
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot

_CHUNK = 10_000
_CATCH_UP_S = 30.0
_TRIES = 20
# Kinds whose records depend on how a store was filled, so they are not compared. The sketch has the same content.
_DERIVED = frozenset({record.ADMITTED})


@dataclass(frozen=True)
class Verified:
    """Result of a comparison.

    Attributes:
        seq: Sequence number of the last micro-batch in the fold.
        rows: Number of compared rows.
        records: Number of compared records.
        difference: Description of the first difference, or "".
    """

    seq: int
    rows: int
    records: int
    difference: str


def replay(
    log: EventLog,
    bundle: Bundle,
    store: OnlineStore,
    topics: Topics,
    snapshot: Snapshot | None,
    *,
    storage: str = "float32",
) -> Verified:
    """Fills a store from the snapshot and the log. Other clients may read and write the store meanwhile.

    Every row and record is written at its own sequence number, even if the store has the same number. This repairs
    damaged rows and records, and keeps newer ones.

    Args:
        log: Log of the deltas.
        bundle: Bundle to fill in.
        store: Store to fill.
        topics: Names of the topics.
        snapshot: Snapshot with which the fold starts. None: the fold starts with the bundle.
        storage: Format of the rows if the store does not have the bundle.

    Returns:
        Number of written rows and records.

    Raises:
        LogError: The log does not answer, or does not have all deltas.
        StoreError: The store does not answer.
    """
    fill_store(store, bundle, storage=storage)
    fold = Fold(log, bundle, topics, snapshot)
    fold.advance()
    for start in range(0, len(fold.seqs), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(fold.seqs)))
        store.write_rows(bundle.id, rows, fold.seqs[rows], fold.weight[rows], again=True)
    forget_histories(store, bundle.id, fold.forgotten())
    aggregates = {name: seq for (kind, name), seq in fold.removed.items() if kind == aggregate_record.AGGREGATE}
    store.forget_records(bundle.id, aggregate_record.AGGREGATE, list(aggregates), list(aggregates.values()))
    for kind, ids, seqs, payloads in _by_kind(fold):
        store.write_records(bundle.id, kind, ids, seqs, payloads, again=True)
    note_position(store, bundle.id, topics.deltas, filling_of(store, bundle.id), fold.position)
    return Verified(fold.seq, len(fold.seqs), len(fold.records), "")


def verify(
    log: EventLog,
    bundle: Bundle,
    store: OnlineStore,
    topics: Topics,
    *,
    snapshot: Snapshot | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Verified:
    """Compares a store with the fold of the log. The stream may run meanwhile.

    Args:
        log: Log of the deltas.
        bundle: Bundle to verify.
        store: Store to verify.
        topics: Names of the topics.
        snapshot: Snapshot with which the fold starts. None: the fold starts with the bundle.
        sample: Number of rows to compare. None: all rows.
        seed: Seed of the sample.

    Raises:
        StoreError: The store's writer does not catch up with the log.
    """
    require_loaded(store, bundle)
    fold = Fold(log, bundle, topics, snapshot)
    fold.advance()
    _await(store, bundle.id, topics, fold.behind)
    rows = np.arange(len(fold.seqs))
    if sample is not None and sample < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False))
    left = rows
    for _ in range(_TRIES):
        wrong, newer = _compare(store, bundle.id, fold, left)
        if len(wrong) or not len(newer):
            break
        left = newer
        fold.advance()
    else:
        wrong = left
    if len(wrong):
        return Verified(fold.seq, len(rows), 0, _row_difference(store, bundle.id, fold, int(wrong[0])))
    compared, difference = _compare_records(store, bundle.id, fold)
    return Verified(fold.seq, len(rows), compared, difference)


def _await(store: OnlineStore, bundle: str, topics: Topics, position: Offsets) -> None:
    deadline = time.monotonic() + _CATCH_UP_S
    while True:
        stored = position_of(store, bundle, topics.deltas) or ()
        behind = [number for number, end in enumerate(position) if offset_in(stored, number) < end]
        if not behind:
            return
        if time.monotonic() > deadline:
            place = f" of partition {behind[0]}" if len(position) > 1 else ""
            raise StoreError(
                f"the store has the deltas{place} up to {offset_in(stored, behind[0])}, the log up to "
                f"{position[behind[0]]}: no writer runs, or it is stuck; run `tessera stream --once`, or "
                "`tessera replay`"
            )
        time.sleep(0.05)


def _compare(
    store: OnlineStore, bundle: str, fold: Fold, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the rows (n,) that differ, and the rows that are newer in the store than in the fold."""
    table = store.table(bundle)
    before = store.read_seqs(bundle, rows)
    vectors = store.read_rows(bundle, rows)
    after = store.read_seqs(bundle, rows)
    newer = (after > fold.seqs[rows]) | (before != after)
    expected = unpack(pack(table, fold.weight[rows]))
    equal = (vectors.view(np.uint32) == expected.view(np.uint32)).all(axis=1) & (after == fold.seqs[rows])
    return rows[~equal & ~newer], rows[newer]


def _row_difference(store: OnlineStore, bundle: str, fold: Fold, row: int) -> str:
    rows = np.array([row])
    expected = unpack(pack(store.table(bundle), fold.weight[rows]))[0]
    return (
        f"row {row}: seq {store.read_seqs(bundle, rows)[0]}, the log's fold has {fold.seqs[row]}; "
        f"vector {store.read_rows(bundle, rows)[0][:4]}…, the fold's {expected[:4]}…"
    )


def _compare_records(store: OnlineStore, bundle: str, fold: Fold) -> tuple[int, str]:
    compared = 0
    for kind, ids, _, payloads in _by_kind(fold):
        if kind in _DERIVED:
            continue
        expected: list[bytes | None] = list(payloads)
        for _ in range(_TRIES):
            stored = store.read_records(bundle, kind, ids)
            wrong = [name for name, old, new in zip(ids, stored, expected, strict=True) if old != new]
            if not wrong or not fold.advance():
                break
            # The record of a user who was forgotten meanwhile is missing in both.
            expected = [fold.records[kind, name][1] if (kind, name) in fold.records else None for name in ids]
        if wrong:
            if stored[ids.index(wrong[0])] is None:
                return compared, f"{kind} {wrong[0]!r}: the store has no record, and the log's fold has one"
            return compared, f"{kind} {wrong[0]!r}: the store's record differs from the record of the log's fold"
        compared += len(ids)
    for kind in (record.ITEM, record.HISTORY, HEAD, FULL, aggregate_record.AGGREGATE):
        for _ in range(_TRIES):
            stored_ids = (name for chunk in store.scan_records(bundle, kind) for name, _ in chunk)
            unknown = [name for name in stored_ids if (kind, name) not in fold.records]
            if not unknown or not fold.advance():
                break
        if unknown:
            return compared, f"{kind} {unknown[0]!r}: the store has a record, and the log's fold has none"
    return compared, ""


def _by_kind(fold: Fold) -> Iterator[tuple[str, list[str], list[int], list[bytes]]]:
    for kind in dict.fromkeys(kind for kind, _ in fold.records):
        ids = [name for of, name in fold.records if of == kind]
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            records = [fold.records[kind, name] for name in part]
            yield kind, part, [seq for seq, _ in records], [payload for _, payload in records]
