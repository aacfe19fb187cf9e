"""A user's history as of an event's time: the frame twin for batch, the online step for the stream.

Both follow one rule: an event at time t sees the last L positive events of its user with time strictly before t, oldest
first. Among equal times the order of arrival decides. Events at the same time never see each other, so a frame built in
any order of ties leaks nothing.

Where a label is known only some time after its event, the lag, an event at time t sees the positive events with time
strictly before t - lag. Of the events before t, it looks at the newest `reach` positives of its user alone, since the
online twin keeps no more. `tests/property/test_history.py` tests that the two are equal.

Shape letters: E events, L history length.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_LENGTH = 20
# Events whose histories are joined at once.
_PARTITION = 1_000_000
# Times the length that is kept of a user's visits where labels lag.
_LAGGING = 4


class Jagged(NamedTuple):
    """Lists of different lengths: list e is `values[offsets[e]:offsets[e + 1]]`."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> "Jagged":
        """Returns the lists at `index`, in that order."""
        starts, lengths = self.offsets[index], self.offsets[index + 1] - self.offsets[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Jagged(self.values[positions], offsets)


@dataclass(frozen=True)
class EventColumns:
    """Events as aligned columns (E,), in order of arrival.

    Attributes:
        user: int64 user number.
        item: int64 item number.
        time: int64, any unit that orders.
        positive: bool, True if the event enters its user's history.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    positive: NDArray[np.bool_]

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Returns the columns in their order."""
        return self.user, self.item, self.time, self.positive


class _Spans(NamedTuple):
    """Each event's history as a range of its users' positive events, which are sorted by user and time."""

    ordered: NDArray[np.int64]
    start: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def positions(self) -> NDArray[np.int64]:
        """Returns the rows of the events in all histories, list after list."""
        ends = np.cumsum(self.lengths)
        place = np.repeat(self.start - ends + self.lengths, self.lengths)
        place += np.arange(len(place))
        found: NDArray[np.int64] = self.ordered[place]
        return found

    def after(self, count: int) -> "_Spans":
        """Returns the histories of the events after the first `count`."""
        return _Spans(self.ordered, self.start[count:], self.lengths[count:])


def _among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Marks the values (N,) that are among others, which are sorted."""
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    found: NDArray[np.bool_] = ordered[np.searchsorted(ordered[:-1], values)] == values
    return found


def reach_of(length: int, lag: int) -> int:
    """Returns the number of newest visits of a user among which a history is found."""
    return length if lag == 0 else _LAGGING * length


def _spans(events: EventColumns, length: int, lag: int = 0) -> _Spans:
    _, clock = np.unique(events.time, return_inverse=True)
    span = int(clock.max(initial=0)) + 1
    moment = events.user * span + clock
    arrived = np.flatnonzero(events.positive)
    # Stable, so equal moments stay in order of arrival.
    ordered = arrived[np.argsort(moment[arrived], kind="stable")]
    moments = moment[ordered]
    stop = np.searchsorted(moments, moment, side="left")
    first = np.maximum(np.searchsorted(moments, events.user * span, side="left"), stop - reach_of(length, lag))
    if lag:
        # The first moment of the clock that the event may not see.
        ticks = np.unique(events.time)
        unseen = np.searchsorted(ticks, events.time - lag, side="left")
        visible = np.searchsorted(moments, events.user * span + unseen, side="left")
        stop = np.maximum(first, np.minimum(stop, visible))
    start = np.maximum(first, stop - length)
    return _Spans(ordered, start, stop - start)


def history_frame(events: EventColumns, *, length: int, lag: int = 0) -> Jagged:
    """Returns every event's history as item numbers, all at once: the twin of `History.advance`."""
    spans = _spans(events, length, lag)
    return Jagged(events.item[spans.positions()], np.concatenate([[0], np.cumsum(spans.lengths)]))


def history_by_user(events: EventColumns, *, length: int, lag: int = 0) -> Jagged:
    """Returns what `history_frame` returns, user partition by user partition.

    Memory beside the result follows the partition and not the events. The values are uint32 where they fit.
    """
    count = len(events.user)
    parts = max(1, -(-count // _PARTITION))
    part_of = (events.user % parts).astype(np.int32)
    chosen = [np.flatnonzero(part_of == part) for part in range(parts)] if parts > 1 else [np.arange(count)]

    def spans(index: NDArray[np.int64]) -> _Spans:
        return _spans(EventColumns(*(column[index] for column in events.arrays())), length, lag)

    lengths = np.zeros(count, dtype=np.int64)
    for index in chosen:
        lengths[index] = spans(index).lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = np.empty(int(offsets[-1]), dtype=np.uint32 if int(events.item.max(initial=0)) < 2**32 else np.int64)
    for index in chosen:
        # Done twice, which takes less memory than all lists once more.
        found = spans(index)
        own = found.lengths
        into = np.repeat(offsets[index] - np.cumsum(own) + own, own)
        into += np.arange(len(into))
        values[into] = events.item[index[found.positions()]]
    return Jagged(values, offsets)  # type: ignore[arg-type]


class History:
    """Online twin: a ring of recent visits for each user, advanced by whole batches of events.

    The history keeps per user the last L visits before the newest time, and the last L at that time: enough to answer
    exactly for every time from the newest one on. An event that arrives late, before the newest time, is answered from
    the visits that are kept and is inserted in time order.

    Args:
        length: L, ≥ 1.
        lag: Time until an event's label is known, in the unit of the events' time.
    """

    def __init__(self, length: int, *, lag: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        self.length = length
        self.lag = lag
        self._reach = reach_of(length, lag)
        # User → index into the arrays below, -1 for a user without a visit.
        self._place = np.zeros(0, dtype=np.int64)
        self._users = np.zeros(0, dtype=np.int64)
        self._count = np.zeros(0, dtype=np.int64)
        self._items = np.zeros((0, 2 * self._reach), dtype=np.int64)
        self._times = np.zeros((0, 2 * self._reach), dtype=np.int64)
        self._size = 0

    def advance(self, events: EventColumns) -> tuple[Jagged, NDArray[np.int64]]:
        """Returns the history before each of the events (E,), and the users whose history changed.

        The events then enter the history. They are read in order of arrival and see each other by the rule of this
        module.
        """
        kept = self._kept(np.unique(events.user))
        both = EventColumns(*(np.concatenate(pair) for pair in zip(kept.arrays(), events.arrays(), strict=True)))
        spans = _spans(both, self.length, self.lag).after(len(kept.user))
        before = Jagged(both.item[spans.positions()], np.concatenate([[0], np.cumsum(spans.lengths)]))
        changed = np.unique(events.user[events.positive])
        entering = both.positive & _among(both.user, changed)
        self._keep(both.user[entering], both.item[entering], both.time[entering])
        return before, changed

    def read(self, user: int, time: int) -> list[int]:
        """Returns the last L items with time strictly before `time` less the lag, oldest first."""
        items, times = self._of(user)
        stop = int(np.searchsorted(times, time - self.lag, side="left"))
        return list(items[max(0, stop - self.length) : stop].tolist())

    def latest(self, user: int) -> list[int]:
        """Returns the last L items up to and including the newest: the history of a request made now."""
        return list(self._of(user)[0][-self.length :].tolist())

    def append(self, user: int, item: int, time: int) -> None:
        """Records one positive event."""
        users, items, times = (np.array([value], dtype=np.int64) for value in (user, item, time))
        self.advance(EventColumns(users, items, times, np.ones(1, dtype=np.bool_)))

    def forget(self, users: NDArray[np.int64]) -> int:
        """Removes all visits of users (N,). Returns the number of removed visits."""
        known = users[users < len(self._place)]
        places = self._place[known]
        places = np.unique(places[places >= 0])
        count = int(self._count[places].sum())
        self._count[places], self._items[places], self._times[places] = 0, 0, 0
        return count

    def visits(self, user: int) -> list[tuple[int, int]]:
        """Returns all visits that are kept of a user, as (item, time), oldest first."""
        items, times = self._of(user)
        return list(zip(items.tolist(), times.tolist(), strict=True))

    def visits_of(self, users: NDArray[np.int64]) -> list[tuple[list[int], list[int]]]:
        """Returns for each of some users with a visit (N,) the items and the times of all visits, oldest first."""
        places = self._place[users]
        counts = self._count[places]
        slots = np.arange(2 * self._reach) < counts[:, None]
        items, times = self._items[places][slots].tolist(), self._times[places][slots].tolist()
        ends = np.cumsum(counts).tolist()
        return [(items[a:b], times[a:b]) for a, b in pairwise([0, *ends])]

    def users(self) -> NDArray[np.int64]:
        """Returns the users with at least one visit, (U,), in order of their first."""
        return self._users[: self._size][self._count[: self._size] > 0]

    def state(self) -> EventColumns:
        """Returns all visits that are kept. An empty history that is advanced by them is equal to this one."""
        return self._kept(self.users())

    def _of(self, user: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        place = self._place[user] if user < len(self._place) else -1
        if place < 0:
            return self._users[:0], self._users[:0]
        return self._items[place, : self._count[place]], self._times[place, : self._count[place]]

    def _kept(self, users: NDArray[np.int64]) -> EventColumns:
        known = users[users < len(self._place)]
        places = self._place[known]
        places = places[places >= 0]
        lengths = self._count[places]
        slots = np.arange(2 * self._reach) < lengths[:, None]
        items, times = self._items[places][slots], self._times[places][slots]
        return EventColumns(np.repeat(self._users[places], lengths), items, times, np.ones(len(items), dtype=np.bool_))

    def _keep(self, user: NDArray[np.int64], item: NDArray[np.int64], time: NDArray[np.int64]) -> None:
        """Replaces all visits of some users by the last of the given visits."""
        if not len(user):
            return
        # Stable, so equal times stay in order of arrival.
        order = np.lexsort((time, user))
        user, item, time = user[order], item[order], time[order]
        users, starts, lengths = np.unique(user, return_index=True, return_counts=True)
        ends = np.repeat(starts + lengths, lengths)
        from_end = ends - np.arange(len(user))
        newest = time == time[ends - 1]
        at_newest = np.repeat(np.add.reduceat(newest.astype(np.int64), starts), lengths)
        kept = from_end - np.where(newest, 0, at_newest) <= self._reach
        counts = np.add.reduceat(kept.astype(np.int64), starts)
        places = self._places(users)
        slot = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        row = np.repeat(places, counts)
        self._items[row, slot] = item[kept]
        self._times[row, slot] = time[kept]
        self._count[places] = counts

    def _places(self, users: NDArray[np.int64]) -> NDArray[np.int64]:
        most = int(users.max())
        if most >= len(self._place):
            grown = np.full(max(most + 1, 2 * len(self._place)), -1, dtype=np.int64)
            grown[: len(self._place)] = self._place
            self._place = grown
        new = users[self._place[users] < 0]
        size = self._size + len(new)
        if size > len(self._users):
            more = max(size, 2 * len(self._users)) - len(self._users)
            self._users, self._count, self._items, self._times = (
                np.concatenate([array, np.zeros((more, *array.shape[1:]), dtype=np.int64)])
                for array in (self._users, self._count, self._items, self._times)
            )
        self._place[new] = np.arange(self._size, size)
        self._users[self._size : size] = new
        self._size = size
        return self._place[users]
