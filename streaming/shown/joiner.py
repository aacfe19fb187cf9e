"""Joins impressions with outcomes in the stream: rows of what was shown become messages of the topic `events`.

The rows are those that `features.dataset.logs.impressions` makes of the exported topics. The trainer reads them like
any events.

Each transaction holds rows and a message of the topic `joins`: the append time up to which impressions have closed, and
the positions read. A start folds the kept messages before these positions again, without rows, and continues. A crash
therefore neither loses nor repeats a row. A second joiner fences the first.

A partition counts as read up to the append time of its newest message, or, at its end, up to the present time. Both are
reduced by a slack for writers whose clocks differ. An impression that is appended with an older time than this is
dropped and counted as late. The topic that is further behind is read first, so memory holds about one window.
"""

import time
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np

from features.dataset.descriptor import Events
from features.dataset.logs.impressions import row_message
from features.errors import EventError
from features.shown.join import Join, ShownRow
from features.shown.message import decode_impression, decode_outcome
from streaming.forget.request import ForgottenFeed
from streaming.log.protocol import BLANK, EventLog, Message
from streaming.log.topics import Topics

_SLACK_MS = 5_000
# Rows of a transaction, and messages after which the positions are committed without rows.
_ROWS, _COMMIT_EVERY = 5_000, 20_000
# First impressions that a joiner without progress reads: this much older than the newest event of training.
_MARGIN_MS = 3_600_000


class JoinProgress(msgspec.Struct, frozen=True):
    """Message of the topic `joins`.

    Attributes:
        closed_ms: Impressions that were appended at this time or earlier have closed, milliseconds since 1970.
        positions: Topic, partition and next offset of each partition.
        counts: Messages by what became of them, as in `features.shown.join.Join`.
    """

    closed_ms: int
    positions: list[tuple[str, int, int]]
    counts: dict[str, int]


