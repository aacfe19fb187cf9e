"""Readers that share one read get what a reader of their own would get, wherever they start."""

import contextlib
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import LogError
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog, Message, Positions, ends_of
from streaming.log.sqlite import LocalLog
from streaming.shared.reads import SharedReader, SharedReads

TOPIC = "events"
Place = tuple[int, int]


class Readers:
    """Readers over one log, and what each of them has got.

    Args:
        log: Log of the topic.
        topic: Name of the topic, which has two partitions.
        kept_bytes: As in `SharedReads`.
    """

    def __init__(self, log: EventLog, topic: str, kept_bytes: int) -> None:
        self.log, self.topic = log, topic
        self.reads = SharedReads(lambda: contextlib.nullcontext(log), kept_bytes=kept_bytes)
        self.all: list[tuple[SharedReader, Positions, list[Place]]] = []
        self.sent = 0
        log.create_topics({topic: 2})

    def send(self, count: int) -> None:
        self.log.append(self.topic, [(str(n).encode(), str(n).encode()) for n in range(self.sent, self.sent + count)])
        self.sent += count

    def send_together(self, count: int) -> None:
        """Appends in a transaction, whose mark has an offset on Kafka."""
        with contextlib.closing(self.log.transactor(f"shared-{self.topic}")) as transactor, transactor.begin() as one:
            for number in range(count):
                one.append(self.topic, b"together", key=str(number).encode())

    def join(self, share: float) -> None:
        ends = self.log.end_offsets(self.topic)
        start = {(self.topic, number): int(share * end) for number, end in ends.items()}
        self.all.append((self.reads.reader(self.log, self.topic, start), start, []))

    def poll(self, number: int, most: int, back: int = 0, wait_s: float = 0.0) -> int:
        """Polls, and gives the last messages of the poll back."""
        if not self.all:
            return 0
        reader, _, got = self.all[number % len(self.all)]
        messages = reader.poll(most, wait_s)
        assert len(messages) <= most
        kept = messages[: max(0, len(messages) - back)]
        if messages[len(kept) :]:
            reader.unread(messages[len(kept) :])
        got += [(message.partition, message.offset) for message in kept]
        return len(kept)

    def drain(self) -> None:
        for number, (reader, _, _) in enumerate(self.all):
            ends = {(self.topic, n): end for n, end in enumerate(ends_of(self.log, self.topic))}
            while reader.position() != ends:
                self.poll(number, 7, wait_s=0.01)

    def check(self) -> None:
        """Compares with the slow twin: a read of the log from each reader's start."""
        for _, start, got in self.all:
            for number in (0, 1):
                end = ends_of(self.log, self.topic)[number]
                expected = [one.offset for one in self.log.read(self.topic, number, start[self.topic, number], end)]
                assert [offset for part, offset in got if part == number] == expected

    def close(self) -> None:
        for reader, _, _ in self.all:
            reader.close()
        self.reads.close()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 30)),
        st.tuples(st.just("send_together"), st.integers(1, 5)),
        st.tuples(st.just("join"), st.floats(0, 1)),
        st.tuples(st.just("poll"), st.integers(0, 5), st.integers(1, 20), st.integers(0, 3)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.sampled_from([1, 2_000, 1 << 20]))
def test_every_reader_gets_every_message_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]], kept_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.db"
    with contextlib.closing(LocalLog(path)) as log, contextlib.closing(Readers(log, TOPIC, kept_bytes)) as readers:
        for name, *arguments in operations:
            getattr(readers, name)(*arguments)
        readers.drain()
        readers.check()


def test_on_any_log_readers_skip_marks_of_transactions_and_start_in_the_past(log: EventLog) -> None:
    topic = f"shared-{uuid.uuid4().hex[:8]}"
    chance = random.Random(1)
    with contextlib.closing(Readers(log, topic, 3_000)) as readers:
        readers.join(0.0)
        for _ in range(8):
            readers.send(chance.randrange(1, 30))
            readers.send_together(chance.randrange(1, 4))
            readers.join(chance.random())
            for number in range(len(readers.all) // 2 + 1):
                readers.poll(number, chance.randrange(1, 20), chance.randrange(3), wait_s=0.05)
        readers.drain()
        readers.check()


def test_threads_share_one_read(log: EventLog) -> None:
    topic = f"shared-{uuid.uuid4().hex[:8]}"
    with contextlib.closing(Readers(log, topic, 1 << 20)) as readers:
        readers.send(10)
        for _ in range(3):
            readers.join(0.0)

        def read(number: int) -> None:
            while len(readers.all[number][2]) < 1_010:
                readers.poll(number, 50, wait_s=0.05)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            readers.send(100)
        for thread in threads:
            thread.join(60)
        readers.check()
        # Three readers of 1,010 messages: the log was read once.
        assert readers.reads.counts() == {topic: 1_010}


def test_after_an_outage_the_read_continues_where_it_was(tmp_path: Path) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        readers = Readers(log, TOPIC, 1 << 20)
        opened: list[int] = []

        @contextlib.contextmanager
        def open_log() -> Iterator[EventLog]:
            opened.append(1)
            yield log if len(opened) > 1 else Broken(log)

        readers.reads = SharedReads(open_log)
        readers.send(20)
        readers.join(0.0)
        readers.poll(0, 5)
        with pytest.raises(LogError, match="the broker is away"):
            readers.poll(0, 5)
        readers.drain()
        readers.check()
        assert len(opened) == 2


class Broken:
    """A log whose second poll fails."""

    def __init__(self, log: LocalLog) -> None:
        self._log = log

    def reader(self, *arguments: object, **options: object) -> "BrokenReader":
        return BrokenReader(self._log.reader(*arguments, **options))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)


class BrokenReader:
    """A reader whose second poll fails."""

    def __init__(self, reader: object) -> None:
        self._reader = reader
        self._polls = 0

    def poll(self, most: int, wait_s: float) -> list[Message]:
        self._polls += 1
        if self._polls > 1:
            raise LogError("the broker is away")
        poll: Callable[[int, float], list[Message]] = self._reader.poll  # type: ignore[attr-defined]
        return poll(most, wait_s)

    def __getattr__(self, name: str) -> object:
        return getattr(self._reader, name)


def test_a_reader_on_kafka_is_closed_with_its_reads(kafka_address: str) -> None:
    with contextlib.closing(KafkaLog(kafka_address)) as log:
        readers = Readers(log, f"shared-{uuid.uuid4().hex[:8]}", 1 << 20)
        readers.send(3)
        readers.join(0.0)
        readers.drain()
        readers.close()
        readers.close()
        assert readers.reads.counts() == {}
