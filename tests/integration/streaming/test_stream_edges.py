"""The stream at its edges: forgotten positions, large messages, wrong clocks, long numbers, libraries that panic."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from features.errors import LogError
from models.bundle import delta
from models.bundle.bundle import Bundle, LogPosition
from streaming.dead_letter import NEWEST, Filing, encode_dead_letter, put_back, read_dead_letters
from streaming.fold import CLOCKS_MS, Fold, first_deltas
from streaming.item_updates import ItemUpdates
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog, Message, ends_of
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.restore import group_of
from streaming.snapshot import Snapshots
from streaming.step import Step
from streaming.trainer import Trainer, TrainerOptions
from tessera.demo.synthetic import new_item
from tests.chaos.cluster import until
from tests.integration.world import World

OPTIONS = TrainerOptions(batch=32, wait_s=0.2, most_bad=1.0, lateness_s=1e9)


def open_trainer(log: EventLog, bundle: Bundle, topics: Topics, **more: Any) -> Any:
    options = replace(OPTIONS, **more.pop("options", {}))
    return contextlib.closing(Trainer(log, bundle, topics=topics, options=options, **more))


def drained(trainer: Trainer) -> Trainer:
    while not trainer.drained():
        trainer.run_once(wait_s=0.3)
    return trainer


def forget(log: EventLog, bundle: Bundle, topics: Topics, request: pytest.FixtureRequest) -> None:
    """Deletes the group's positions, as a broker does after `offsets.retention.minutes`."""
    groups = [group_of(bundle, topic) for topic in (topics.items, topics.events)]
    if isinstance(log, LocalLog):
        with log._file.write() as connection:
            connection.executemany("DELETE FROM committed WHERE group_id = ?", [(group,) for group in groups])
    else:
        admin = KafkaAdminClient(bootstrap_servers=request.getfixturevalue("kafka_address"))
        admin.delete_groups(groups)
        admin.close()
    assert not any(log.committed([topic], group=group_of(bundle, topic)) for topic in (topics.items, topics.events))


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_forgotten_positions_repeat_nothing(
    log: EventLog, topics: Topics, world: World, tmp_path: Path, request: pytest.FixtureRequest, with_snapshot: bool
) -> None:
    more: dict[str, Any] = {"snapshots": Snapshots(tmp_path / "snapshots")} if with_snapshot else {}
    log.create_topics(topics.partitions())
    messages = world.messages(160)
    log.append(topics.events, [(None, message) for message in messages[:64]])
    log.append(topics.items, [(None, json.dumps(new_item(1)).encode())])
    with open_trainer(log, world.bundle, topics, **more) as trainer:
        drained(trainer).write_snapshot()
        log.append(topics.events, [(None, message) for message in messages[64:128]])
        weight = drained(trainer).step.ranker.table.weight.clone()
    forget(log, world.bundle, topics, request)
    with open_trainer(log, world.bundle, topics, **more) as again:
        assert drained(again).totals.messages == 0
        assert again.step.ranker.table.weight.equal(weight)
        log.append(topics.events, [(None, message) for message in messages[128:]])
        assert drained(again).totals.events == 32


def test_a_group_behind_the_deltas_is_refused_by_name(log: EventLog, topics: Topics, world: World) -> None:
    log.create_topics(topics.partitions())
    log.append(topics.events, [(None, message) for message in world.messages(64)])
    with open_trainer(log, world.bundle, topics) as trainer:
        drained(trainer)
    start = {(topics.events, 0): 10}
    reader = log.reader([topics.events], group=group_of(world.bundle, topics.events), sole=True, start=start)
    with contextlib.closing(reader):
        reader.position()
        reader.commit()
    with pytest.raises(LogError, match=r"position is 10, but the deltas account for messages up to 63"):
        Trainer(log, world.bundle, topics=topics, options=OPTIONS)


