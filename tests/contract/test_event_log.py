"""The contract of event logs, run against each implementation.

An implementation joins by one entry in `OPEN`. The tests use topics and groups of their own, so that they can share a
broker with other runs.
"""

import contextlib
import random
import re
import sqlite3
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from features.errors import FencedError, LogError, OversizedError
from streaming.log.client import Membership
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import MESSAGE_BYTES, EventLog, Kept, Message, Reader, advanced, ends_of
from streaming.log.sqlite import LocalLog

OPEN: dict[str, Callable[[pytest.FixtureRequest], EventLog]] = {
    "local": lambda request: LocalLog(request.getfixturevalue("tmp_path") / "log.sqlite"),
    "kafka": lambda request: KafkaLog(request.getfixturevalue("kafka_address"), client="kafka-python"),
    "librdkafka": lambda request: KafkaLog(request.getfixturevalue("kafka_address"), client="librdkafka"),
}

CLIENTS = ("kafka-python", "librdkafka")
Opener = Callable[[], EventLog]


@pytest.fixture(params=sorted(OPEN))
def open_log(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens the same log afresh at each call, as another process would."""
    opened: list[EventLog] = []

    def opener() -> EventLog:
        opened.append(OPEN[request.param](request))
        return opened[-1]

    yield opener
    for log in opened:
        log.close()


@pytest.fixture
def log(open_log: Opener) -> EventLog:
    return open_log()


def name(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:12]}"


def new_topic(log: EventLog, partitions: int = 1) -> str:
    topic = name("topic")
    log.create_topics({topic: partitions})
    return topic


def take(reader: Reader, expected: int, within_s: float = 30.0) -> list[Message]:
    """Polls until the expected number is there, and a little longer, so that surplus messages show."""
    deadline = time.monotonic() + within_s
    messages: list[Message] = []
    while len(messages) < expected and time.monotonic() < deadline:
        messages += reader.poll(expected - len(messages), 1.0)
    return messages + reader.poll(1000, 0.3)


def values(messages: list[Message]) -> list[bytes]:
    return [message.value for message in messages]


def settled(log: EventLog, topic: str, end: int) -> dict[int, int]:
    """End offsets, once partition 0 has reached `end`: a transaction shows within milliseconds, not at once."""
    deadline = time.monotonic() + 10
    while (ends := log.end_offsets(topic))[0] < end and time.monotonic() < deadline:
        time.sleep(0.01)
    return ends


PAYLOADS = [b"", b"\x00", bytes(range(256)), "größe 日本".encode(), random.Random(7).randbytes(1_000_000), b"last"]


def test_what_is_appended_is_read_back_byte_for_byte_in_order(log: EventLog) -> None:
    topic = new_topic(log)
    sent = [(None if i % 2 else f"k{i}".encode(), value) for i, value in enumerate(PAYLOADS)]
    before_ms = time.time_ns() // 1_000_000
    log.append(topic, sent)
    with closing(log.reader([topic], group=name("group"))) as reader:
        got = take(reader, len(sent))
    assert [(message.key, message.value) for message in got] == sent
    assert [message.offset for message in got] == list(range(len(sent)))
    assert {(message.topic, message.partition) for message in got} == {(topic, 0)}
    assert all(before_ms - 1000 <= message.timestamp_ms <= time.time_ns() // 1_000_000 + 1000 for message in got)
    assert list(log.read(topic, 0, 0, len(sent))) == got


def test_one_key_stays_in_one_partition_and_in_order(log: EventLog) -> None:
    topic = new_topic(log, 4)
    log.append(topic, [(f"user{i % 10}".encode(), str(i).encode()) for i in range(200)])
    log.append(topic, [(f"user{i % 10}".encode(), str(i).encode()) for i in range(200, 300)])
    with closing(log.reader([topic], group=name("group"))) as reader:
        got = take(reader, 300)
    by_key: dict[bytes | None, list[Message]] = defaultdict(list)
    for message in got:
        by_key[message.key].append(message)
    assert len(got) == 300
    assert len({message.partition for message in got}) > 1
    for messages in by_key.values():
        assert len({message.partition for message in messages}) == 1
        assert [int(message.value) for message in messages] == sorted(int(message.value) for message in messages)


def test_messages_without_a_key_are_spread_evenly(log: EventLog) -> None:
    topic = new_topic(log, 4)
    log.append(topic, [(None, b"x")] * 40)
    assert log.end_offsets(topic) == {0: 10, 1: 10, 2: 10, 3: 10}


def test_a_position_is_the_next_offset_to_read(log: EventLog) -> None:
    topic, group = new_topic(log), name("group")
    log.append(topic, [(None, str(i).encode()) for i in range(10)])
    with closing(log.reader([topic], group=group)) as reader:
        assert reader.position() == {(topic, 0): 0}
        first = reader.poll(4, 20.0)
        assert [message.offset for message in first] == [0, 1, 2, 3]
        assert reader.position() == {(topic, 0): 4}
        assert log.committed([topic], group=group) == {}
        reader.commit()
        assert log.committed([topic], group=group) == {(topic, 0): 4}
        assert [message.offset for message in take(reader, 6)] == [4, 5, 6, 7, 8, 9]
        assert reader.position() == {(topic, 0): 10} == {(topic, n): end for n, end in log.end_offsets(topic).items()}


def test_a_new_reader_goes_on_behind_the_commit_and_repeats_what_was_not_committed(open_log: Opener) -> None:
    log = open_log()
    topic, group = new_topic(log, 2), name("group")
    log.append(topic, [(f"k{i}".encode(), str(i).encode()) for i in range(20)])
    with closing(log.reader([topic], group=group)) as reader:
        committed = take(reader, 20)
        reader.commit()
        log.append(topic, [(f"k{i}".encode(), str(i).encode()) for i in range(20, 30)])
        uncommitted = take(reader, 10)
    with closing(open_log().reader([topic], group=group)) as reader:
        again = take(reader, 10)
    assert sorted(values(committed)) == sorted(str(i).encode() for i in range(20))
    assert sorted(values(again)) == sorted(values(uncommitted)) == sorted(str(i).encode() for i in range(20, 30))


def test_groups_do_not_see_each_other(log: EventLog) -> None:
    topic, one, other = new_topic(log), name("group"), name("group")
    log.append(topic, [(None, b"a"), (None, b"b")])
    with closing(log.reader([topic], group=one)) as reader:
        assert values(take(reader, 2)) == [b"a", b"b"]
        reader.commit()
    with closing(log.reader([topic], group=other)) as reader:
        assert values(take(reader, 2)) == [b"a", b"b"]
    assert log.committed([topic], group=one) == {(topic, 0): 2}
    assert log.committed([topic], group=other) == {}


def test_one_reader_reads_several_topics(log: EventLog) -> None:
    items, events = new_topic(log, 2), new_topic(log, 3)
    log.append(items, [(None, b"item")])
    log.append(events, [(None, b"event")])
    with closing(log.reader([items, events], group=name("group"))) as reader:
        assert sorted((message.topic, message.value) for message in take(reader, 2)) == sorted(
            [(items, b"item"), (events, b"event")]
        )
        assert set(reader.position()) == {(items, n) for n in range(2)} | {(events, n) for n in range(3)}


def test_a_transaction_shows_messages_and_positions_together(open_log: Opener) -> None:
    log, other = open_log(), open_log()
    source, sink, group = new_topic(log), new_topic(log), name("group")
    log.append(source, [(None, b"1"), (None, b"2")])
    with (
        closing(log.reader([source], group=group)) as reader,
        closing(other.reader([sink], group=name("group"))) as watcher,
        closing(log.transactor(name("txn"))) as transactor,
    ):
        read = take(reader, 2)
        with transactor.begin() as transaction:
            for message in read:
                transaction.append(sink, message.value * 2, key=b"k")
            transaction.commit_offsets(reader)
            assert watcher.poll(10, 0.5) == []
            assert other.end_offsets(sink) == {0: 0}
        assert values(take(watcher, 2)) == [b"11", b"22"]
        assert other.committed([source], group=group) == {(source, 0): 2}
        reader.rewind()
        assert reader.position() == {(source, 0): 2}


class BodyError(Exception):
    pass


def test_an_abort_leaves_nothing_and_rewind_brings_the_messages_again(log: EventLog) -> None:
    source, sink, group = new_topic(log), new_topic(log), name("group")
    log.append(source, [(None, b"1"), (None, b"2")])
    with (
        closing(log.reader([source], group=group)) as reader,
        closing(log.reader([sink], group=name("group"))) as watcher,
        closing(log.transactor(name("txn"))) as transactor,
    ):
        first = take(reader, 2)

        def attempt(fail: bool) -> None:
            with transactor.begin() as transaction:
                transaction.append(sink, b"failed" if fail else b"kept")
                transaction.commit_offsets(reader)
                if fail:
                    raise BodyError

        with pytest.raises(BodyError):
            attempt(fail=True)
        assert reader.position() == {(source, 0): 2}
        assert log.committed([source], group=group) == {}
        reader.rewind()
        assert take(reader, 2) == first
        attempt(fail=False)
        assert values(take(watcher, 1)) == [b"kept"]
        assert log.committed([source], group=group) == {(source, 0): 2}


def test_the_position_reaches_the_end_also_behind_an_aborted_tail(log: EventLog) -> None:
    topic = new_topic(log)
    log.append(topic, [(None, b"kept")])

    def abort() -> None:
        with closing(log.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
            transaction.append(topic, b"dropped")
            raise BodyError

    with pytest.raises(BodyError):
        abort()
    with closing(log.reader([topic], group=name("group"))) as reader:
        assert values(take(reader, 1)) == [b"kept"]
        deadline = time.monotonic() + 10
        while reader.position()[topic, 0] < log.end_offsets(topic)[0] and time.monotonic() < deadline:
            assert reader.poll(10, 0.1) == []
        assert reader.position()[topic, 0] == log.end_offsets(topic)[0]
    assert values(list(log.read(topic, 0, 0, 1_000))) == [b"kept"]


def test_transactions_one_after_another_keep_their_order(log: EventLog) -> None:
    topic = new_topic(log)
    with closing(log.transactor(name("txn"))) as transactor:
        for i in range(10):
            with transactor.begin() as transaction:
                transaction.append(topic, str(i).encode())
        with transactor.begin():
            pass
    with closing(log.reader([topic], group=name("group"))) as reader:
        assert values(take(reader, 10)) == [str(i).encode() for i in range(10)]


def test_a_newer_transactor_fences_the_older_one(open_log: Opener) -> None:
    log = open_log()
    topic, txn = new_topic(log), name("txn")

    def write(transactor_value: bytes) -> None:
        with older.begin() as transaction:
            transaction.append(topic, transactor_value)

    with closing(log.transactor(txn)) as older:
        write(b"older")
        with closing(open_log().transactor(txn)) as newer:
            with pytest.raises(FencedError, match=txn):
                write(b"zombie")
            with pytest.raises(FencedError):
                write(b"zombie again")
            with newer.begin() as transaction:
                transaction.append(topic, b"newer")
            with closing(log.reader([topic], group=name("group"))) as reader:
                assert values(take(reader, 2)) == [b"older", b"newer"]


def test_a_transactor_fenced_inside_its_transaction_commits_nothing_of_it(open_log: Opener) -> None:
    log = open_log()
    source, sink, txn, group = new_topic(log), new_topic(log), name("txn"), name("group")
    log.append(source, [(None, b"1")])

    def write_and_be_overtaken() -> None:
        with older.begin() as transaction:
            transaction.append(sink, b"before")
            transaction.commit_offsets(reader)
            open_log().transactor(txn).close()
            transaction.append(sink, b"after")

    with closing(log.reader([source], group=group)) as reader, closing(log.transactor(txn)) as older:
        assert len(take(reader, 1)) == 1
        with pytest.raises(FencedError):
            write_and_be_overtaken()
        with closing(log.transactor(txn)) as newest, newest.begin() as transaction:
            transaction.append(sink, b"newest")
    with closing(log.reader([sink], group=name("group"))) as watcher:
        assert values(take(watcher, 1)) == [b"newest"]
    assert log.committed([source], group=group) == {}


def test_a_second_transaction_cannot_open_inside_the_first(log: EventLog) -> None:
    topic = new_topic(log)
    with closing(log.transactor(name("txn"))) as transactor:
        with transactor.begin() as transaction:
            transaction.append(topic, b"outer")
            with pytest.raises(LogError, match="open already"), transactor.begin():
                pass
        assert settled(log, topic, 1)[0] >= 1


def test_read_yields_the_range_and_ends(log: EventLog) -> None:
    topic = new_topic(log, 2)
    log.append(topic, [(b"same", str(i).encode()) for i in range(3000)])
    (partition,) = [n for n, end in log.end_offsets(topic).items() if end]
    assert [m.offset for m in log.read(topic, partition, 1500, 2600)] == list(range(1500, 2600))
    assert [m.offset for m in log.read(topic, partition, 2990, 9999)] == list(range(2990, 3000))
    assert list(log.read(topic, partition, 5, 5)) == []
    assert list(log.read(topic, 1 - partition, 0, 100)) == []
    assert [next(log.read(topic, partition, 7, 9)).value for _ in range(2)] == [b"7", b"7"]


def test_read_ends_in_spite_of_gaps_that_transactions_leave(log: EventLog) -> None:
    topic = new_topic(log)
    with closing(log.transactor(name("txn"))) as transactor:
        for i in range(5):
            with transactor.begin() as transaction:
                transaction.append(topic, str(i).encode())
    end = settled(log, topic, 5)[0]
    with closing(log.reader([topic], group=name("group"))) as reader:
        got = take(reader, 5)
    for start in range(end + 1):
        for stop in range(start, end + 2):
            assert list(log.read(topic, 0, start, stop)) == [m for m in got if start <= m.offset < stop]


def test_poll_returns_at_the_count_or_at_the_time(log: EventLog) -> None:
    topic = new_topic(log)
    with closing(log.reader([topic], group=name("group"))) as reader:
        assert reader.poll(5, 0.0) == []
        began = time.monotonic()
        assert reader.poll(5, 0.6) == []
        assert 0.5 <= time.monotonic() - began < 1.6
        log.append(topic, [(None, b"a")] * 7)
        began = time.monotonic()
        assert len(reader.poll(5, 30.0)) == 5
        assert time.monotonic() - began < 10.0
        assert len(reader.poll(5, 1.0)) == 2


def test_messages_that_are_given_back_come_again_and_are_not_committed(log: EventLog) -> None:
    topic, group = new_topic(log), name("group")
    log.append(topic, [(None, b"%d" % number) for number in range(6)])
    with closing(log.reader([topic], group=group, sole=True)) as reader:
        messages = []
        while len(messages) < 5:
            messages += reader.poll(5 - len(messages), 1.0)
        reader.unread(messages[2:])
        assert reader.position() == {(topic, 0): 2}
        reader.commit()
        assert values(take(reader, 4)) == [b"2", b"3", b"4", b"5"]
    with closing(log.reader([topic], group=group, sole=True)) as reader:
        assert values(take(reader, 4)) == [b"2", b"3", b"4", b"5"]


def test_positions_are_those_of_returned_messages_whatever_is_read_ahead(log: EventLog) -> None:
    topic, group, chance = new_topic(log, 3), name("group"), random.Random(5)
    log.append(topic, [(b"%d" % (number % 7), b"%d" % number) for number in range(60)])
    kept: list[Message] = []
    for _ in range(20):
        if len(kept) == 60:
            break
        with closing(log.reader([topic], group=group, sole=True)) as reader:
            for _ in range(8):
                messages = reader.poll(chance.randint(1, 9), chance.choice([0.0, 0.3]))
                cut = chance.randint(0, len(messages))
                reader.unread(messages[cut:])
                read = kept + messages[:cut]
                counts = Counter(message.partition for message in read)
                assert reader.position() == {(topic, number): counts[number] for number in range(3)}
                if chance.random() < 0.3:
                    reader.rewind()
                else:
                    reader.commit()
                    kept = read
    assert sorted(int(value) for value in values(kept)) == list(range(60))
    for number in range(3):
        offsets = [message.offset for message in kept if message.partition == number]
        assert offsets == list(range(len(offsets)))


def test_poll_gathers_what_arrives_while_it_waits(open_log: Opener) -> None:
    log, writer = open_log(), open_log()
    topic = new_topic(log)

    def write() -> None:
        for i in range(5):
            time.sleep(0.05)
            writer.append(topic, [(None, str(i).encode())])

    with closing(log.reader([topic], group=name("group"))) as reader:
        assert reader.poll(1, 0.0) == []
        thread = threading.Thread(target=write)
        thread.start()
        got = reader.poll(5, 20.0)
        thread.join()
    assert values(got) == [b"0", b"1", b"2", b"3", b"4"]


def test_writers_at_the_same_time_lose_nothing(open_log: Opener) -> None:
    log = open_log()
    topic = new_topic(log, 2)
    writers = [open_log() for _ in range(3)]

    def write(number: int) -> None:
        for i in range(20):
            writers[number].append(topic, [(f"w{number}".encode(), str(i).encode())])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with closing(log.reader([topic], group=name("group"))) as reader:
        got = take(reader, 60)
    for number in range(3):
        assert [int(m.value) for m in got if m.key == f"w{number}".encode()] == list(range(20))


def test_a_follower_reads_from_its_position_on_and_shares_nothing(open_log: Opener) -> None:
    log, writer = open_log(), open_log()
    topic = new_topic(log)
    log.append(topic, [(None, str(n).encode()) for n in range(5)])
    with closing(log.follow(topic, (2,))) as one, closing(log.follow(topic, (0,))) as other:
        assert values(one.poll(10, 5)) == [b"2", b"3", b"4"]
        assert one.poll(10, 0.05) == []
        with closing(writer.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
            transaction.append(topic, b"5")
        assert values(one.poll(10, 10)) == [b"5"]
        assert values(other.poll(3, 5)) == [b"0", b"1", b"2"]
    with pytest.raises(LogError, match="max_messages"):
        one.poll(0, 0)


def test_a_follower_reads_every_partition_from_its_own_position_on(open_log: Opener) -> None:
    log = open_log()
    topic = new_topic(log, 3)
    with closing(log.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
        for number in (0, 1, 2, 2, 0, 2):
            transaction.append(topic, str(number).encode(), key=b"same", partition=number)
    assert ends_of(log, topic)[1] <= 2
    for number, count in enumerate((2, 1, 3)):
        assert values(list(log.read(topic, number, 0, 10))) == [str(number).encode()] * count
    with closing(log.follow(topic, (0, 1))) as follower:
        found: list[Message] = []
        while len(found) < 5 and (read := follower.poll(10, 5)):
            found += read
        assert sorted(values(found)) == [b"0", b"0", b"2", b"2", b"2"]
        assert follower.poll(10, 0.05) == []
        assert [one.offset for one in found if one.partition == 2] == [0, 1, 2]
        assert advanced((0, 1), found) == (2, 1, 3)


def test_a_partition_that_does_not_exist_is_refused(open_log: Opener) -> None:
    log = open_log()
    topic = new_topic(log, 2)
    with closing(log.transactor(name("txn"))) as transactor:
        with pytest.raises(LogError, match="has partitions 0 to 1, got 2"), transactor.begin() as transaction:
            transaction.append(topic, b"x", partition=2)


def test_a_transaction_sets_the_positions_of_a_group_that_nobody_has_joined(log: EventLog) -> None:
    source, sink, group = new_topic(log, 2), new_topic(log), name("group")
    log.append(source, [(str(n).encode(), str(n).encode()) for n in range(20)])
    identity = name("txn")
    with closing(log.transactor(identity)) as transactor:

        def fail() -> None:
            with transactor.begin() as transaction:
                transaction.commit_positions(group, {(source, 0): 4})
                raise BodyError

        with transactor.begin() as transaction:
            transaction.append(sink, b"1")
            transaction.commit_positions(group, {(source, 0): 3})
        with transactor.begin() as transaction:
            transaction.commit_positions(group, {(source, 1): 2})
        assert log.committed([source], group=group) == {(source, 0): 3, (source, 1): 2}
        with pytest.raises(BodyError):
            fail()
        assert log.committed([source], group=group) == {(source, 0): 3, (source, 1): 2}
        with closing(log.transactor(identity)), pytest.raises(FencedError), transactor.begin() as transaction:
            transaction.commit_positions(group, {(source, 0): 5})
    assert log.committed([source], group=group) == {(source, 0): 3, (source, 1): 2}


def test_sole_readers_wait_for_nobody_and_read_all_from_the_committed_positions(open_log: Opener) -> None:
    log, group = open_log(), name("group")
    topic = new_topic(log, 2)
    log.append(topic, [(str(n).encode(), str(n).encode()) for n in range(20)])
    with closing(log.reader([topic], group=group, sole=True)) as first:
        assert len(take(first, 20)) == 20
        # The first one lives on, and is not asked.
        with closing(open_log().reader([topic], group=group, sole=True)) as second:
            assert len(take(second, 20)) == 20
            with closing(log.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
                transaction.commit_offsets(first)
            second.rewind()
            assert second.position() == first.position() == log.committed([topic], group=group)
            log.append(topic, [(None, b"more")])
            assert values(take(second, 1)) == [b"more"]
            second.commit()
        first.rewind()
        assert first.poll(10, 0.2) == []


def test_a_sole_reader_may_start_where_it_says(open_log: Opener) -> None:
    log, group = open_log(), name("group")
    topic = new_topic(log, 2)
    log.append(topic, [(str(n).encode(), str(n).encode()) for n in range(20)])
    ends = log.end_offsets(topic)
    start = {(topic, part): end - 1 for part, end in ends.items()}
    with closing(log.reader([topic], group=group, sole=True, start=start)) as reader:
        assert reader.position() == start
        found = take(reader, 2)
        assert {(one.partition, one.offset) for one in found} == {(part, end - 1) for part, end in ends.items()}
        assert reader.position() == {(topic, part): end for part, end in ends.items()}
    # A partition that is not named starts where the group stands: at the beginning.
    with closing(log.reader([topic], group=group, sole=True, start={(topic, 0): ends[0]})) as reader:
        assert {one.partition for one in take(reader, ends[1])} == {1}


def test_a_topic_may_keep_less_on_a_broker_and_the_embedded_log_says_that_it_keeps_all(log: EventLog) -> None:
    topic, compacted = name("topic"), name("topic")
    kept = {topic: Kept(seconds=3_600), compacted: Kept(newest_by_key=True)}
    if isinstance(log, LocalLog):
        with pytest.raises(LogError, match="keeps everything"):
            log.create_topics({topic: 1, compacted: 1}, kept)
        return
    log.create_topics({topic: 1, compacted: 1}, kept)
    assert isinstance(log, KafkaLog)
    assert log.settings(topic)["retention.ms"] == "3600000"
    assert log.settings(compacted)["cleanup.policy"] == "compact"


def test_creating_topics_again_changes_nothing(log: EventLog) -> None:
    topic, more = new_topic(log, 3), name("topic")
    log.append(topic, [(None, b"kept")] * 3)
    log.create_topics({topic: 5, more: 2})
    log.create_topics({})
    assert log.end_offsets(topic) == {0: 1, 1: 1, 2: 1}
    assert log.end_offsets(more) == {0: 0, 1: 0}


def test_a_topic_that_cannot_be_is_refused_by_name(log: EventLog) -> None:
    for bad, count in {"two words": 1, "": 1, "..": 1, "fine": 0}.items():
        with pytest.raises(LogError, match=re.escape(repr(bad))):
            log.create_topics({bad: count})


def test_an_unknown_topic_is_named_with_those_that_exist(log: EventLog) -> None:
    known, unknown = new_topic(log), name("topic")

    def append_in_transaction() -> None:
        with closing(log.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
            transaction.append(unknown, b"x")

    calls: list[Callable[[], object]] = [
        lambda: log.append(unknown, [(None, b"x")]),
        lambda: log.reader([known, unknown], group="g"),
        lambda: log.committed([unknown], group="g"),
        lambda: log.end_offsets(unknown),
        lambda: log.read(unknown, 0, 0, 1),
        lambda: log.follow(unknown, (0,)),
        append_in_transaction,
    ]
    for call in calls:
        with pytest.raises(LogError, match=f"{unknown}' does not exist; there is .*topic-"):
            call()
    with pytest.raises(LogError, match="partitions 0 to 0, got 1"):
        log.read(known, 1, 0, 1)


def test_arguments_that_could_never_return_are_refused(log: EventLog) -> None:
    with closing(log.reader([new_topic(log)], group=name("group"))) as reader:
        with pytest.raises(LogError, match="max_messages"):
            reader.poll(0, 1.0)
        with pytest.raises(LogError, match="timeout_s"):
            reader.poll(1, -1.0)


# What only one of them has.


@pytest.mark.parametrize("client", CLIENTS)
def test_kafka_readers_of_a_group_share_partitions_and_commit_only_their_own(kafka_address: str, client: str) -> None:
    with closing(KafkaLog(kafka_address, client=client)) as log:
        topic, group = new_topic(log, 2), name("group")
        log.append(topic, [(None, str(i).encode()) for i in range(10)])
        with (
            closing(log.reader([topic], group=group)) as first,
            closing(log.reader([topic], group=group)) as second,
        ):
            assert len(take(first, 10)) == 10
            got: list[Message] = []
            thread = threading.Thread(target=lambda: got.extend(take(second, 5)))
            thread.start()
            deadline = time.monotonic() + 30
            while len(first.position()) == 2 and time.monotonic() < deadline:
                first.poll(10, 0.2)
            with pytest.raises(LogError, match="partitions were reassigned"):
                first.commit()
            with (
                closing(log.transactor(name("txn"))) as transactor,
                pytest.raises(LogError, match="partitions were reassigned"),
                transactor.begin() as transaction,
            ):
                transaction.commit_offsets(first)
            first.rewind()
            rest = take(first, 5)
            thread.join()
            first.commit()
            assert sorted(int(value) for value in values(rest + got)) == list(range(10))


class LostReader:
    """Reader that does not know that its group has moved on."""

    def __init__(self, reader: Reader, group: str) -> None:
        self._reader, self._group = reader, group

    def membership(self) -> Membership:
        return Membership(self._group, 3, "a member of long ago")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


@pytest.mark.parametrize("client", CLIENTS)
def test_the_broker_refuses_positions_of_a_member_that_the_group_has_lost(kafka_address: str, client: str) -> None:
    with closing(KafkaLog(kafka_address, client=client)) as log:
        topic, sink, group = new_topic(log), new_topic(log), name("group")
        log.append(topic, [(None, b"1")])
        with closing(log.reader([topic], group=group)) as reader, closing(log.transactor(name("txn"))) as transactor:
            take(reader, 1)
            lost = cast(Reader, LostReader(reader, group))

            def commit_lost() -> None:
                with transactor.begin() as transaction:
                    transaction.append(sink, b"lost")
                    transaction.commit_offsets(lost)

            with pytest.raises(LogError, match=r"(?i)unknown.?member|illegal.?generation|CommitFailed"):
                commit_lost()
            assert log.committed([topic], group=group) == {}
            with transactor.begin() as transaction:
                transaction.append(sink, b"kept")
                transaction.commit_offsets(reader)
        assert log.committed([topic], group=group) == {(topic, 0): 1}
        assert values(list(log.read(sink, 0, 0, 10))) == [b"kept"]


def test_a_key_has_one_partition_whichever_client_writes(kafka_address: str) -> None:
    keys = [b"", b"\x00", *(b"user-%d" % number for number in range(40)), "größe".encode()]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(closing(KafkaLog(kafka_address, client=client))) for client in CLIENTS]
        topic, found = new_topic(logs[0], 5), dict[bytes | None, set[int]]()
        for log in logs:
            with closing(log.transactor(name("txn"))) as transactor, transactor.begin() as transaction:
                for key in keys:
                    transaction.append(topic, b"x", key=key)
        logs[0].append(topic, [(key, b"x") for key in keys])
        settled(logs[0], topic, 1)
        with closing(logs[0].reader([topic], group=name("group"))) as reader:
            for message in take(reader, 3 * len(keys)):
                found.setdefault(message.key, set()).add(message.partition)
    assert set(found) == set(keys)
    assert {key: places for key, places in found.items() if len(places) > 1} == {}


def test_kafka_says_which_option_or_address_is_wrong(kafka_address: str) -> None:
    with pytest.raises(LogError, match="did you mean 'security_protocol'"):
        KafkaLog(kafka_address, security_protokol="SSL")
    with pytest.raises(LogError, match=r"127\.0\.0\.1:1"):
        KafkaLog("127.0.0.1:1")
    with pytest.raises(LogError, match="expected host:port"):
        KafkaLog("broker")


def test_a_file_that_is_no_event_log_is_refused(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "text", tmp_path / "other", tmp_path / "newer"
    text.write_text("not a database " * 100)
    for path, statement in ((other, "CREATE TABLE theirs (x)"), (newer, "PRAGMA user_version = 99")):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()
    for path, reason in ((text, "not a database"), (other, "another program"), (newer, "format 1, got 99")):
        with pytest.raises(LogError, match=reason):
            LocalLog(path)


def test_a_sole_reader_begins_where_it_is_told_and_does_not_go_back_before(open_log: Opener) -> None:
    log, group = open_log(), name("group")
    topic = new_topic(log)
    log.append(topic, [(None, str(n).encode()) for n in range(10)])
    with closing(log.reader([topic], group=group, sole=True)) as other:
        take(other, 10)
        other.commit()
    with closing(log.reader([topic], group=group, sole=True, start={(topic, 0): 4})) as reader:
        assert reader.position() == {(topic, 0): 4}
        assert values(take(reader, 6)) == [str(n).encode() for n in range(4, 10)]
    with closing(log.reader([topic], group=name("group"), sole=True, start={(topic, 0): 4})) as reader:
        assert values(take(reader, 6)) == [str(n).encode() for n in range(4, 10)]
        reader.rewind()
        assert reader.position() == {(topic, 0): 4}
        take(reader, 6)
        reader.commit()
        reader.rewind()
        assert reader.position() == {(topic, 0): 10}


def test_a_time_is_found_by_when_messages_were_appended(log: EventLog) -> None:
    topic = new_topic(log, 2)
    assert log.offsets_at(topic, 0) == log.offsets_at(topic, 10**15) == {0: 0, 1: 0}
    log.append(topic, [(None, b"old")] * 4)
    time.sleep(0.05)
    log.append(topic, [(None, b"new")] * 2)
    first_new = min(message.timestamp_ms for message in log.read(topic, 0, 2, 3))
    assert log.offsets_at(topic, 0) == {0: 0, 1: 0}
    assert log.offsets_at(topic, first_new) == {0: 2, 1: 2}
    assert log.offsets_at(topic, 10**15) == {0: 3, 1: 3}


def test_a_topic_keeps_its_identity_and_shares_it_with_none_of_its_name(
    open_log: Opener, request: pytest.FixtureRequest
) -> None:
    log = open_log()
    topic = new_topic(log)
    assert log.identity(topic) == open_log().identity(topic)
    if isinstance(log, LocalLog):
        with closing(LocalLog(request.getfixturevalue("tmp_path") / "another.sqlite")) as another:
            another.create_topics({topic: 1})
            assert another.identity(topic) != log.identity(topic)
    else:
        assert log.identity(new_topic(log)) != log.identity(topic)


def test_a_message_that_is_too_large_is_refused_by_name_and_the_log_goes_on(log: EventLog) -> None:
    topic, largest = new_topic(log), b"x" * (MESSAGE_BYTES - 8)
    with pytest.raises(OversizedError, match=f"at most {MESSAGE_BYTES}"):
        log.append(topic, [(None, b"small"), (None, largest + b"x" * 9)])
    log.append(topic, [(b"12345678", largest)])
    with closing(log.transactor(name("txn"))) as transactor:
        with pytest.raises(OversizedError), transactor.begin() as transaction:
            transaction.append(topic, largest + b"x" * 9)
        with transactor.begin() as transaction:
            transaction.append(topic, b"small")
    settled(log, topic, 2)
    assert b"small" in [message.value for message in log.read(topic, 0, 0, 10)]


def test_the_file_of_a_rewritten_local_log_keeps_no_old_bytes(tmp_path: Path) -> None:
    """Pages that split while several topics grow keep copies of messages, which a rewrite must not leave behind."""
    path = tmp_path / "log.sqlite"
    with closing(LocalLog(path)) as log:
        log.create_topics({"one": 1, "two": 1})
        for number in range(400):
            for topic in ("one", "two"):
                log.append(
                    topic, [(b"secret", b"secret-%d" % number * (1 + number % 7)), (b"kept", b"kept-%d" % number)]
                )
        assert b"secret" in path.read_bytes() + path.with_name("log.sqlite-wal").read_bytes()
        old = [message for topic in ("one", "two") for message in log.read(topic, 0, 0, 800)]
        gone = [message for message in old if message.key == b"secret"]
        log.rewrite([Message(m.topic, m.partition, m.offset, None, b"", m.timestamp_ms) for m in gone])
        found = [message for topic in ("one", "two") for message in log.read(topic, 0, 0, 800)]
        assert [message for message in found if message.key] == [message for message in old if message.key == b"kept"]
        log.append("two", [(b"kept", b"next")])
        assert log.end_offsets("two") == {0: 801}
    files = [file for file in tmp_path.iterdir() if b"secret" in file.read_bytes()]
    assert files == []
