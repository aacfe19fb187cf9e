"""The stream over the embedded log and store, and over Kafka and a Redis server: the same tests, the same results."""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from models.bundle import delta, record
from models.bundle.delta import SNAPSHOT_SEQ
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.protocol import OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.store import RedisStore
from streaming.dead_letter import read_dead_letters
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.trainer import TrainerOptions
from tessera.demo.synthetic import new_item
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World

_BAD = [
    b"{not json",
    b"\xff\xfe\x00",
    b"[1, 2]",
    b'{"user_id": "r1"}',
    b'{"user_id": null, "item_id": "a1", "clicked": 1, "time": "2025-01-01T00:00:00Z"}',
    b'{"user_id": "r1", "item_id": "a1", "clicked": 7, "time": 1735689600}',
    b'{"user_id": "r1", "item_id": "a1", "clicked": 1, "time": "yesterday"}',
    b"",
]
_BAD_ITEMS = [
    b"{}",
    b'{"item_id": "x", "title": "a", "year": "nineteen"}',
    b'{"item_id": "x", "title": "a", "year": 1000000000000000000000000000000}',
    b'{"item_id": ["x"], "title": "a"}',
]


@dataclass(frozen=True)
class Place:
    """A log and a store, with topics of this test alone."""

    log: EventLog
    store: OnlineStore
    topics: Topics

    @contextlib.contextmanager
    def stream(self, world: World, *, batch: int = 64) -> Iterator[StreamService]:
        options = TrainerOptions(batch=batch, most_bad=1.0)
        connections = StreamConnections.shared(self.log, self.store, topics=self.topics)
        with StreamService(world.bundle, connections, options) as running:
            yield running

    def send(self, topic: str, messages: list[bytes]) -> None:
        self.log.create_topics(self.topics.partitions())
        self.log.append(topic, [(None, message) for message in messages])


