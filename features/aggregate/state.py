"""State of one group of aggregates, and the law by which events enter it and are answered.

The law, for the events of one key in order of arrival:

- The key's clock never runs backwards: an event at time t counts at e = max(t, newest e before it).
- An event is answered from the events of its key with an e strictly before its own, so ties never see each other.
- A window of length w holds the tiles that start at or after the tile of e - w; `tile_us` says how long a tile is.
- A decayed sum follows `features.aggregate.halving`.

All sums are whole numbers, so the same events give the same bits, however they are cut into batches: the frame is one
batch, the stream many, a server's request an event that never enters. `tests/property/test_aggregates.py` tests this
against a loop over single events.

Shape letters: M events with their keys, K keys, C channels, P tiles of a window.
"""

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregate.extremes import MISSING, running
from features.aggregate.halving import epoch, moved, weights
from features.aggregate.key_map import NOT_THERE, KeyMap, Keys
from features.aggregate.order import NEVER, Order, asking, ordered

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
TILES: Final = 24
"""Tiles of a window, beside the tile that it begins in."""
_HEAD: Final = 2
# Bounds of a key's sums and of the sums of a tile. A batch that may add more than `_MOST_ADDED` to a key is cut, so no
# addition and no sum of all tiles overflows.
_MOST_SUM, _MOST_TILE, _MOST_ADDED = 2**62, 2**58, 2**56
_PLACES: Final = np.arange(TILES + 1)
# Age in tiles of each place of a ring, by the place of the newest tile.
_AGES: Final = (_PLACES[:, None] - _PLACES) % (TILES + 1)


def tile_us(window_us: int) -> int:
    """Returns the length of a window's tiles in microseconds."""
    return window_us // TILES


@dataclass(frozen=True)
class KeySums:
    """Answers for M events.

    Attributes:
        every: (M, C) sums of all time.
        windows: (M, C) sums of each window.
        decayed: (M, C) float64 sums of each half-life.
        since: (M,) time since the last event of the key, -1 without one.
        extremes: (M, X) least, largest or last number of all time, `MISSING` without one.
    """

    every: Ints
    windows: tuple[Ints, ...]
    decayed: tuple[Floats, ...]
    since: Ints
    extremes: Ints


