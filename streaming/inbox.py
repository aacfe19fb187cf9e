"""Decoded rows of one topic in a micro-batch, each with its message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.message import Rows
from features.wire.arrow import DecodedBatch
from features.wire.decoder import ENVELOPE, Decoded, kept_rows
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step_result import Address, Rejected, address

_PLACE = attrgetter("topic", "partition", "offset")
_PARTITION, _TIME = attrgetter("partition"), attrgetter("timestamp_ms")
# Largest time that is read from a message, Unix milliseconds.
_LAST_MS = 2**52


def in_order(messages: Sequence[Message], topics: Topics) -> list[Message]:
    """Returns messages in the order of a step: items first, then events, each by (partition, offset)."""
    items_topic = topics.items
    items = [message for message in messages if message.topic == items_topic]
    events = [message for message in messages if message.topic != items_topic] if items else messages
    return sorted(items, key=_PLACE) + sorted(events, key=_PLACE)


@dataclass
class Inbox:
    """Rows of one topic, in the order of their messages.

    Attributes:
        messages: (R,) message of each row.
        places: (R,) position of each row in its message, 0 if the message is one row.
        event_ids, versions, deleted, backfill: (R,) as in `Decoded`.

    Args:
        by_column: True keeps the rows of an Arrow batch as columns.
    """

    by_column: bool = False
    messages: list[Message] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    event_ids: list[str | int | None] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    deleted: list[bool] = field(default_factory=list)
    backfill: list[bool] = field(default_factory=list)
    _values: list[tuple[Any, ...] | None] = field(default_factory=list)
    _batches: dict[int, pl.DataFrame] = field(default_factory=dict)
    _sizes: dict[Address, int] = field(default_factory=dict)

    def add(self, message: Message, decoded: Decoded | DecodedBatch) -> list[Rejected]:
        """Adds the rows of a message. Returns the rejected rows."""
        if isinstance(decoded, Decoded):
            self.messages.append(message)
            self.places.append(0)
            self._values.append(decoded.row)
            self.event_ids.append(decoded.event_id)
            self.versions.append(decoded.version)
            self.deleted.append(decoded.deleted)
            self.backfill.append(decoded.backfill)
            return []
        count = len(decoded.places)
        self._sizes[address(message)] = count + len(decoded.refused)
        if self.by_column and count:
            self._batches[len(self.messages)] = decoded.frame
        self._values += [None] * count if self.by_column else decoded.frame.rows()
        self.messages += [message] * count
        self.places += decoded.places
        self.event_ids += decoded.event_ids
        self.versions += decoded.versions
        self.deleted += decoded.deleted
        self.backfill += decoded.backfill
        return self._of_batch(message, "invalid", decoded.refused)

    def extend(self, messages: Sequence[Message], rows: Sequence[tuple[Any, ...]]) -> None:
        """Adds messages of one row each, all at once: the fast twin of `add`.

        Args:
            messages: R messages.
            rows: (R,) values and envelopes of `Decoder.rows`.
        """
        *_, event_ids, versions, deleted, backfill = zip(*rows, strict=True)
        self.messages += messages
        self.places += [0] * len(rows)
        self._values += [row[:-ENVELOPE] for row in rows]
        self.event_ids += event_ids
        self.versions += versions
        self.deleted += deleted
        self.backfill += backfill

    def rows(self, columns: tuple[str, ...]) -> Rows:
        """Returns the rows for `features.message`."""
        return Rows(columns, self._values, self._batches)

    def partitions(self) -> NDArray[np.int64]:
        """Returns the partition of each row's message, (R,)."""
        return np.fromiter(map(_PARTITION, self.messages), dtype=np.int64, count=len(self.messages))

    def appended_us(self) -> NDArray[np.int64]:
        """Returns the append time of each row's message (R,), Unix microseconds.

        A producer may write any number as the time, so the times are limited to a range without overflow.
        """
        times = np.fromiter(map(_TIME, self.messages), dtype=np.int64, count=len(self.messages))
        return np.clip(times, 0, _LAST_MS) * 1_000

    def rejected(self, cause: str, reasons: Mapping[int, str]) -> list[Rejected]:
        """Returns rejected rows as messages. The rows of a batch that one cause rejects are one message.

        Args:
            cause: Kind of the fault.
            reasons: Description of the fault by the number of the row.
        """
        found = []
        batches: dict[Address, dict[int, str]] = {}
        for number, reason in reasons.items():
            message = self.messages[number]
            if address(message) in self._sizes:
                batches.setdefault(address(message), {})[number] = reason
            else:
                found.append(Rejected(message, cause, reason))
        for own in batches.values():
            message = self.messages[next(iter(own))]
            found += self._of_batch(message, cause, {self.places[number]: reason for number, reason in own.items()})
        return found

    def _of_batch(self, message: Message, cause: str, reasons: Mapping[int, str]) -> list[Rejected]:
        if not reasons:
            return []
        places = sorted(reasons)
        whole = len(places) == self._sizes[address(message)]
        value = message.value if whole else kept_rows(message.value, places)
        count = f"{len(places)} rows of a batch, such as row {places[0] + 1}: " if len(places) > 1 else ""
        return [Rejected(replace(message, value=value), cause, count + reasons[places[0]], len(places))]
