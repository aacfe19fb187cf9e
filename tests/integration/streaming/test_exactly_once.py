"""After a crash, a repeat, a second trainer or a bad message: nothing lost, nothing twice, the same bits."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient

from features.errors import FencedError, LogError, StoreError, StreamError
from models.bundle import delta, record
from models.bundle.delta import SNAPSHOT_SEQ
from serving.ranking.mirror import Mirror
from serving.ranking.service import RankService
from serving.store.memory import MemoryStore
from serving.store.protocol import OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.store import RedisStore
from serving.store.verify import replay, verify
from streaming.dead_letter import causes, put_back, read_dead_letters
from streaming.fold import Fold
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog, Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.restore import group_of
from streaming.snapshot import Snapshots
from streaming.step import Step
from streaming.step_state import snapshot_of
from streaming.trainer import Trainer, TrainerOptions
from tessera.demo.synthetic import new_item
from tessera.stream_service import StreamConnections, StreamService
from tests.build import corrected_bundle
from tests.chaos.cluster import until
from tests.integration.world import World

BATCH = 32
FENCED = "after produce"


@pytest.fixture(scope="module")
def world(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The small world, whose bundle corrects new items, so the stream keeps labelled items as well."""
    return replace(world, bundle=corrected_bundle(world.bundle, tmp_path_factory.mktemp("corrected") / "bundle"))


OPTIONS = TrainerOptions(batch=BATCH, wait_s=0.3, most_bad=1.0)


def send(log: EventLog, topics: Topics, messages: list[bytes], *, items: list[bytes] | None = None) -> None:
    log.create_topics(topics.partitions())
    log.append(topics.events, [(None, message) for message in messages])
    log.append(topics.items, [(None, message) for message in items or []])


def drained(trainer: Trainer, *, ahead: bool = False) -> Trainer:
    """Runs to the end of the topics. With `ahead`, the transaction of a batch runs during the step of the next."""
    while not trainer.drained():
        while ahead and trainer.run_ahead():
            pass
        trainer.run_once(wait_s=0.5)
    return trainer


def bits(step: Step) -> dict[str, Any]:
    """The whole state, comparable."""
    snapshot = snapshot_of(step, deltas=(0,), inputs={})
    arrays = {name: array.tobytes() for name, array in snapshot.arrays.items() if not name.startswith("visit")}
    users = step.history.users().tolist()
    return arrays | {
        "seq": step.seq,
        "memory": snapshot.memory,
        "visits": {user: step.history.visits(user) for user in users},
    }


def dated(message: bytes, **more: Any) -> bytes:
    return json.dumps(json.loads(message) | more).encode()


def traffic(world: World, count: int) -> list[bytes]:
    """Events with ids, every fifth of them sent twice, and one in nine broken."""
    found: list[bytes] = []
    for place, message in enumerate(world.messages(count)):
        named = dated(message, _event_id=f"e{place}")
        found.append(named)
        if place % 5 == 0:
            found.append(named)
        if place % 9 == 0:
            found.append(b"{broken")
    return found


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("place", "ahead"),
    [("after produce", False), ("after offsets", False), ("after produce", True), ("after commit", True)],
)
def test_a_crash_inside_the_transaction_leaves_nothing_and_the_run_goes_on_to_the_same_bits(
    log: EventLog, topics: Topics, world: World, tmp_path: Path, place: str, ahead: bool
) -> None:
    messages, items = traffic(world, 300), [json.dumps(new_item(1)).encode()]
    send(log, topics, messages, items=items)
    snapshots = Snapshots(tmp_path / "snapshots")
    visits = 0

    def failpoint(at: str) -> None:
        nonlocal visits
        visits += at == place
        if at == place and visits in (3, 6, 7):
            raise _Killed

    whole, crashes = None, 0
    while whole is None:
        trainer = Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots, failpoint=failpoint)
        try:
            drained(trainer, ahead=ahead)
            whole = bits(trainer.step)
        except _Killed:
            crashes += 1
            if crashes == 2:
                with contextlib.closing(
                    Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)
                ) as between:
                    between.run_once()
                    between.write_snapshot()
        finally:
            with contextlib.suppress(LogError):
                trainer.close()
    assert crashes == 3
    seqs = [delta.decode(message.value) for message in log.read(topics.deltas, 0, 0, log.end_offsets(topics.deltas)[0])]
    sources = sorted((s.topic, s.partition, s.first, s.last) for change in seqs for s in change.sources)
    assert [change.seq for change in seqs if change.sources] == list(range(1, len(seqs) + 1))
    _cover(sources, {topics.events: len(messages), topics.items: len(items)})
    other = Topics(f"{topics.prefix}calm-")
    send(log, other, messages, items=items)
    with contextlib.closing(Trainer(log, world.bundle, topics=other, options=OPTIONS)) as calm:
        assert _without_topics(bits(drained(calm).step)) == _without_topics(whole)
    assert calm.totals.duplicates == 60
    assert calm.totals.causes == {"undecodable": 34}


