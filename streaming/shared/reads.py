"""Reads the inputs once for all trainers of a process.

Each topic has one reader of the log. Messages stay in memory until every trainer has them, up to a limit. A trainer
that starts at an older position, or that is further behind than the limit, reads the log by itself until it reaches the
messages in memory. Each trainer gets the messages of a partition in order and without gaps, as from its own reader.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice

from features.errors import TesseraError
from streaming.log.protocol import EventLog, InputReader, Message, Positions, check_poll, first_offsets

KEPT_BYTES = 64 << 20
"""Largest size of the messages of a topic in memory, bytes."""
_MESSAGE_BYTES = 200  # of a message beside its value
# A trainer that waits for the read of another trainer gets its messages after this time at most.
_SLICE_S = 0.02


@dataclass
class _Kept:
    """Messages of a partition in memory: all messages with low <= offset < end."""

    low: int
    end: int
    messages: list[Message] = field(default_factory=list)

    def find(self, offset: int) -> int:
        """Returns the index of the first message from an offset on."""
        return bisect_left(self.messages, offset, key=_offset)

    def drop(self, before: int) -> int:
        """Drops the messages before an offset. Returns their size, bytes."""
        index = self.find(before)
        dropped = sum(map(_size, self.messages[:index]))
        del self.messages[:index]
        self.low = max(self.low, min(before, self.end))
        return dropped


class SharedReads:
    """Readers of topics that share one read of the log. All methods may be called from several threads.

    Args:
        open_log: Opens a connection to the log, which the readers leave at their end. Each topic has its own.
        kept_bytes: Largest size of the messages of a topic in memory, bytes.
    """

    def __init__(
        self, open_log: Callable[[], AbstractContextManager[EventLog]], *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._open_log = open_log
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._topics: dict[str, _Topic] = {}

    def reader(self, log: EventLog, topic: str, start: Positions) -> "SharedReader":
        """Returns a reader of a topic.

        Args:
            log: Log of the caller, from which the reader takes messages that are no longer in memory.
            topic: Name of the topic.
            start: First position of each partition.

        Raises:
            LogError: The log does not answer.
        """
        # A position that is no longer kept moves to the oldest kept message, as for a sole reader.
        oldest = log.offsets_at(topic, 0)
        begin = {number: max(start.get((topic, number), 0), low) for number, low in oldest.items()}
        with self._lock:
            shared = self._topics.get(topic)
            if shared is None:
                shared = self._topics[topic] = _Topic(self._open_log, topic, begin, self._kept_bytes)
        return shared.join(log, begin)

    def counts(self) -> dict[str, int]:
        """Returns the number of messages that were read from the log once for all readers, by topic."""
        with self._lock:
            return {name: topic.read for name, topic in self._topics.items()}

    def close(self) -> None:
        """Closes the connections. All readers must be closed before."""
        with self._lock:
            for topic in self._topics.values():
                topic.close()
            self._topics.clear()


class _Topic:
    """One topic: the reader of the log, and the messages that some reader still needs."""

    def __init__(
        self,
        open_log: Callable[[], AbstractContextManager[EventLog]],
        name: str,
        begin: dict[int, int],
        kept_bytes: int,
    ) -> None:
        self._open_log = open_log
        self._kept_bytes = kept_bytes
        self.name = name
        self.parts = {number: _Kept(at, at) for number, at in begin.items()}
        self.read = 0
        self._size = 0
        self._readers: list[SharedReader] = []
        self._changed = threading.Condition()
        # True while a thread reads from the log. The thread does not hold the lock then.
        self._reading = False
        self._opened = ExitStack()
        self._reader: InputReader | None = None

    def join(self, log: EventLog, begin: dict[int, int]) -> "SharedReader":
        reader = SharedReader(self, log, begin)
        with self._changed:
            self._readers.append(reader)
        return reader

    def leave(self, reader: "SharedReader") -> None:
        with self._changed:
            if reader in self._readers:
                self._readers.remove(reader)

    def poll(self, reader: "SharedReader", most: int, timeout_s: float) -> list[Message]:
        """Returns messages in memory, and reads more from the log if another thread does not do so already."""
        deadline = time.monotonic() + timeout_s
        found: list[Message] = []
        fetched = False
        with self._changed:
            while True:
                found += reader.take(self.parts, most - len(found))
                left_s = deadline - time.monotonic()
                if len(found) >= most or (left_s <= 0 and (fetched or self._reading)):
                    return found
                if self._reading:
                    self._changed.wait(left_s)
                elif reader.behind(self.parts):
                    # Other readers filled the memory meanwhile, beyond the limit.
                    return found
                else:
                    self._fetch(most - len(found), min(max(left_s, 0.0), _SLICE_S))
                    fetched = True

    def _fetch(self, most: int, timeout_s: float) -> None:
        """Reads from the log without the lock, and keeps the messages. The caller holds the lock."""
        self._reading = True
        self._changed.release()
        messages: list[Message] = []
        positions: Positions = {}
        try:
            if self._reader is None:
                self._open()
            assert self._reader is not None
            messages = self._reader.poll(most, timeout_s)
            positions = self._reader.position()
        except BaseException:
            self._drop_reader()
            raise
        finally:
            self._changed.acquire()
            self._reading = False
            self._keep(messages, positions)
            self._changed.notify_all()

    def _open(self) -> None:
        log = self._opened.enter_context(self._open_log())
        start = {(self.name, number): part.end for number, part in self.parts.items()}
        self._reader = log.reader([self.name], group=f"shared-{self.name}", sole=True, start=start)
        self._opened.callback(self._reader.close)

    def _drop_reader(self) -> None:
        """Closes the connection. The next read opens another one at the same positions."""
        self._reader = None
        with suppress(TesseraError):
            self._opened.close()

    def _keep(self, messages: list[Message], positions: Positions) -> None:
        for message in messages:
            self.parts[message.partition].messages.append(message)
        self.read += len(messages)
        self._size += sum(map(_size, messages))
        for (_, number), end in positions.items():
            self.parts[number].end = end
        for number, part in self.parts.items():
            self._size -= part.drop(min((reader.at[number] for reader in self._readers), default=part.end))
        while self._size > self._kept_bytes:
            largest = max(self.parts.values(), key=lambda part: len(part.messages))
            middle = largest.messages[len(largest.messages) // 2].offset
            self._size -= largest.drop(middle + 1)

    def close(self) -> None:
        self._drop_reader()


class SharedReader:
    """Reader of one topic in `SharedReads`; see `InputReader` for the contract. One thread uses a reader at a time.

    A poll may return before its timeout with fewer messages than asked for.

    Attributes:
        at: Offset of the next message of each partition, without regard to messages that were given back.
    """

    def __init__(self, topic: _Topic, log: EventLog, begin: dict[int, int]) -> None:
        self._topic = topic
        self._log = log
        self.at = dict(begin)
        self._returned: list[Message] = []
        # Reads of messages that are no longer in memory, and the offsets at which the reads end.
        self._past: dict[int, tuple[Iterator[Message], int]] = {}
        self._turn = 0

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        found, self._returned = self._returned[:max_messages], self._returned[max_messages:]
        if found:
            return found
        return self._catch_up(max_messages) or self._topic.poll(self, max_messages, timeout_s)

    def unread(self, messages: Sequence[Message]) -> None:
        self._returned = [*messages, *self._returned]

    def position(self) -> Positions:
        name = self._topic.name
        return {(name, number): at for number, at in self.at.items()} | first_offsets(self._returned)

    def close(self) -> None:
        self._topic.leave(self)
        for read, _ in self._past.values():
            _close(read)
        self._past.clear()

    def behind(self, parts: dict[int, _Kept]) -> bool:
        """Returns whether a partition's next message is no longer in memory."""
        return any(self.at[number] < part.low for number, part in parts.items())

    def take(self, parts: dict[int, _Kept], most: int) -> list[Message]:
        """Returns the next messages in memory. A partition whose next message is not in memory has none."""
        found: list[Message] = []
        for number in self._turned(parts):
            part, at, room = parts[number], self.at[number], most - len(found)
            if not part.low <= at < part.end or room <= 0:
                continue
            index = part.find(at)
            chunk = part.messages[index : index + room]
            found += chunk
            # After the last message the position moves past marks of transactions too.
            more = index + len(chunk) < len(part.messages)
            self.at[number] = chunk[-1].offset + 1 if more else part.end
        return found

    def _catch_up(self, most: int) -> list[Message]:
        """Returns messages that are no longer in memory, from the log itself."""
        found: list[Message] = []
        for number in self._turned(self._topic.parts):
            at, room = self.at[number], most - len(found)
            low = self._topic.parts[number].low
            if room <= 0 or (number not in self._past and at >= low):
                continue
            if number not in self._past:
                self._past[number] = (self._log.read(self._topic.name, number, at, low), low)
            read, stop = self._past[number]
            chunk = list(islice(read, room))
            found += chunk
            self.at[number] = chunk[-1].offset + 1 if len(chunk) == room else stop
            if len(chunk) < room:
                _close(read)
                del self._past[number]
        return found

    def _turned(self, parts: dict[int, _Kept]) -> list[int]:
        """Returns the partitions, each time from another one on, so that a long backlog in one starves no other."""
        self._turn += 1
        numbers = sorted(parts)
        pivot = self._turn % len(numbers)
        return numbers[pivot:] + numbers[:pivot]


def _close(read: Iterator[Message]) -> None:
    if isinstance(read, Generator):
        read.close()


def _offset(message: Message) -> int:
    return message.offset


def _size(message: Message) -> int:
    return len(message.value) + _MESSAGE_BYTES