class Joiner:
    """Appends the rows of closed impressions to the topic `events`.

    Attributes:
        counts: Messages by what became of them, since the first start on this log.

    Args:
        log: Log of the topics.
        events: Table of the events, `from = "impressions"`.
        topics: Names of the topics.
        trained_until: Event time up to which the bundle was trained, microseconds. Used at the first start on a log.
        clock: Returns the present time, milliseconds since 1970.
        failpoint: Called in a transaction before its commit. A test that raises there shows what a crash leaves.
    """

    def __init__(
        self,
        log: EventLog,
        events: Events,
        topics: Topics,
        *,
        trained_until: int | None = None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        failpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._log = log
        self._events = events
        self._topics = topics
        self._clock = clock
        self._failpoint = failpoint
        log.create_topics(topics.partitions() | {topics.joins: 1})
        self._forgotten = ForgottenFeed(log, topics)
        # Fences the joiner before first, so that the progress read below is final.
        self._transactor = log.transactor(f"joiner-{topics.joins}")
        with self._transactor.begin():
            pass
        progress = self._newest() or JoinProgress(
            -1 if trained_until is None else trained_until // 1_000 - _MARGIN_MS, [], {}
        )
        self._join = Join(events.join_rule(), closed_ms=progress.closed_ms)
        horizon = self._join.rule.horizon_ms
        self._read_ms: dict[tuple[str, int], int] = {}
        positions = {(topic, part): position for topic, part, position in progress.positions}
        for topic in self._inputs:
            since = max(0, progress.closed_ms - 2 * horizon)
            for part, first in log.offsets_at(topic, since).items():
                end = positions.setdefault((topic, part), first)
                self._read_ms[topic, part] = since
                for message in log.read(topic, part, first, end) if end > first else ():
                    self._fold(message)
        self._join.close(progress.closed_ms + horizon + 1)
        self._join.counts = Counter(progress.counts)
        self._uncommitted = 0
        self._readers = {
            topic: log.reader(
                [topic],
                group=f"{topics.joins}-{topic}",
                sole=True,
                start={place: at for place, at in positions.items() if place[0] == topic},
            )
            for topic in self._inputs
        }

    @property
    def _inputs(self) -> tuple[str, str]:
        return self._topics.impressions, self._topics.outcomes

    @property
    def counts(self) -> dict[str, int]:
        """Messages and rows by what became of them, with `open` impressions and `waiting` outcomes."""
        return dict(self._join.counts) | {"open": len(self._join), "waiting": self._join.waiting}

    def run_once(self, *, wait_s: float = 0.05, batch: int = 1_000) -> int:
        """Reads a batch of messages and appends the rows of all impressions that have closed.

        Args:
            wait_s: Longest wait for messages, seconds.
            batch: Largest number of messages of a topic.

        Returns:
            Number of messages and rows.

        Raises:
            FencedError: Another joiner has taken over.
            LogError: The log does not answer. The caller must start a new joiner.
        """
        now, at_end = self._clock(), self._at_end()
        behind = [topic for topic in self._inputs if not all(at_end[place] for place in at_end if place[0] == topic)]
        if len(behind) == 2:
            behind = [min(behind, key=self._read_until)]
        messages = [message for topic in behind or self._inputs for message in self._readers[topic].poll(batch, wait_s)]
        for message in messages:
            self._fold(message)
        self._uncommitted += len(messages)
        # A partition that was at its end when the clock was read has no older message that is unread.
        for place, ended in at_end.items():
            if ended:
                self._read_ms[place] = max(self._read_ms.get(place, 0), now)
        count, more = 0, True
        while more:
            rows = self._join.close(min(self._read_ms.values()) - _SLACK_MS, most=_ROWS)
            more = len(rows) >= _ROWS
            rows = self._without_forgotten(rows)
            if rows or self._uncommitted >= _COMMIT_EVERY:
                with self._transactor.begin() as transaction:
                    for row in rows:
                        value = row_message(row, self._events)
                        transaction.append(self._topics.events, value, key=row.user.encode(errors="replace"))
                    transaction.append(self._topics.joins, msgspec.json.encode(self._progress()))
                    self._failpoint("after rows")
                self._uncommitted = 0
            count += len(rows)
        return len(messages) + count

    def drain(self) -> None:
        """Reads both topics to their ends and appends the rows of all impressions that have closed by now."""
        while self.run_once(wait_s=0.0) or not all(self._at_end().values()):
            pass

    def close(self) -> None:
        """Closes the readers and the transactor. Committed rows stay."""
        for reader in self._readers.values():
            reader.close()
        self._transactor.close()

    def _at_end(self) -> dict[tuple[str, int], bool]:
        """Returns whether each partition has been read to its end."""
        found = {}
        for topic, reader in self._readers.items():
            position = reader.position()
            for part, end in self._log.end_offsets(topic).items():
                found[topic, part] = position.get((topic, part), 0) >= end
        return found

    def _read_until(self, topic: str) -> int:
        return min(at for (name, _), at in self._read_ms.items() if name == topic)

    def _fold(self, message: Message) -> None:
        if message.value == BLANK:
            return
        at = message.timestamp_ms
        place = (message.topic, message.partition)
        # A clock that is ahead closes no window.
        self._read_ms[place] = max(self._read_ms.get(place, 0), min(at, self._clock()))
        try:
            if message.topic == self._topics.outcomes:
                self._join.note(decode_outcome(message.value), at)
            else:
                self._join.show(decode_impression(message.value), at)
        except EventError:
            self._join.counts["undecodable"] += 1

    def _without_forgotten(self, rows: list[ShownRow]) -> list[ShownRow]:
        """Returns the rows that are not of forgotten users. All other rows are counted."""
        users = self._forgotten.read_on()
        times = np.array([1_000 * row.time_ms for row in rows], dtype=np.int64)
        gone = users.left_out([row.user for row in rows], times)
        self._join.counts["forgotten"] += int(gone.sum())
        return [row for row, left_out in zip(rows, gone.tolist(), strict=True) if not left_out]

    def _progress(self) -> JoinProgress:
        positions = [
            (topic, part, at) for reader in self._readers.values() for (topic, part), at in reader.position().items()
        ]
        return JoinProgress(self._join.closed_ms, positions, dict(self._join.counts))

    def _newest(self) -> JoinProgress | None:
        end = self._log.end_offsets(self._topics.joins)[0]
        span, start = 64, end
        oldest = self._log.offsets_at(self._topics.joins, 0)[0]
        while start > oldest:
            start = max(oldest, end - span)
            found = list(self._log.read(self._topics.joins, 0, start, end))
            if found:
                return msgspec.json.decode(found[-1].value, type=JoinProgress)
            span *= 8
        return None