def _cover(sources: list[tuple[str, int, int, int]], counts: dict[str, int]) -> None:
    """Every message lies in exactly one batch: none lost, none twice."""
    for topic, count in counts.items():
        spans = [(first, last) for name, _, first, last in sources if name == topic]
        assert all(before[1] < after[0] for before, after in pairwise(spans))
        assert sum(last - first + 1 for first, last in spans) >= count


def _without_topics(found: dict[str, Any]) -> dict[str, Any]:
    memory = found["memory"]
    parts = [[partition, newest, buckets] for _, partition, newest, buckets in memory.recent["partitions"]]
    versions = sorted(memory.item_versions)
    return found | {"memory": (memory.users, memory.items, memory.item_records, memory.arrivals, parts, versions)}


def test_a_snapshot_and_the_log_since_are_the_uninterrupted_run(
    log: EventLog, topics: Topics, world: World, tmp_path: Path
) -> None:
    messages = traffic(world, 400)
    send(log, topics, messages[:200], items=[json.dumps(new_item(1)).encode()])
    snapshots = Snapshots(tmp_path / "snapshots")
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)) as first:
        drained(first).write_snapshot()
        send(log, topics, messages[200:300], items=[json.dumps({"item_id": "brand-new", "_deleted": True}).encode()])
        at_stop = bits(drained(first).step)
    found = snapshots.newest(world.bundle)
    assert found is not None
    assert SNAPSHOT_SEQ < found.seq < at_stop["seq"]
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)) as second:
        assert bits(second.step) == at_stop
        send(log, topics, messages[300:])
        with_snapshot = bits(drained(second).step)
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as from_start:
        assert bits(from_start.step) == with_snapshot


def test_deltas_before_the_oldest_snapshot_may_expire(
    kafka_address: str, topics: Topics, world: World, tmp_path: Path
) -> None:
    snapshots = Snapshots(tmp_path / "snapshots", keep=1)
    with contextlib.closing(KafkaLog(kafka_address)) as log:
        send(log, topics, world.messages(200)[:100])
        arguments: dict[str, Any] = {"topics": topics, "options": OPTIONS}
        with contextlib.closing(Trainer(log, world.bundle, **arguments, snapshots=snapshots)) as trainer:
            drained(trainer).write_snapshot()
            send(log, topics, world.messages(200)[100:])
            expected = bits(drained(trainer).step)
        oldest = snapshots.oldest_position(world.bundle)
        assert oldest is not None
        admin = KafkaAdminClient(bootstrap_servers=kafka_address)
        admin.delete_records({TopicPartition(topics.deltas, 0): oldest[0]})
        admin.close()
        with contextlib.closing(Trainer(log, world.bundle, **arguments, snapshots=snapshots)) as again:
            assert bits(again.step) == expected
        with pytest.raises(LogError, match="from a snapshot that is new enough"):
            Trainer(log, world.bundle, **arguments)
        store = MemoryStore()
        connections = StreamConnections.shared(log, store, topics=topics, snapshots=snapshots)
        with StreamService(world.bundle, connections, OPTIONS) as stream:
            stream.drain()
        assert verify(log, world.bundle, store, topics, snapshot=snapshots.newest(world.bundle)).difference == ""


