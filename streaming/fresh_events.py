"""Selects the events of a batch that count: valid, on time, and neither seen nor trained on before."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Events
from features.message import Decoded, Rows, event_rows
from streaming.lateness import EventWindow, id_key
from streaming.log.protocol import Message
from streaming.step_result import Rejected, StepResult

LATENESS_S = 3_600
"""Largest age of an event before the newest event of its partition, in seconds of event time."""
# An event is refused if its clock is ahead of the log's by more than a day. An event that is ahead by more than a few
# minutes counts, but moves its partition's time no further than that: the wrong clock of one device makes no other
# event late.
_AHEAD_US = 24 * 3_600 * 1_000_000
_CLOCK_SLACK_US = 5 * 60 * 1_000_000
_LAST_MS = 2**52


@dataclass
class Inbox:
    """The decoded messages of one topic."""

    messages: list[Message] = field(default_factory=list)
    decoded: list[Decoded] = field(default_factory=list)


class FreshEvents:
    """Selects the events that count, and remembers event times and ids for that.

    Attributes:
        recent: Event times and ids of recent events.
        arrivals: Number of events so far.

    Args:
        events: The events' table in the descriptor.
        columns: Columns of a decoded event.
        topic: Name of the events' topic.
        canonical: Version of the canonical form of values.
        lateness_s: See `LATENESS_S`; also the time for which event ids are remembered.
        trained_until: See `Step`.
    """

    def __init__(
        self,
        events: Events,
        columns: tuple[str, ...],
        *,
        topic: str,
        canonical: int,
        lateness_s: float,
        trained_until: int | None,
    ) -> None:
        self._events = events
        self._columns = columns
        self._topic = topic
        self._canonical = canonical
        self._trained_until = trained_until
        self._clock = events.time is not None
        self.recent = EventWindow(int(lateness_s * 1_000_000), timed=self._clock)
        self.arrivals = 0

    def select(self, inbox: Inbox, outcome: StepResult) -> pl.DataFrame:
        """Returns the events that count as a frame, and notes all others in the outcome.

        Args:
            inbox: Decoded messages of the events' topic, in order.
            outcome: Receives the rejected events and the counts of neutral and repeated events.
        """
        if not inbox.messages:
            return pl.DataFrame()
        rows = Rows(self._columns, [found.row for found in inbox.decoded])
        frame, bad = event_rows(rows, self._events, version=self._canonical)
        outcome.bad += [Rejected(inbox.messages[place], "invalid", reason) for place, reason in bad.items()]
        outcome.neutral += len(inbox.messages) - len(bad) - frame.height
        if not frame.height:
            return frame
        frame = frame.with_columns(pl.Series("time", self._times(frame)))
        position, times = frame["event"].to_numpy(), frame["time"].to_numpy()
        kept = np.zeros(frame.height, dtype=np.bool_)
        chosen = [inbox.messages[place] for place in position]
        appended = _appended_us(chosen)
        ahead: NDArray[np.bool_] = (times - appended > _AHEAD_US) & self._clock
        outcome.bad += [_ahead_of_its_time(chosen[place]) for place in np.flatnonzero(ahead)]
        trained = self._trained(times, appended)
        outcome.duplicates += int(trained.sum())
        on_purpose = np.array([inbox.decoded[place].backfill for place in position], dtype=np.bool_)
        keys = [None if (found := inbox.decoded[place].event_id) is None else id_key(found) for place in position]
        partitions = np.array([message.partition for message in chosen])
        for partition in np.unique(partitions):
            for old in (False, True):
                index = np.flatnonzero((partitions == partition) & ~ahead & ~trained & (on_purpose == old))
                # Backfilled events have a time of their own, which makes no other event late.
                place = (self._topic + " backfill" * old, int(partition))
                at_most = appended[index] + _CLOCK_SLACK_US if self._clock and not old else None
                late = self.recent.late(place, times[index], at_most=at_most) & ~on_purpose[index]
                outcome.bad += [_too_late(chosen[number]) for number in index[late]]
                index = index[~late]
                repeated = self.recent.repeated(place, [keys[number] for number in index], times[index])
                outcome.duplicates += int(repeated.sum())
                kept[index[~repeated]] = True
        return frame if kept.all() else frame.filter(pl.Series(kept))

    def _trained(self, times: NDArray[np.int64], appended: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns True for each of the events (E,) that the bundle was trained on."""
        if self._trained_until is None:
            return np.zeros(len(times), dtype=np.bool_)
        return np.maximum(times, appended) <= self._trained_until

    def _times(self, frame: pl.DataFrame) -> NDArray[np.int64]:
        """Returns event times. Without a clock or an order, the time is the number of events that arrived before."""
        times: NDArray[np.int64] = frame["time"].to_numpy()
        if not self._clock and self._events.order is None:
            # The stream comes after the files, so its times are beyond all positions in the files.
            times = (1 << 40) + self.arrivals + np.arange(frame.height, dtype=np.int64)
        self.arrivals += frame.height
        return times


def _appended_us(messages: Sequence[Message]) -> NDArray[np.int64]:
    """When messages (E,) were appended, in microseconds; a producer may have written any number as its time."""
    return np.array([min(max(message.timestamp_ms, 0), _LAST_MS) * 1_000 for message in messages], dtype=np.int64)


def _too_late(message: Message) -> Rejected:
    return Rejected(
        message, "late", "the event is older than the newest of its partition by more than the stated bound"
    )


def _ahead_of_its_time(message: Message) -> Rejected:
    return Rejected(message, "future", "the event's time lies more than a day after its message was appended")