def test_a_topic_that_was_made_anew_is_refused_by_name(topics: Topics, world: World, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    for name, count in (("log.db", 64), ("other.db", 10)):
        with contextlib.closing(LocalLog(tmp_path / name)) as log:
            log.create_topics(topics.partitions())
            log.append(topics.events, [(None, message) for message in world.messages(count)])
            if count == 64:
                with open_trainer(log, world.bundle, topics, snapshots=snapshots) as trainer:
                    drained(trainer).write_snapshot()
                continue
            with pytest.raises(LogError, match=r"ends at 10, but the snapshot or the deltas name messages up to 63"):
                Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)


# Size.


def large_items(count: int, size: int) -> list[tuple[bytes | None, bytes]]:
    return [(None, json.dumps(new_item(n) | {"format": "c" * size}).encode()) for n in range(count)]


def test_many_large_items_in_one_batch_are_cut_into_deltas_the_log_takes(
    log: EventLog, topics: Topics, world: World
) -> None:
    log.create_topics(topics.partitions())
    log.append(topics.items, large_items(12, 1_000_000))
    with open_trainer(log, world.bundle, topics) as trainer:
        totals = drained(trainer).totals
    assert (totals.items, totals.bad) == (12, 0)
    sizes = [len(found.value) for found in log.read(topics.deltas, 0, 0, log.end_offsets(topics.deltas)[0])]
    assert max(sizes) <= delta.DELTA_BYTES


def test_a_record_that_the_topic_does_not_take_is_a_letter_and_the_stream_goes_on(
    kafka_address: str, topics: Topics, world: World
) -> None:
    with contextlib.closing(KafkaLog(kafka_address)) as log:
        log.create_topics(topics.partitions())
        admin = KafkaAdminClient(bootstrap_servers=kafka_address)
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topics.deltas, {"max.message.bytes": "600000"})])
        admin.close()
        log.append(topics.items, [*large_items(3, 1_000), *large_items(1, 900_000)])
        log.append(topics.events, [(None, message) for message in world.messages(40)])
        with open_trainer(log, world.bundle, topics) as trainer:
            # The refusal comes with a step of the events under way or done.
            while trainer.run_ahead():
                pass
            totals = drained(trainer).totals
            weight = trainer.step.ranker.table.weight.clone()
            records = dict(trainer.step.items.records)
        assert (totals.items, totals.events, totals.causes) == (3, 40, {"poison": 1})
        until(lambda: len(read_dead_letters(log, topics)) == 1, seconds=10, doing="the letter's coming")
        assert "OversizedError" in read_dead_letters(log, topics)[0].letter.reason
        with open_trainer(log, world.bundle, topics) as again:
            assert again.step.ranker.table.weight.equal(weight)
            assert again.step.items.records == records


def test_ids_too_long_for_a_history_and_long_reasons_and_keys_are_letters_that_fit(
    topics: Topics, world: World, tmp_path: Path
) -> None:
    good = json.loads(world.messages(1)[0])
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        log.append(topics.events, [(None, json.dumps(good | {"item_id": "i" * 1_000_000}).encode())])
        log.append(topics.events, [(b"k" * 7_000_000, b"{" + b"x" * 900_000), (None, json.dumps(good).encode())])
        with open_trainer(log, world.bundle, topics) as trainer:
            assert drained(trainer).totals.causes == {"oversized": 1, "undecodable": 1}
            assert trainer.totals.events == 1
        sizes = [len(found.value) for found in log.read(topics.dead_letters, 0, 0, 10)]
        assert max(sizes) < 4 << 20
        cut = read_dead_letters(log, topics)[0]
        assert len(cut.letter.reason) < 3_000
        with pytest.raises(LogError, match="only the start"):
            put_back(log, topics, [found.number for found in read_dead_letters(log, topics)], {})


# Clocks.


def at(world: World, time_s: float, appended_s: float, offset: int, **more: Any) -> Message:
    row = json.loads(world.messages(1)[0]) | {"time": int(time_s)} | more
    return Message("events", 0, offset, None, json.dumps(row).encode(), int(appended_s * 1_000))