def test_a_damaged_snapshot_is_passed_over_and_old_ones_are_pruned(
    topics: Topics, world: World, tmp_path: Path
) -> None:
    snapshots = Snapshots(tmp_path / "snapshots", keep=2)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(96))
        trainer = Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)
        for _ in range(3):
            trainer.run_once()
            trainer.write_snapshot()
        expected = bits(trainer.step)
        trainer.close()
        kept = sorted((tmp_path / "snapshots" / world.bundle.id).iterdir())
        assert [int(path.name) for path in kept] == [2, 3]
        arrays = kept[-1] / "arrays.safetensors"
        data = bytearray(arrays.read_bytes())
        data[len(data) // 2] ^= 1
        arrays.write_bytes(bytes(data))
        found = snapshots.newest(world.bundle)
        assert found is not None
        assert found.seq == 2
        with contextlib.closing(
            Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)
        ) as again:
            assert bits(again.step) == expected


def test_a_full_disk_costs_the_snapshot_and_nothing_else(topics: Topics, world: World, tmp_path: Path) -> None:
    blocked = tmp_path / "snapshots"
    blocked.write_text("a file where the directory should be")
    options = replace(OPTIONS, snapshot_every_s=1e-9)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(64))
        with contextlib.closing(
            Trainer(log, world.bundle, topics=topics, options=options, snapshots=Snapshots(blocked))
        ) as trainer:
            drained(trainer)
            assert (trainer.totals.events, trainer.totals.failed_snapshots) == (64, 2)
            with pytest.raises(StreamError, match="the snapshot was not written"):
                trainer.write_snapshot()


def test_a_second_trainer_takes_over_and_the_first_is_fenced(log: EventLog, topics: Topics, world: World) -> None:
    send(log, topics, world.messages(64))
    first = Trainer(log, world.bundle, topics=topics, options=OPTIONS)
    first.run_once()
    second = Trainer(log, world.bundle, topics=topics, options=OPTIONS)
    assert second.step.seq == 1
    with pytest.raises(FencedError):
        first.run_once(wait_s=3)
    first.close()
    drained(second)
    second.close()
    total = sum(1 for message in log.read(topics.deltas, 0, 0, log.end_offsets(topics.deltas)[0]) if message.value)
    assert total == second.step.seq


def test_a_commit_under_way_is_fenced_at_the_next_call_and_the_step_beside_it_is_done_again(
    log: EventLog, topics: Topics, world: World
) -> None:
    messages = world.messages(4 * BATCH)
    send(log, topics, messages)
    opened = threading.Event()
    first = Trainer(
        log, world.bundle, topics=topics, options=OPTIONS, failpoint=lambda at: opened.wait() if at == FENCED else None
    )
    assert first.run_ahead() == BATCH
    second = Trainer(log, world.bundle, topics=topics, options=OPTIONS)
    assert second.step.seq == 0
    opened.set()
    with pytest.raises(FencedError):
        first.run_ahead()
    assert first.totals.batches == 0
    first.close()
    assert drained(second, ahead=True).totals.events == len(messages)
    second.close()
    changes = [delta.decode(found.value) for found in log.read(topics.deltas, 0, 0, log.end_offsets(topics.deltas)[0])]
    assert [change.seq for change in changes] == list(range(1, second.step.seq + 1))


def test_trainers_of_one_bundle_on_other_topics_do_not_fence_each_other(
    log: EventLog, topics: Topics, world: World
) -> None:
    both = [topics, Topics(f"other-{topics.prefix}")]
    with contextlib.ExitStack() as stack:
        for own in both:
            send(log, own, world.messages(BATCH))
        trainers = [Trainer(log, world.bundle, topics=own, options=OPTIONS) for own in both]
        for trainer in trainers:
            stack.callback(trainer.close)
        for trainer in trainers:
            assert trainer.run_once(wait_s=5.0) == BATCH