@pytest.fixture(params=["embedded", "servers"])
def place(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Iterator[Place]:
    if request.param == "embedded":
        log: EventLog = LocalLog(tmp_path / "log.db")
        store: OnlineStore = open_embedded(tmp_path / "redis")
    else:
        log = KafkaLog(request.getfixturevalue("kafka_address"))
        store = RedisStore(request.getfixturevalue("redis_address"))
    with contextlib.closing(store), contextlib.closing(log):
        store.drop(world.bundle.id)
        yield Place(log, store, Topics(f"t{uuid.uuid4().hex[:8]}-"))
        store.drop(world.bundle.id)


def _with_bad(good: list[bytes]) -> list[bytes]:
    """One bad message after every nineteen good ones: 5 %."""
    mixed: list[bytes] = []
    for place, message in enumerate(good):
        mixed.append(message)
        if place % 19 == 18:
            mixed.append(_BAD[(place // 19) % len(_BAD)])
    return mixed


def test_five_percent_malformed_every_good_one_applied_every_bad_one_set_aside(place: Place, world: World) -> None:
    good = world.messages(760)
    mixed = _with_bad(good)
    place.send(place.topics.events, mixed)
    place.send(place.topics.items, [*_BAD_ITEMS, json.dumps(new_item(1)).encode()])
    with place.stream(world) as stream:
        stream.drain()
        totals = stream.trainer.totals
        expected = {value for value in mixed if value in _BAD}
        letters = [filed.letter for filed in read_dead_letters(place.log, place.topics)]
    assert (totals.events, totals.items, totals.neutral) == (len(good), 1, 0)
    assert totals.bad == len(mixed) - len(good) + len(_BAD_ITEMS) == len(letters)
    assert (
        totals.messages == totals.events + totals.items + totals.neutral + totals.bad + totals.stale + totals.duplicates
    )
    assert {letter.value for letter in letters if letter.topic == place.topics.events} == expected
    assert all(letter.reason and letter.offset >= 0 and letter.partition == 0 for letter in letters)
    reasons = {letter.value: letter.reason for letter in letters}
    assert "yesterday" in reasons[_BAD[6]]
    assert "clicked" in reasons[_BAD[5]]


def test_the_store_is_the_trainers_table_is_the_fold_of_the_log(place: Place, world: World) -> None:
    place.send(place.topics.events, world.messages(500))
    with place.stream(world) as stream:
        stream.drain()
        trained = stream.trainer.step.ranker.table.weight.clone()
    fresh = world.bundle.ranker().table
    seqs = np.full(world.bundle.schema.rows, SNAPSHOT_SEQ, dtype=np.int64)
    deltas = place.topics.deltas
    for message in place.log.read(deltas, 0, 0, place.log.end_offsets(deltas)[0]):
        delta.fold(delta.decode(message.value), fresh.weight, fresh.accumulator, seqs)
    stored, stored_seqs = place.store.read_table(world.bundle.id)
    assert np.array_equal(stored, trained.numpy())
    assert np.array_equal(fresh.weight.numpy(), trained.numpy())
    assert np.array_equal(stored_seqs, seqs)
    assert not np.array_equal(trained.numpy(), world.bundle.rows())


def test_a_restarted_stream_goes_on_as_if_it_had_never_stopped(place: Place, world: World) -> None:
    messages = world.messages(512)
    place.send(place.topics.events, messages[:256])
    with place.stream(world) as stream:
        stream.drain()
    place.send(place.topics.events, messages[256:])
    with place.stream(world) as stream:
        stream.drain()
        stopped = _fingerprint(stream)
    whole = Place(place.log, place.store, Topics(f"{place.topics.prefix}whole-"))
    whole.send(whole.topics.events, messages)
    with whole.stream(world) as stream:
        stream.drain()
        assert _fingerprint(stream) == stopped


def _fingerprint(stream: StreamService) -> str:
    step = stream.trainer.step
    table = step.ranker.table
    digest = hashlib.sha256(table.weight.numpy().tobytes() + table.accumulator.numpy().tobytes())
    for user in sorted(step.history.users().tolist()):
        digest.update(repr((user, step.history.visits(user))).encode())
    return digest.hexdigest()


def _bits(place: Place, world: World) -> str:
    """Returns the results of a stream over a place: table, histories, and rankings from the store."""
    place.send(place.topics.items, [json.dumps(new_item(1)).encode()])
    place.send(place.topics.events, _with_bad(world.messages(400)))
    with place.stream(world) as stream:
        stream.drain()
        found = _fingerprint(stream)
    service = RankService(world.bundle, place.store)
    users = world.bundle.users["user_id"].to_list()[:5]
    return found + repr([service.rank(user, None, 10).items for user in users])


def test_every_log_and_store_gives_the_bits_of_the_plainest_ones(place: Place, world: World, tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "plain.db")) as log:
        plain = _bits(Place(log, MemoryStore(), Topics("plain-")), world)
    assert _bits(place, world) == plain


def test_a_new_item_gets_its_semantic_id_and_is_ranked(place: Place, world: World) -> None:
    message = new_item(1)
    name = message["item_id"]
    with place.stream(world) as stream:
        service = RankService(world.bundle, place.store)
        before = service.rank("nobody", [name], 1)
        place.send(place.topics.items, [json.dumps(message).encode()])
        stream.drain()
    after = service.rank("nobody", [name], 1)
    assert before.unknown_items == [name]
    assert after.unknown_items == []
    assert after.items[0][1] != before.items[0][1]
    stored = place.store.read_records(world.bundle.id, record.ITEM, [name])[0]
    assert stored is not None
    item = record.decode_item(stored)
    assert world.bundle.encoder is not None
    assert world.bundle.codebook is not None
    offline = world.bundle.encoder.encode([f"{message['title']}\n{message['description']}"])
    assert np.array_equal(item.content(), offline[0])
    assert item.codes == world.bundle.codebook.encode(offline)[0].tolist()


def test_an_event_reaches_the_users_history_and_rows_in_the_store(place: Place, world: World) -> None:
    liked = next(json.loads(message) for message in world.messages(200) if json.loads(message)["clicked"])
    user = "a-user-nobody-has-seen"
    with place.stream(world) as stream:
        service = RankService(world.bundle, place.store)
        assert not service.rank(user, None, 1).known_user
        place.send(place.topics.events, [json.dumps(liked | {"user_id": user}).encode()])
        stream.drain()
        assert service.rank(user, None, 1).known_user
    stored = place.store.read_records(world.bundle.id, record.HISTORY, [user])[0]
    assert stored is not None
    assert record.decode_history(stored).items == [str(liked["item_id"])]


@pytest.mark.parametrize("served_first", [False, True])
def test_an_emptied_store_is_filled_again_from_bundle_and_log(place: Place, world: World, served_first: bool) -> None:
    place.send(place.topics.events, world.messages(300))
    with place.stream(world) as stream:
        stream.drain()
    before = place.store.read_table(world.bundle.id)
    place.store.drop(world.bundle.id)
    if served_first:
        fill_store(place.store, world.bundle)
    with place.stream(world) as stream:
        stream.drain()
    after = place.store.read_table(world.bundle.id)
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