def test_one_clock_that_runs_ahead_makes_no_other_event_late(world: World) -> None:
    step, now = Step(world.bundle, Topics(), lateness_s=3_600), 1_760_000_000
    step.apply([at(world, now, now, 0)])
    ahead = step.apply([at(world, now + 23 * 3_600, now, 1)])
    assert (ahead.events, ahead.bad) == (1, [])
    later = [at(world, now + 3_600 * hour, now + 3_600 * hour, 2 + hour) for hour in range(23)]
    outcomes = [step.apply([message]) for message in later]
    assert [outcome.events for outcome in outcomes] == [1] * 23
    too_late = step.apply([at(world, now, now + 23 * 3_600, 99)])
    assert [bad.cause for bad in too_late.bad] == ["late"]


def test_one_clock_that_runs_ahead_moves_neither_windows_nor_histories(world: World) -> None:
    step, now = Step(world.bundle, Topics(), lateness_s=3_600), 1_760_000_000
    ahead = [at(world, now, now, 0), at(world, now + 23 * 3_600, now, 1)]
    assert step.apply(ahead).events == 2
    state = step.aggregates.state
    assert state.watermark == (now + 300) * 1_000_000
    assert step.apply([at(world, now + 3_600, now + 3_600, 2)]).events == 1
    newest = (now + 3_600) * 1_000_000
    assert state.watermark == max(int(one.rows[:, 0].max()) for one in state.states.values()) == newest
    (visitor,) = step.visitors
    times = step.history_record(visitor).times
    assert times == sorted(times)
    assert times[-1] <= newest


def test_what_was_appended_says_the_same_at_every_replay(world: World) -> None:
    now = 1_760_000_000
    batch = [at(world, now + 3_600 * (n % 5), now + n, n, _event_id=f"e{n % 30}") for n in range(60)]
    states = []
    for messages in (batch, batch[::-1]):
        step = Step(world.bundle, Topics(), lateness_s=3_600)
        step.apply(messages)
        states.append((step.fresh.recent.state(), step.ranker.table.weight.numpy().tobytes()))
    assert states[0] == states[1]


# Numbers, and libraries that panic.


def test_a_number_beyond_64_bits_is_a_letter_and_snapshots_go_on(topics: Topics, world: World, tmp_path: Path) -> None:
    faults = [
        (topics.items, new_item(1) | {"_version": 10**30}),
        (topics.items, new_item(1) | {"_version": -(2**63) - 1}),
        (topics.events, json.loads(world.messages(1)[0]) | {"_event_id": 2**64}),
        (topics.events, json.loads(world.messages(1)[0]) | {"_schema": 10**30}),
    ]
    edges = [
        (topics.items, new_item(2) | {"_version": 2**63 - 1}),
        (topics.items, new_item(3) | {"_version": -(2**63)}),
        (topics.events, json.loads(world.messages(1)[0]) | {"_event_id": 2**64 - 1}),
    ]
    snapshots = Snapshots(tmp_path / "snapshots")
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        for topic, row in [*faults, *edges]:
            log.append(topic, [(None, json.dumps(row).encode())])
        with open_trainer(log, world.bundle, topics, snapshots=snapshots) as trainer:
            totals = drained(trainer).totals
            trainer.write_snapshot()
        assert (totals.items, totals.events, totals.bad) == (2, 1, 4)
        assert snapshots.newest(world.bundle) is not None