def test_a_moved_position_is_noticed(topics: Topics, world: World, tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(96))
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as trainer:
            trainer.run_once()
        reader = log.reader([topics.events], group=group_of(world.bundle, topics.events))
        reader.poll(10, 0)
        reader.commit()
        with pytest.raises(LogError, match="no delta accounts for message 32"):
            Trainer(log, world.bundle, topics=topics, options=OPTIONS)


def test_late_and_future_events_are_set_aside_and_repeats_are_applied_once(
    topics: Topics, world: World, tmp_path: Path
) -> None:
    base = json.loads(world.messages(1)[0])

    def at(time: str, **more: Any) -> bytes:
        return json.dumps(base | {"time": int(datetime.fromisoformat(time).timestamp())} | more).encode()

    messages = [
        at("2025-03-01T12:00:00Z", _event_id=1),
        at("2025-03-01T11:30:00Z", _event_id="late but within"),
        at("2025-03-01T12:00:01Z", _event_id="1"),
        at("2025-03-01T10:59:59Z", _event_id=2),
        at("2999-01-01T00:00:00Z", _event_id=3),
        at("2025-03-01T10:00:00Z", _event_id=4, _backfill=True),
        at("2025-03-01T10:00:00Z", _event_id=4, _backfill=True),
        at("2025-03-01T10:00:00Z", _event_id=1, _backfill=True),
        at("2025-03-01T12:00:02Z"),
        at("2025-03-01T12:00:02Z"),
    ]
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, messages)
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as trainer:
            totals = drained(trainer).totals
            assert (totals.events, totals.duplicates, totals.causes) == (5, 3, {"late": 1, "future": 1})
            letters = read_dead_letters(log, topics)
            assert [filed.letter.offset for filed in letters] == [4, 3]
            # What is put back is old on purpose.
            put_back(log, topics, [letters[1].number], {})
            drained(trainer)
            assert (totals.events, totals.bad) == (6, 2)


def test_every_kind_of_fault_has_its_cause(topics: Topics, world: World, tmp_path: Path) -> None:
    good = world.messages(1)[0]
    faults = {
        b"{nonsense": "undecodable",
        b"\xff": "undecodable",
        b"{}": "invalid",
        dated(good, _schema=9): "unknown-version",
        b'{"a": "' + b"x" * (1 << 20) + b'"}': "oversized",
    }
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, [*faults, good])
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as trainer:
            drained(trainer)
            assert trainer.totals.events == 1
        filed = read_dead_letters(log, topics)
    assert [one.letter.cause for one in filed] == list(faults.values())
    assert [one.letter.value for one in filed[:4]] == list(faults)[:4]
    assert filed[4].letter.size_bytes == (1 << 20) + 9


def test_a_wrong_topic_stops_the_stream_and_loses_nothing(topics: Topics, world: World, tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, [b'{"metric": "cpu"}'] * 128)
        trainer = Trainer(log, world.bundle, topics=topics, options=replace(OPTIONS, batch=128, most_bad=0.5))
        with pytest.raises(StreamError, match=r"128 of the last 128 messages are faulty.*right topic"):
            trainer.run_once()
        trainer.close()
        assert read_dead_letters(log, topics) == []
        assert log.committed([topics.events], group=group_of(world.bundle, topics.events)) == {}


