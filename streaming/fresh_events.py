"""Selects the events of a batch that count: valid events that are on time, not seen before and not trained on."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Events
from features.message import event_rows
from streaming.forget.removal import Removals
from streaming.inbox import Inbox
from streaming.lateness import EventWindow, id_key
from streaming.step_result import StepResult

LATENESS_S = 3_600
"""Largest age of an event before the newest event of its partition, in seconds of event time."""
# An event is rejected if its time is more than a day after the log's time. An event that is ahead by less counts as of
# a few minutes after the log's time. The wrong clock of a single device then makes no other event late, and moves
# neither the windows of aggregates nor the order of a history.
_AHEAD_US = 24 * 3_600 * 1_000_000
_CLOCK_SLACK_US = 5 * 60 * 1_000_000
_LATE = "the event is older than the newest event of its partition by more than the bound"
_FUTURE = "the event's time is more than a day after the time of its message in the log"


class FreshEvents:
    """Selects the events that count. Remembers recent event times and ids.

    Attributes:
        recent: Times and ids of recent events.
        arrivals: Number of labelled events so far, late and repeated events included.

    Args:
        events: The events' table in the descriptor.
        columns: Columns of a decoded event.
        topic: Name of the events' topic.
        canonical: Version of the canonical form of values.
        lateness_s: Largest age of an event, as in `LATENESS_S`. Event ids are remembered for the same time.
        trained_until: See `Step`.
        removals: Forgotten users, whose events do not count.
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
        removals: Removals | None = None,
    ) -> None:
        self._events = events
        self._columns = columns
        self._topic = topic
        self._canonical = canonical
        self._trained_until = trained_until
        self._removals = removals
        self._clock = events.time is not None
        self.recent = EventWindow(int(lateness_s * 1_000_000), timed=self._clock)
        self.arrivals = 0

    def select(self, inbox: Inbox, outcome: StepResult) -> pl.DataFrame:
        """Returns the events that count as a frame, and records all other events in the outcome.

        The time of an event is at most five minutes after its message was appended.

        Args:
            inbox: Decoded rows of the events' topic, in order.
            outcome: Receives the rejected events and the counts of neutral and repeated events.
        """
        if not inbox.messages:
            return pl.DataFrame()
        frame, bad = event_rows(inbox.rows(self._columns), self._events, version=self._canonical)
        outcome.bad += inbox.rejected("invalid", bad)
        outcome.neutral += len(inbox.messages) - len(bad) - frame.height
        frame = self._without_forgotten(frame, inbox, outcome)
        if not frame.height:
            return frame
        frame.replace_column(frame.columns.index("time"), pl.Series("time", self._times(frame)))
        numbers, times = frame["event"].to_numpy(), frame["time"].to_numpy()
        appended = inbox.appended_us()[numbers]
        ahead: NDArray[np.bool_] = (times - appended > _AHEAD_US) & self._clock
        if ahead.any():
            outcome.bad += inbox.rejected("future", dict.fromkeys(numbers[ahead].tolist(), _FUTURE))
        trained = self._trained(times, appended)
        outcome.duplicates += int(trained.sum())
        kept = self._kept(inbox, numbers, times, appended, ~(ahead | trained), outcome)
        if self._clock:
            times = np.minimum(times, appended + _CLOCK_SLACK_US)
            frame.replace_column(frame.columns.index("time"), pl.Series("time", times))
        return frame if kept.all() else frame[np.flatnonzero(kept)]

    def _kept(
        self,
        inbox: Inbox,
        numbers: NDArray[np.uint32],
        times: NDArray[np.int64],
        appended: NDArray[np.int64],
        left: NDArray[np.bool_],
        outcome: StepResult,
    ) -> NDArray[np.bool_]:
        """Marks the events (E,) that are neither late nor repeated. The windows of the partitions then hold them.

        Args:
            inbox: Decoded rows.
            numbers: (E,) position of each event in the inbox.
            times, appended: (E,) times of the events and of their messages, microseconds since 1970.
            left: (E,) True for each event to judge.
            outcome: Receives the late events and the count of repeated events.
        """
        kept = np.zeros(len(numbers), dtype=np.bool_)
        backfilled = np.array(inbox.backfill, dtype=np.bool_)[numbers]
        event_ids = inbox.event_ids if inbox.event_ids.count(None) < len(inbox.event_ids) else None
        partitions = inbox.partitions()[numbers]
        for partition in np.unique(partitions).tolist():
            for backfill in (False, True):
                index = np.flatnonzero((partitions == partition) & left & (backfilled == backfill))
                # Backfilled events have their own event time, so they make no other event late.
                key = (self._topic + " backfill" * backfill, partition)
                at_most = appended[index] + _CLOCK_SLACK_US if self._clock and not backfill else None
                late = self.recent.late(key, times[index], at_most=at_most)
                if not backfill and late.any():
                    outcome.bad += inbox.rejected("late", dict.fromkeys(numbers[index[late]].tolist(), _LATE))
                    index = index[~late]
                if event_ids is None:
                    repeated = self.recent.repeated(key, [], times[:0])
                    kept[index] = True
                    continue
                found = [event_ids[number] for number in numbers[index].tolist()]
                ids = [None if event_id is None else id_key(event_id) for event_id in found]
                repeated = self.recent.repeated(key, ids, times[index])
                outcome.duplicates += int(repeated.sum())
                kept[index[~repeated]] = True
        return kept

    def _without_forgotten(self, frame: pl.DataFrame, inbox: Inbox, outcome: StepResult) -> pl.DataFrame:
        """Returns the events that are not of forgotten users. All other events are counted in the outcome.

        An event counts in a new life of its user only if its time and the time of its append are after the request.
        """
        if self._removals is None or not len(self._removals.users) or "user_id" not in frame.columns:
            return frame
        numbers = frame["event"].to_numpy()
        times = inbox.appended_us()[numbers]
        if self._clock:
            times = np.minimum(times, frame["time"].to_numpy())
        messages = [inbox.messages[number] for number in numbers.tolist()]
        gone = self._removals.left_out(frame["user_id"].to_list(), times, messages)
        outcome.forgotten += int(gone.sum())
        return frame[np.flatnonzero(~gone)] if gone.any() else frame

    def _trained(self, times: NDArray[np.int64], appended: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks the events (E,) that the bundle was trained on."""
        if self._trained_until is None:
            return np.zeros(len(times), dtype=np.bool_)
        if self._events.origin == "impressions":
            # The joiner appends a row long after its item was shown, and the same row is in the bundle's files.
            return times <= self._trained_until
        return np.maximum(times, appended) <= self._trained_until

    def _times(self, frame: pl.DataFrame) -> NDArray[np.int64]:
        """Returns event times. Without a clock and an order, the time of an event is the number of earlier arrivals."""
        times: NDArray[np.int64] = frame["time"].to_numpy()
        if not self._clock and self._events.order is None:
            # The stream comes after the files, so its times must be larger than all positions in the files.
            times = (1 << 40) + self.arrivals + np.arange(frame.height, dtype=np.int64)
        self.arrivals += frame.height
        return times
