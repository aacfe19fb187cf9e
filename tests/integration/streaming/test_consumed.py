"""All consumed items are left out: those of the bundle, those of the stream, after a restart and without the store."""

import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from features.shown.consumed import PAGE
from models.bundle.bundle import Bundle, write_bundle
from serving.ranking.service import RankService
from serving.retrieval.meaning import Meant, PolicyRequest
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import replay, verify
from serving.store.writer import StoreWriter
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import FORMAT, Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tests.build import coloured_parts
from tests.integration.streaming.test_forget import POLICIES, consumed

ITEMS = [f"x{number}" for number in range(4 * PAGE)]
UNSEEN = Meant(policy=PolicyRequest("unseen", ""))
TOPICS = Topics()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("consumed")
    parts = coloured_parts(directory, events=200)
    parts = replace(parts, dataset=parts.dataset.model_copy(update={"policies": POLICIES}), consumed=consumed())
    return write_bundle(parts, directory / "bundle")


def _stream(log: LocalLog, bundle: Bundle, store: MemoryStore, snapshots: Snapshots) -> None:
    options = TrainerOptions(batch=16, wait_s=0.1)
    trainer = Trainer(log, bundle, topics=TOPICS, options=options, snapshots=snapshots)
    with contextlib.closing(trainer):
        while not trainer.drained():
            trainer.run_once()
        trainer.write_snapshot()
    with contextlib.closing(StoreWriter(log, bundle.id, store, topics=TOPICS)) as writer:
        while writer.run_once(wait_s=0.5):
            pass


def _send(log: LocalLog, seen: dict[str, set[str]], *, start: int, count: int) -> None:
    """Appends events of users, some of them positive, and notes the items of the positive ones."""
    begin = datetime.now(UTC) - timedelta(minutes=5)
    rng = np.random.default_rng(start)
    rows = []
    for number in range(start, start + count):
        user, item, label = f"u{rng.integers(4)}", ITEMS[rng.integers(len(ITEMS))], int(rng.random() < 0.7)
        seen.setdefault(user, set()).update([item] * label)
        time = (begin + timedelta(microseconds=number)).isoformat()
        row = {"user_id": user, "item_id": item, "label": label, "time": time, "_event_id": str(number)}
        rows.append((user.encode(), json.dumps(row).encode()))
    log.append(TOPICS.events, rows)


def _left_out(service: RankService, user: str) -> set[str]:
    return set(ITEMS) - {item for item, _ in service.rank(user, ITEMS, len(ITEMS), meant=UNSEEN).items}


def test_every_consumed_item_is_left_out(bundle: Bundle, tmp_path: Path) -> None:
    store, snapshots = MemoryStore(), Snapshots(tmp_path / "snapshots")
    fill_store(store, bundle)
    service = RankService(bundle, store)
    seen = {f"u{number}": {f"x{each}" for each in range(number, 2 * (PAGE + 5), 2)} for number in range(2)}
    assert {user: _left_out(service, user) for user in seen} == seen
    assert _left_out(service, "u3") == set()
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions(2))
        # A restart in between continues from the snapshot.
        for start in (0, 300):
            _send(log, seen, start=start, count=300)
            _stream(log, bundle, store, snapshots)
            service.refresh()
            assert {user: _left_out(service, user) for user in seen} == seen
            assert max(map(len, seen.values())) > 2 * PAGE
        for snapshot in (None, snapshots.newest(bundle)):
            assert verify(log, bundle, store, TOPICS, snapshot=snapshot).difference == ""
            other = MemoryStore()
            replay(log, bundle, other, TOPICS, snapshot)
            assert {user: _left_out(RankService(bundle, other), user) for user in seen} == seen
    manifest = next((tmp_path / "snapshots" / bundle.id).rglob("manifest.json"))
    assert json.loads(manifest.read_bytes())["format"] == FORMAT


def test_verify_names_a_record_that_differs(bundle: Bundle, tmp_path: Path) -> None:
    store = MemoryStore()
    fill_store(store, bundle)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions(1))
        _send(log, {}, start=0, count=20)
        _stream(log, bundle, store, Snapshots(tmp_path / "snapshots"))
        (head,) = store.read_records(bundle.id, "consumed", ["u0"])
        assert head is not None
        store.write_records(bundle.id, "consumed", ["u0"], [10**6], [head[:-8]])
        assert "consumed 'u0': the store's record differs" in verify(log, bundle, store, TOPICS).difference