def test_a_message_at_which_the_step_raises_is_set_aside_alone(
    log: EventLog, topics: Topics, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = world.messages(80)
    poison = [dated(messages[0], _event_id="poison-1"), dated(messages[1], _event_id="poison-2")]
    mixed = [*messages[:10], poison[0], *messages[10:50], poison[1], *messages[50:]]
    send(log, topics, mixed)
    sound = Step.apply

    def apply(step: Step, batch: list[Message], **options: Any) -> Any:
        hidden = options.get("poison", frozenset())
        live = [m for m in batch if (m.topic, m.partition, m.offset) not in hidden]
        if any(b"poison-" in message.value for message in live):
            # Spoils the state first, as a fault in the middle of a step would.
            step.catalogue.number_users(["spoilt"])
            step.ranker.table.weight.fill_(7)
            raise ZeroDivisionError("poison")
        return sound(step, batch, **options)

    monkeypatch.setattr(Step, "apply", apply)
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as trainer:
        drained(trainer)
        found = bits(trainer.step)
        assert trainer.totals.causes == {"poison": 2}
        assert trainer.totals.events == 80
    # A broker shows what was committed a moment after it said so.
    until(lambda: len(read_dead_letters(log, topics)) == len(poison), seconds=10, doing="the letters' coming")
    letters = read_dead_letters(log, topics)
    assert [one.letter.value for one in letters] == poison
    assert all("ZeroDivisionError: poison" in one.letter.reason for one in letters)
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as again:
        assert bits(again.step) == found
    assert "spoilt" not in again.step.catalogue.user_numbers


def test_mended_letters_go_back_exactly_once(log: EventLog, topics: Topics, world: World) -> None:
    good = world.messages(20)
    send(log, topics, [*good[:10], b"{broken", b"{}", *good[10:18]])
    with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)) as trainer:
        drained(trainer)
        # A broker shows what was committed a moment after it said so.
        until(lambda: len(read_dead_letters(log, topics)) == 2, seconds=10, doing="the letters' coming")
        letters = read_dead_letters(log, topics)
        assert causes(letters) == {"undecodable": 1, "invalid": 1}
        numbers = [one.number for one in letters]
        mended = {numbers[0]: good[18], numbers[1]: good[19]}
        assert put_back(log, topics, [], mended) == numbers
        assert put_back(log, topics, numbers, mended) == []
        drained(trainer)
        assert (trainer.totals.events, trainer.totals.bad) == (20, 2)
    assert [one.put_back for one in read_dead_letters(log, topics)] == [True, True]
    with pytest.raises(LogError, match="letter 999: no such letter"):
        put_back(log, topics, [999], {})


@pytest.fixture(params=["memory", "embedded", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Iterator[OnlineStore]:
    made: dict[str, Callable[[], OnlineStore]] = {
        "memory": MemoryStore,
        "embedded": lambda: open_embedded(tmp_path / "redis"),
        "redis": lambda: RedisStore(request.getfixturevalue("redis_address")),
    }
    with contextlib.closing(made[request.param]()) as opened:
        opened.drop(world.bundle.id)
        yield opened
        opened.drop(world.bundle.id)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_the_store_is_the_fold_and_damage_is_found_and_mended(
    store: OnlineStore, topics: Topics, world: World, tmp_path: Path, storage: str
) -> None:
    bundle = world.bundle
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(200), items=[json.dumps(new_item(1)).encode()])
        with StreamService(
            bundle, StreamConnections.shared(log, store, topics=topics, storage=storage), OPTIONS
        ) as stream:
            stream.drain()
            touched = np.flatnonzero(stream.trainer.step.seqs)
        assert store.table(bundle.id).storage == storage
        sound = verify(log, bundle, store, topics)
        assert (sound.difference, sound.rows) == ("", bundle.schema.rows)
        assert sound.records > 100
        assert verify(log, bundle, store, topics, sample=10).rows == 10
        mirror = Mirror(store, bundle.id, bundle.schema.aggregates)
        row = touched[:1]
        seq = store.read_seqs(bundle.id, row)
        store.write_rows(bundle.id, row, seq, np.full((1, bundle.schema.dim), 0.5, dtype=np.float32), again=True)
        damaged = verify(log, bundle, store, topics)
        assert f"row {row[0]}: seq {seq[0]}" in damaged.difference
        replay(log, bundle, store, topics, None)
        assert verify(log, bundle, store, topics).difference == ""
        np.testing.assert_array_equal(mirror.read_rows(touched), store.read_rows(bundle.id, touched))
        user = bundle.history["user_id"][0]
        store.write_records(bundle.id, record.HISTORY, [user], [2**40], [b"nonsense"])
        assert "history" in verify(log, bundle, store, topics).difference


def test_a_lost_store_comes_back_from_snapshot_and_log(
    store: OnlineStore, topics: Topics, world: World, tmp_path: Path
) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(120), items=[json.dumps(new_item(n)).encode() for n in (1, 2)])
        connections = StreamConnections.shared(log, store, topics=topics, snapshots=snapshots)
        with StreamService(world.bundle, connections, OPTIONS) as stream:
            stream.drain()
            stream.trainer.write_snapshot()
            gone = json.dumps({"item_id": new_item(1)["item_id"], "_deleted": True}).encode()
            send(log, topics, world.messages(200)[120:], items=[gone])
            stream.drain()
        store.drop(world.bundle.id)
        with pytest.raises(StoreError, match="not loaded"):
            verify(log, world.bundle, store, topics, sample=1)
        with StreamService(world.bundle, connections, OPTIONS) as stream:
            stream.drain()
        assert verify(log, world.bundle, store, topics).difference == ""
        service = RankService(world.bundle, store)
        names = [new_item(n)["item_id"] for n in (1, 2)]
        assert service.rank("anyone", names, 2).unknown_items == names[:1]


