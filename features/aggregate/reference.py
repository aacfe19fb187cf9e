"""Slow reference of the law: a loop over single events in plain Python, to compare `features.aggregate.state` with.

The loop shares no code with the state. It knows the law as the docstrings of `state` and `halving` write it, and its
whole numbers have no limit, so an overflow of the state appears as a difference.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

_TILES, _HALF_LIVES, _STEPS, _ONE = 24, 16, 4_096, 2**20
Sums = list[int]


@dataclass
class _Key:
    """Events of one key: those before the key's clock, and those at the clock's very time.

    Attributes:
        clock: Newest time, None without an event.
        earlier: Time of the newest event before the clock, None without one.
        every: Sums of all events before the clock.
        pending: Sums of the events at the clock.
        tiles: By window, pairs of a tile's number and its sums, ascending.
        decayed: By half-life, the sums at the clock's epoch.
    """

    every: Sums
    pending: Sums
    tiles: list[deque[tuple[int, Sums]]]
    decayed: list[Sums]
    clock: int | None = None
    earlier: int | None = None


@dataclass(frozen=True)
class Answer:
    """Numbers of one event.

    Attributes:
        every: (C,) sums of all time.
        windows: By window, (C,) sums.
        decayed: By half-life, (C,) sums.
        since: Time since the last event of the key, -1 without one.
    """

    every: Sums
    windows: list[Sums]
    decayed: list[list[float]]
    since: int


@dataclass
class Loop:
    """State of one group of aggregates, advanced by single events.

    Attributes:
        channels: C, the numbers that an event adds.
        windows_us, half_lives_us: Horizons in microseconds.
    """

    channels: int
    windows_us: tuple[int, ...] = ()
    half_lives_us: tuple[int, ...] = ()
    _keys: dict[Hashable, _Key] = field(default_factory=dict)

    def step(self, key: Hashable, time: int, values: Sums, enters: bool) -> Answer:
        """Answers for an event at a time, in order of arrival; the event then counts if it enters."""
        held = self._keys.get(key) or self._fresh()
        moment = time if held.clock is None else max(time, held.clock)
        answer = self._answer(held, moment)
        if enters:
            self._enter(held, moment, values)
            self._keys[key] = held
        return answer

    def _fresh(self) -> _Key:
        return _Key(
            [0] * self.channels,
            [0] * self.channels,
            [deque() for _ in self.windows_us],
            [[0] * self.channels for _ in self.half_lives_us],
        )

    def _answer(self, held: _Key, moment: int) -> Answer:
        clock = held.clock
        if clock is None:
            nothing = [0] * self.channels
            zeros = [0.0] * self.channels
            return Answer(nothing, [nothing for _ in self.windows_us], [zeros for _ in self.half_lives_us], -1)
        # Events at the clock's very time are seen from a later time only.
        pending = held.pending if moment > clock else [0] * self.channels
        last = clock if moment > clock else held.earlier
        return Answer(
            _plus(held.every, pending),
            [
                self._window(tiles, length, clock, moment, pending)
                for tiles, length in zip(held.tiles, self.windows_us, strict=True)
            ],
            [
                self._decayed(sums, half_life, clock, moment, pending)
                for sums, half_life in zip(held.decayed, self.half_lives_us, strict=True)
            ],
            -1 if last is None else moment - last,
        )

    def _window(self, tiles: deque[tuple[int, Sums]], length: int, clock: int, moment: int, pending: Sums) -> Sums:
        tile = length // _TILES
        first = (moment - length) // tile
        found = [0] * self.channels
        for number, sums in tiles:
            if number >= first:
                found = _plus(found, sums)
        return _plus(found, pending) if clock // tile >= first else found

    def _decayed(self, sums: Sums, half_life: int, clock: int, moment: int, pending: Sums) -> list[float]:
        length, weight = _HALF_LIVES * half_life, _weight(clock, half_life)
        shift = _HALF_LIVES * (moment // length - clock // length)
        now = float(_weight(moment, half_life))
        return [float((one + weight * more) >> shift) / now for one, more in zip(sums, pending, strict=True)]

    def _enter(self, held: _Key, moment: int, values: Sums) -> None:
        if held.clock is not None and moment > held.clock:
            self._settle(held, held.clock, moment)
        held.pending = _plus(held.pending, values)
        held.clock = moment

    def _settle(self, held: _Key, clock: int, moment: int) -> None:
        """Counts the events at the clock as events before a later moment."""
        held.every = _plus(held.every, held.pending)
        for tiles, length in zip(held.tiles, self.windows_us, strict=True):
            tile = length // _TILES
            if tiles and tiles[-1][0] == clock // tile:
                tiles[-1] = (clock // tile, _plus(tiles[-1][1], held.pending))
            else:
                tiles.append((clock // tile, held.pending))
            while tiles and tiles[0][0] < (moment - length) // tile:
                tiles.popleft()
        for place, half_life in enumerate(self.half_lives_us):
            length, weight = _HALF_LIVES * half_life, _weight(clock, half_life)
            shift = _HALF_LIVES * (moment // length - clock // length)
            both = zip(held.decayed[place], held.pending, strict=True)
            held.decayed[place] = [(one + weight * more) >> shift for one, more in both]
        held.earlier, held.pending = clock, [0] * self.channels


def _weight(time: int, half_life: int) -> int:
    """Returns the fixed-point weight 2^(t / h) of a time t within its epoch."""
    steps = time % (_HALF_LIVES * half_life) * _STEPS // half_life
    return round(_ONE * 2 ** (steps % _STEPS / _STEPS)) << steps // _STEPS


def _plus(sums: Sums, more: Sums) -> Sums:
    return [one + other for one, other in zip(sums, more, strict=True)]