class GroupState:
    """Sums of one group by key, as one matrix of whole numbers: a row is what travels in records.

    A row holds the clock, the time before it, then for C channels each: the sums at the clock's very time, the sums of
    all time, the decayed sums of each half-life, and each window's tiles. Each extreme follows, once without the events
    at the clock's very time and once with them.

    Args:
        channels: C.
        windows_us, half_lives_us: Horizons in microseconds.
        extremes: X kinds, each `min`, `max` or `last`.
    """

    def __init__(
        self,
        channels: int,
        windows_us: tuple[int, ...] = (),
        half_lives_us: tuple[int, ...] = (),
        extremes: tuple[str, ...] = (),
    ) -> None:
        self.channels, self.windows_us, self.half_lives_us = channels, windows_us, half_lives_us
        self.extremes = extremes
        self._sums = _HEAD + channels * (2 + len(half_lives_us) + (TILES + 1) * len(windows_us))
        self.width = self._sums + 2 * len(extremes)
        self._map = KeyMap()
        self._keys = np.zeros(0, dtype=np.uint64)
        self._rows = np.zeros((0, self.width), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._map)

    @property
    def keys(self) -> Keys:
        """(K,) keys in the order of their first event."""
        return self._keys[: len(self)]

    @property
    def rows(self) -> Ints:
        """(K, width) the state of each key."""
        return self._rows[: len(self)]

    @property
    def fresh_row(self) -> Ints:
        """(width,) the state of a key without events."""
        row = np.zeros(self.width, dtype=np.int64)
        row[:_HEAD], row[self._sums :] = NEVER, MISSING
        return row

    def put(self, keys: Keys, rows: Ints) -> None:
        """Sets the state of distinct keys (N,) to rows (N, width)."""
        numbers = self._numbered(keys)
        self._rows[numbers] = rows

    def held(self, keys: Keys) -> tuple[Keys, Ints]:
        """Returns those of the keys (N,) that are there, and their rows."""
        numbers = self._map.find(keys)
        there = numbers != NOT_THERE
        return keys[there], self._rows[numbers[there]]

    def take(self, keys: Keys) -> Ints:
        """Returns the rows (N, width) of keys that are there (N,)."""
        return self._rows[self._map.find(keys)]

    def forget(self, keep: int) -> Keys:
        """Forgets all keys but the `keep` with the newest last event; returns the forgotten keys."""
        order = np.argsort(-self.rows[:, 0], kind="stable")
        kept = np.sort(order[:keep])
        forgotten: Keys = self.keys[np.sort(order[keep:])].copy()
        keys, rows = self.keys[kept].copy(), self.rows[kept].copy()
        self._map, self._keys, self._rows = KeyMap(), self._keys[:0], self._rows[:0]
        self.put(keys, rows)
        return forgotten

    def remove(self, keys: Keys) -> None:
        """Removes keys (N,). Keys that are not there are ignored."""
        numbers = self._map.find(keys)
        numbers = numbers[numbers != NOT_THERE]
        if not len(numbers):
            return
        kept = np.ones(len(self), dtype=np.bool_)
        kept[numbers] = False
        remaining, rows = self.keys[kept].copy(), self.rows[kept].copy()
        self._map, self._keys, self._rows = KeyMap(), self._keys[:0], self._rows[:0]
        self.put(remaining, rows)

    def compacted(self) -> "GroupState":
        """Returns a state of the same keys, without those that have no event."""
        kept = self.rows[:, 0] > NEVER
        found = self.emptied()
        found.put(self.keys[kept], self.rows[kept])
        return found

    def differ(self, keys: Keys, rows: Ints) -> NDArray[np.bool_]:
        """Returns whether keys (N,) have other rows here than the given rows (N, width), or are not there."""
        numbers = self._map.find(keys)
        found: NDArray[np.bool_] = numbers == NOT_THERE
        there = np.flatnonzero(~found)
        found[there] = (self._rows[numbers[there]] != rows[there]).any(axis=1)
        return found

    def find(self, keys: Keys) -> tuple[Ints, NDArray[np.bool_]]:
        """Returns the rows (M, width) of keys (M,), and whether each key is there; the row of another key is zero."""
        numbers = self._map.find(keys)
        there = numbers != NOT_THERE
        known = np.zeros((len(keys), self.width), dtype=np.int64)
        known[there] = self._rows[numbers[there]]
        return known, there

    def answer(self, known: Ints, there: NDArray[np.bool_], times: Ints) -> KeySums:
        """Answers as of times (M,) for the rows that `find` returned, as `advance` does for events that never enter."""
        order = asking(there, np.where(there, known[:, 0], NEVER), times)
        unseen = np.where((order.moment > order.clock)[:, None], 0, known[:, _HEAD : _HEAD + self.channels])
        nothing, none = np.zeros((1, self.channels), dtype=np.int64), np.zeros(0, dtype=np.int64)
        windows = (self._window(n, order, nothing, known, unseen) for n in range(len(self.windows_us)))
        decayed = (self._decayed(n, order, nothing[:0], known, unseen)[0] for n in range(len(self.half_lives_us)))
        extremes = self._extremes(order, [none] * len(self.extremes), known)
        every = self._part(known, 0) - unseen
        return KeySums(every, tuple(windows), tuple(decayed), self._since(order, known), extremes)

    def read(self, keys: Keys, times: Ints) -> KeySums:
        """Answers for keys (M,) as of times (M,), without a change."""
        return self.answer(*self.find(keys), times)

    def excerpt(self, slots: Ints) -> "GroupState":
        """Returns a state that holds copies of rows (N,) and no keys, to be advanced by slots."""
        found = self.emptied()
        found._rows = self._rows[slots]
        return found

    def extend(self, others: "list[GroupState]") -> None:
        """Lays the rows of other excerpts behind those of this one."""
        self._rows = np.concatenate([self._rows, *(other._rows for other in others)])

    @property
    def laid_out(self) -> Ints:
        """(N, width) the rows of an excerpt."""
        return self._rows

    def write_back(self, slots: Ints, rows: Ints) -> None:
        """Sets rows (N,) to the rows (N, width) of an excerpt."""
        self._rows[slots] = rows

    @property
    def shape(self) -> tuple[object, ...]:
        """Layout of a row: states of one shape can be advanced together."""
        return self.channels, self.windows_us, self.half_lives_us, self.extremes

    def emptied(self) -> "GroupState":
        """Returns a state of the same shape without a key."""
        return GroupState(self.channels, self.windows_us, self.half_lives_us, self.extremes)

    def advance(
        self, keys: Keys, times: Ints, values: Ints, enters: NDArray[np.bool_], numbers: Ints | None = None
    ) -> KeySums:
        """Answers for events in order of arrival, each as of its own time; those that enter then count.

        Args:
            keys: (M,) key of each event.
            times: (M,) time of each event.
            values: (M, C) number that an event adds to each channel.
            enters: (M,) False for an event that is answered and never counts.
            numbers: (M, X) number of each event for each extreme, or `MISSING`.
        """
        return self.advance_slots(self.slots(keys, enters), times, values, enters, numbers)

    def slots(self, keys: Keys, enters: NDArray[np.bool_]) -> Ints:
        """Returns the row of each key (M,), a new one for a key that enters, `NOT_THERE` for any other new key."""
        if enters.all():
            return self._numbered(keys)
        slots = np.empty(len(keys), dtype=np.int64)
        slots[enters] = self._numbered(keys[enters])
        slots[~enters] = self._map.find(keys[~enters])
        return slots

    def advance_slots(
        self, slots: Ints, times: Ints, values: Ints, enters: NDArray[np.bool_], numbers: Ints | None = None
    ) -> KeySums:
        """Answers as `advance` does, for events whose rows (M,) are found."""
        most, half = int(np.abs(values).max(initial=0)), len(slots) // 2
        if most * len(slots) > _MOST_ADDED and half:
            first, second = (
                self.advance_slots(
                    slots[part], times[part], values[part], enters[part], None if numbers is None else numbers[part]
                )
                for part in (slice(half), slice(half, None))
            )
            return _joined(first, second)
        arrival = np.argsort(slots, kind="stable")
        order = self._ordered(slots[arrival], times[arrival], enters[arrival])
        value = values[arrival][order.entering]
        known = self._known(order)
        # The sums at the clock's very time are not seen by an event at that time.
        unseen = np.where((order.moment > order.clock)[:, None], 0, known[:, _HEAD : _HEAD + self.channels])
        before = _running(value)
        every = self._part(known, 0) - unseen + before[order.settled] - before[order.begin]
        ends = [self._decayed(n, order, value, known, unseen) for n in range(len(self.half_lives_us))]
        windows = tuple(self._window(n, order, before, known, unseen) for n in range(len(self.windows_us)))
        since = self._since(order, known)
        runs = self._runs(order, numbers[arrival] if numbers is not None else None, known)
        extremes = self._extremes(order, runs, known)
        self._enter(order, value, before, [after for _, after in ends], runs)
        back = np.empty(len(arrival), dtype=np.int64)
        back[arrival] = np.arange(len(arrival))
        return KeySums(
            every[back],
            tuple(window[back] for window in windows),
            tuple(sums[back] for sums, _ in ends),
            since[back],
            extremes[back],
        )

    def _numbered(self, keys: Keys) -> Ints:
        numbers = self._map.put(keys)
        if len(self) > len(self._keys):
            size = max(len(self), 2 * len(self._keys))
            more = size - len(self._keys)
            self._keys = np.concatenate([self._keys, np.zeros(more, dtype=np.uint64)])
            self._rows = np.concatenate([self._rows, np.tile(self.fresh_row, (more, 1))])
        self._keys[numbers] = keys
        return numbers

    def _ordered(self, slot: Ints, time: Ints, enters: NDArray[np.bool_]) -> Order:
        clock = self._rows[slot, 0] if len(self._rows) else np.full(len(slot), NEVER, dtype=np.int64)
        # The slots are sorted, so the keys that are not there come first.
        clock[: int(np.searchsorted(slot, 0))] = NEVER
        return ordered(slot, clock, time, enters)

    def _known(self, order: Order) -> Ints:
        """Returns the rows (M, width) of the events' keys before the batch; zero for a key that is new."""
        if not len(self._rows):
            return np.zeros((len(order.slot), self.width), dtype=np.int64)
        known: Ints = self._rows[order.slot]
        known[: int(np.searchsorted(order.slot, 0))] = 0
        return known

    def _place(self, part: int) -> slice:
        """Columns of a part: 0 for all time, then the half-lives; `_ring` gives the windows' columns."""
        start = _HEAD + self.channels * (1 + part)
        return slice(start, start + self.channels)

    def _part(self, rows: Ints, part: int) -> Ints:
        return rows[:, self._place(part)]

    def _ring(self, rows: Ints, window: int) -> Ints:
        """Returns the tiles (N, P, C) of a window."""
        size = (TILES + 1) * self.channels
        start = _HEAD + self.channels * (2 + len(self.half_lives_us)) + size * window
        return rows[:, start : start + size].reshape(len(rows), TILES + 1, self.channels)

    def _window(self, window: int, order: Order, before: Ints, known: Ints, unseen: Ints) -> Ints:
        length, tile = self.windows_us[window], tile_us(self.windows_us[window])
        start = (order.moment - length) // tile * tile
        here: Ints = before[order.settled] - before[order.before(start)]
        # The window holds the newest tiles of the ring. The tiles of a key without events are empty.
        head = order.clock // tile
        kept = _newest(head, head - start // tile + 1).astype(np.int64)
        here += np.matmul(kept[:, None, :], self._ring(known, window))[:, 0]
        here -= np.clip(unseen, -_MOST_TILE, _MOST_TILE)
        return here

    def _decayed(self, number: int, order: Order, value: Ints, known: Ints, unseen: Ints) -> tuple[Floats, Ints]:
        """Returns the decayed sums (M, C), and the sums (E, C) of its epoch after each entering event."""
        half_life = self.half_lives_us[number]
        moment, clock = order.moment, np.where(order.clock > NEVER, order.clock, 0)
        now = epoch(moment, half_life)
        at_clock = weights(clock, half_life)[:, None]
        stored = self._part(known, 1 + number) - unseen * at_clock
        found = moved(stored, np.where(order.clock > NEVER, now - epoch(clock, half_life), 0))
        of_entering = now[order.entering]
        grown = value * weights(moment[order.entering], half_life)[:, None]
        carried, begin = self._carried(number, order, of_entering, grown, known)
        running = _running(grown)
        after = carried + running[1:] - running[begin]
        seen = (order.settled > order.begin).nonzero()[0]
        last = order.settled[seen] - 1
        found[seen] = moved(after[last], now[seen] - of_entering[last])
        return found / weights(moment, half_life)[:, None], after

    def _carried(self, number: int, order: Order, epochs: Ints, grown: Ints, known: Ints) -> tuple[Ints, Ints]:
        """Returns what each entering event's epoch began with (E, C), and the epoch's first entering event (E,)."""
        if not len(epochs):
            return np.zeros((0, self.channels), dtype=np.int64), epochs
        segment, clock = order.segment[order.entering], order.clock[order.entering]
        new_key = np.ones(len(epochs), dtype=np.bool_)
        new_key[1:] = segment[1:] != segment[:-1]
        new = new_key.copy()
        new[1:] |= epochs[1:] != epochs[:-1]
        first = new.nonzero()[0]
        span = np.cumsum(new) - 1
        totals = np.add.reduceat(grown, first, axis=0)
        half_life = self.half_lives_us[number]
        carry = np.zeros_like(totals)
        opening = new_key[first].nonzero()[0]
        at = first[opening]
        passed = np.where(
            clock[at] > NEVER, epochs[at] - epoch(np.where(clock[at] > NEVER, clock[at], 0), half_life), 0
        )
        carry[opening] = moved(self._part(known[order.entering[at]], 1 + number), passed)
        if len(opening) < len(first):
            self._chain(carry, totals, opening, epochs[first])
        return carry[span], first[span]

    @staticmethod
    def _chain(carry: Ints, totals: Ints, opening: Ints, epochs: Ints) -> None:
        """Sets what each later epoch of a key began with, from the epoch before it; `opening` are the first epochs."""
        size = len(epochs)
        # The n-th epochs of all keys come before any n+1-th.
        ordinal = np.arange(size) - np.repeat(opening, np.diff(np.append(opening, size)))
        by_ordinal = np.argsort(ordinal, kind="stable")
        bounds = np.searchsorted(ordinal[by_ordinal], np.arange(1, int(ordinal.max()) + 2))
        for start, stop in itertools.pairwise(bounds):
            at = by_ordinal[start:stop]
            carry[at] = moved(carry[at - 1] + totals[at - 1], epochs[at] - epochs[at - 1])

    def _since(self, order: Order, known: Ints) -> Ints:
        later = order.moment > order.clock
        last = np.where(later, order.clock, np.where(order.slot == NOT_THERE, NEVER, known[:, 1]))
        seen = (order.settled > order.begin).nonzero()[0]
        last[seen] = order.moment[order.entering[order.settled[seen] - 1]]
        found: Ints = np.where(last > NEVER, order.moment - last, -1)
        return found

    def _runs(self, order: Order, numbers: Ints | None, known: Ints) -> list[Ints]:
        """Returns each extreme (E,) up to each entering event."""
        segment, at = order.segment[order.entering], order.entering
        nothing = np.full((len(order.slot), len(self.extremes)), MISSING, dtype=np.int64)
        given = nothing if numbers is None else numbers
        return [
            running(kind, segment, given[at, place], known[at, self._sums + 2 * place + 1])
            for place, kind in enumerate(self.extremes)
        ]

    def _extremes(self, order: Order, runs: list[Ints], known: Ints) -> Ints:
        out = np.full((len(order.slot), len(runs)), MISSING, dtype=np.int64)
        held = order.clock > NEVER
        seen = (order.settled > order.begin).nonzero()[0]
        for place, run in enumerate(runs):
            settled, total = (known[:, self._sums + 2 * place + part] for part in (0, 1))
            out[:, place] = np.where(held, np.where(order.moment > order.clock, total, settled), MISSING)
            out[seen, place] = run[order.settled[seen] - 1]
        return out

    def _enter(self, order: Order, value: Ints, before: Ints, decayed: list[Ints], runs: list[Ints]) -> None:
        if not len(order.entering):
            return
        segment = order.segment[order.entering]
        last = np.flatnonzero(np.append(segment[1:] != segment[:-1], True))
        begin = order.begin[order.entering[last]]
        slot, moment = order.slot[order.entering[last]], order.moment[order.entering[last]]
        clock, previous = order.clock[order.entering[last]], self._rows[slot, 1]
        # The first entering event at the new clock.
        tie = np.searchsorted(order.rank, order.rank[last], side="left")
        rows = self._rows[slot]
        pending = rows[:, _HEAD : _HEAD + self.channels]
        pending[...] = before[last + 1] - before[tie] + np.where((moment == clock)[:, None], pending, 0)
        earlier = np.where(moment > clock, clock, previous)
        inside = tie > begin
        earlier[inside] = order.moment[order.entering[tie[inside] - 1]]
        self._part(rows, 0)[...] += before[last + 1] - before[begin]
        for number, after in enumerate(decayed):
            self._part(rows, 1 + number)[...] = after[last]
        for number, length in enumerate(self.windows_us):
            self._turn(self._ring(rows, number), tile_us(length), clock, moment, order, value, last)
        for place, run in enumerate(runs):
            settled = self._sums + 2 * place
            rows[:, settled] = np.where(moment > clock, rows[:, settled + 1], rows[:, settled])
            rows[inside, settled] = run[tie[inside] - 1]
            rows[:, settled + 1] = run[last]
        rows[:, 0], rows[:, 1] = moment, earlier
        if np.abs(value).max(initial=0) > 1:
            self._clamp(rows)
        self._rows[slot] = rows

    def _clamp(self, rows: Ints) -> None:
        """Bounds the sums of rows (N, width), so that the next events cannot make them overflow."""
        # The sums at the clock's very time, and of all time.
        totals = rows[:, _HEAD : _HEAD + 2 * self.channels]
        np.clip(totals, -_MOST_SUM, _MOST_SUM, out=totals)
        for number in range(len(self.windows_us)):
            ring = self._ring(rows, number)
            np.clip(ring, -_MOST_TILE, _MOST_TILE, out=ring)

    def _turn(self, ring: Ints, tile: int, clock: Ints, moment: Ints, order: Order, value: Ints, last: Ints) -> None:
        """Empties the tiles (N, P, C) that a window has left behind, and adds the events to theirs."""
        head = moment // tile
        ring[_newest(head, head - clock // tile)] = 0
        at = order.moment[order.entering] // tile
        lengths = np.diff(np.concatenate([[-1], last]))
        row = np.repeat(np.arange(len(last)), lengths)
        fresh = at > head[row] - (TILES + 1)
        np.add.at(ring, (row[fresh], at[fresh] % (TILES + 1)), value[fresh])


def _joined(first: KeySums, second: KeySums) -> KeySums:
    """Returns the answers of two batches as those of one."""
    return KeySums(
        np.concatenate([first.every, second.every]),
        tuple(np.concatenate(pair) for pair in zip(first.windows, second.windows, strict=True)),
        tuple(np.concatenate(pair) for pair in zip(first.decayed, second.decayed, strict=True)),
        np.concatenate([first.since, second.since]),
        np.concatenate([first.extremes, second.extremes]),
    )


def _running(value: Ints) -> Ints:
    """Returns the sums (E + 1, C) of the first 0, 1, … E rows."""
    return np.concatenate([np.zeros((1, value.shape[1]), dtype=np.int64), np.cumsum(value, axis=0)])


def _newest(head: Ints, count: Ints) -> NDArray[np.bool_]:
    """Returns which places (N, P) of rings hold the `count` (N,) newest tiles, if the newest tile is `head` (N,)."""
    found: NDArray[np.bool_] = _AGES[head % (TILES + 1)] < np.clip(count, 0, TILES + 1)[:, None]
    return found