def test_a_fold_from_a_snapshot_is_the_fold_from_the_bundle(topics: Topics, world: World, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    gone = json.dumps({"item_id": new_item(1)["item_id"], "_deleted": True}).encode()
    stranger = dated(world.messages(150)[-1], user_id="stranger", item_id="never seen", clicked=1)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, [*world.messages(150), stranger], items=[json.dumps(new_item(n)).encode() for n in (1, 2)])
        arguments: dict[str, Any] = {"topics": topics, "options": OPTIONS, "snapshots": snapshots}
        with contextlib.closing(Trainer(log, world.bundle, **arguments)) as trainer:
            drained(trainer)
            send(log, topics, [], items=[gone])
            drained(trainer).write_snapshot()
        folded, snapshot = Fold(log, world.bundle, topics), snapshots.newest(world.bundle)
        assert snapshot is not None
        assert folded.advance() > 1
        started = Fold(log, world.bundle, topics, snapshot)
        assert started.advance() == 0
    np.testing.assert_array_equal(started.weight, folded.weight)
    np.testing.assert_array_equal(started.seqs, folded.seqs)
    kinds = (record.ITEM, record.HISTORY)
    one, two = ({key: data for key, (_, data) in fold.records.items() if key[0] in kinds} for fold in (started, folded))
    assert one == two
    assert one[record.ITEM, new_item(1)["item_id"]] == record.TOMBSTONE
    assert "never seen" in record.decode_history(one[record.HISTORY, "stranger"]).items


def test_a_deleted_item_leaves_store_index_and_candidates_and_stays_away(
    store: OnlineStore, topics: Topics, world: World, tmp_path: Path
) -> None:
    bundle, name = world.bundle, new_item(1)["item_id"]
    published = bundle.items["item_id"][0]
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, [], items=[json.dumps(new_item(1) | {"_version": 5}).encode()])
        with StreamService(bundle, StreamConnections.shared(log, store, topics=topics), OPTIONS) as stream:
            stream.drain()
            service = RankService(bundle, store)
            count = service.items
            assert name in {near for near, _ in service.similar(published, count)}
            gone = [
                {"item_id": name, "_deleted": True, "_version": 7},
                {"item_id": published, "_deleted": True},
                new_item(1) | {"_version": 6},
            ]
            send(log, topics, [], items=[json.dumps(message).encode() for message in gone])
            stream.drain()
            service.refresh()
            assert service.items == count - 2
            assert service.rank("anyone", [name, published], 2).unknown_items == [name, published]
            other = bundle.items["item_id"][1]
            assert not {name, published} & {near for near, _ in service.similar(other, count)}
            assert published not in {item for item, _ in service.rank("anyone", None, count).items}
            assert stream.trainer.totals.stale == 1
            assert store.read_records(bundle.id, record.ITEM, [name]) == [record.TOMBSTONE]
            fresh = RankService(bundle, store)
            assert fresh.rank("anyone", [name, published], 2).unknown_items == [name, published]
            send(log, topics, [], items=[json.dumps(new_item(1) | {"_version": 8}).encode()])
            stream.drain()
            service.refresh()
            assert service.rank("anyone", [name], 1).unknown_items == []
        assert verify(log, bundle, store, topics).difference == ""