def test_a_message_at_which_a_library_panics_is_set_aside_alone(
    topics: Topics, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ItemUpdates.apply

    def apply(updates: ItemUpdates, inbox: Any, outcome: Any) -> Any:
        if any(b"panic" in message.value for message in inbox.messages):
            raise pl.exceptions.PanicException("called `Option::unwrap()` on a `None` value")
        return sound(updates, inbox, outcome)

    monkeypatch.setattr(ItemUpdates, "apply", apply)
    snapshots = Snapshots(tmp_path / "snapshots")
    rows = [new_item(1), new_item(2) | {"item_id": "panic"}, new_item(3)]
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        log.append(topics.items, [(None, json.dumps(row).encode()) for row in rows])
        with open_trainer(log, world.bundle, topics, snapshots=snapshots) as trainer:
            assert drained(trainer).totals.items == 2
            assert trainer.totals.causes == {"poison": 1}
        assert "PanicException" in read_dead_letters(log, topics)[0].letter.reason


# Dead letters.


def letter(number: int) -> bytes:
    return encode_dead_letter(Message("events", 0, number, None, b"{broken" * 100, 0), "undecodable", "because")


def test_a_foreign_message_among_the_letters_is_shown_and_blocks_nothing(log: EventLog, topics: Topics) -> None:
    log.create_topics(topics.partitions())
    foreign = [b"not ours", b"\xff", b'{"kind": "letter"}', b'{"kind": "put-back", "letter": "x"}']
    mended = {0: json.dumps({"a": 1}).encode()}
    source = encode_dead_letter(Message(topics.events, 0, 3, None, b"{", 0), "undecodable", "because")
    log.append(topics.dead_letters, [(None, source), *((None, value) for value in foreign), (None, letter(1))])
    found = read_dead_letters(log, topics)
    assert [filed.letter.cause for filed in found] == ["undecodable", *["unreadable"] * 4, "undecodable"]
    assert [filed.number for filed in found] == [0, 1, 2, 3, 4, 5]
    assert found[1].letter.value == b"not ours"
    assert put_back(log, topics, [], mended) == [0]
    until(lambda: read_dead_letters(log, topics)[0].put_back, seconds=10, doing="the mark's coming")
    assert Filing().read_on(log, topics).waiting == {"undecodable": 1}
    with pytest.raises(LogError, match=r"letter 1: .* no dead letter"):
        put_back(log, topics, [1], {})


def test_letters_are_followed_in_bounded_memory(topics: Topics, tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        filing = Filing()
        for part in range(3):
            log.append(topics.dead_letters, [(None, letter(number)) for number in range(NEWEST)])
            found = filing.read_on(log, topics)
            assert (found.total, found.waiting) == ((part + 1) * NEWEST, {"undecodable": (part + 1) * NEWEST})
        assert [filed.number for filed in found.newest] == list(range(2 * NEWEST, 3 * NEWEST))
        # Marks of letters that are held, and of one that no longer is.
        marks = [b'{"kind":"put-back","letter":%d}' % number for number in (5, 2_999)]
        log.append(topics.dead_letters, [(None, mark) for mark in marks])
        found = filing.read_on(log, topics)
        assert found.waiting == {"undecodable": 3 * NEWEST - 2}
        assert found.newest[-1].put_back
        big = encode_dead_letter(Message("events", 0, 1, None, b"x" * 1_000_000, 0), "invalid", "because")
        log.append(topics.dead_letters, [(None, big)])
        held = filing.read_on(log, topics).newest[-1].letter
        assert len(held.value) < 10_000
        assert held.size_bytes == 1_000_000


# Where a bundle's stream begins.


def with_start(world: World, **fields: Any) -> Bundle:
    return Bundle(world.bundle.directory, msgspec.structs.replace(world.bundle.manifest, **fields))


def test_a_new_bundle_begins_behind_the_positions_of_its_files(
    log: EventLog, topics: Topics, world: World, tmp_path: Path
) -> None:
    log.create_topics(topics.partitions())
    messages = world.messages(80)
    log.append(topics.events, [(None, message) for message in messages[:50]])
    positions = ends_at(log, topics.items, topics.events)
    log.append(topics.events, [(None, message) for message in messages[50:]])
    bundle = with_start(world, positions=positions)
    with open_trainer(log, bundle, topics) as trainer:
        assert drained(trainer).totals.events == 30
        weight = trainer.step.ranker.table.weight.clone()
    with open_trainer(log, bundle, topics) as again:
        assert again.step.ranker.table.weight.equal(weight)
        assert drained(again).totals.messages == 0
    foreign = with_start(world, positions=[replace_identity(place) for place in positions], id="b-foreign")
    with open_trainer(log, foreign, topics) as trainer:
        assert drained(trainer).totals.events == 80


def ends_at(log: EventLog, *names: str) -> list[LogPosition]:
    return [
        LogPosition(topic, log.identity(topic), partition, offset)
        for topic in names
        for partition, offset in log.end_offsets(topic).items()
    ]


def test_a_new_bundle_reads_no_delta_from_before_it_existed(
    log: EventLog, topics: Topics, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.create_topics(topics.partitions())
    messages = world.messages(80)
    log.append(topics.events, [(None, message) for message in messages[:50]])
    with open_trainer(log, with_start(world, id="b-before"), topics) as trainer:
        drained(trainer)
    (end,) = ends_of(log, topics.deltas)
    bundle = with_start(world, positions=ends_at(log, topics.events, topics.deltas))
    log.append(topics.events, [(None, message) for message in messages[50:]])
    with open_trainer(log, bundle, topics) as trainer:
        assert drained(trainer).totals.events == 30
        weight = trainer.step.ranker.table.weight.clone()
    read, starts = log.read, []

    def noted(topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        if topic == topics.deltas:
            starts.append(start)
        return read(topic, partition, start, stop)

    monkeypatch.setattr(log, "read", noted)
    with open_trainer(log, bundle, topics) as again:
        assert again.step.ranker.table.weight.equal(weight)
    fold = Fold(log, bundle, topics)
    assert fold.advance() > 0
    assert np.array_equal(fold.weight, weight.numpy())
    assert starts == [end, end]


def test_the_first_delta_follows_from_positions_or_from_the_time_of_training(
    log: EventLog, topics: Topics, world: World
) -> None:
    log.create_topics(topics.partitions())
    log.append(topics.deltas, [(None, b"one"), (None, b"two")])
    (end,) = ends_of(log, topics.deltas)
    named = ends_at(log, topics.events, topics.deltas)
    now_us = time.time_ns() // 1_000
    hours_us = 2 * 1_000 * CLOCKS_MS
    assert first_deltas(log, with_start(world, positions=named), topics) == (end,)
    foreign = [replace_identity(place) for place in named]
    assert not any(first_deltas(log, with_start(world, positions=foreign, trained_until=None), topics))
    assert not any(first_deltas(log, with_start(world, trained_until=None), topics))
    assert first_deltas(log, with_start(world, trained_until=now_us + hours_us), topics) == (end,)
    if isinstance(log, KafkaLog):
        log.delete_records({(topics.deltas, 0): 1})
    # All that is kept was appended after the training, so deltas of the bundle may have been deleted.
    assert not any(first_deltas(log, with_start(world, trained_until=now_us - hours_us), topics))


def replace_identity(place: LogPosition) -> LogPosition:
    return LogPosition(place.topic, "another", place.partition, place.offset)


def test_a_new_bundle_skips_what_was_appended_before_its_newest_training_event(
    topics: Topics, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_760_000_000.0
    row = json.loads(world.messages(1)[0])

    def send(log: EventLog, appended_s: float, *times_s: float) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: int(appended_s * 1e9))
        log.append(topics.events, [(None, json.dumps(row | {"time": int(moment)}).encode()) for moment in times_s])

    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        send(log, now - 7_200, *[now - 7_200] * 10)
        send(log, now - 60, *[now - 100] * 5)
        # Appended later: late, and new.
        send(log, now + 60, now - 50, now + 50)
        bundle = with_start(world, trained_until=int(now * 1e6))
        with open_trainer(log, bundle, topics) as trainer:
            found = drained(trainer).totals
        assert (found.messages, found.duplicates, found.events) == (7, 5, 2)
        with open_trainer(log, bundle, topics) as again:
            assert drained(again).totals.messages == 0
