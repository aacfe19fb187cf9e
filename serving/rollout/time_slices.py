"""Compares times within the same minutes, so that a period that is slow for both arms blames neither.

A slice is a minute, or as many minutes as it takes until a hundred users were answered, an hour at most. A user counts
with the slowest of their answers; the challenger's times count less the allowance. The slowest hundredth of the users
are the top, and `serving.rollout.sequential.Slower` gathers how many of them are the challenger's. A user in the top is
in no slice for an hour, since a user who always sends slow requests is not new evidence each minute.
"""

import math
import sqlite3
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.rollout.experiment import CHALLENGER
from serving.rollout.sequential import Slower

MINUTE_MS = 60_000
# Lag of a server's queue of impressions while its log is unavailable; later impressions are not compared.
_BEHIND_MS = 2 * MINUTE_MS
_LEAST, _MOST_MINUTES, _TOP, _REST_MS = 100, 60, 0.01, 60 * MINUTE_MS


@dataclass(frozen=True)
class SlownessAllowance:
    """Allowed slowness of the challenger: a factor, and an excess that is always allowed."""

    times: float = 1.5
    ms: float = 5.0

    def less(self, ms: ArrayLike) -> NDArray[np.float64]:
        """Returns times (N,) of the challenger, less the allowance."""
        times = np.asarray(ms, dtype=np.float64)
        return np.minimum(times / self.times, times - self.ms)


def slower(file: sqlite3.Connection, experiment: str, epoch: int) -> Slower:
    """Returns the evidence so far that the challenger's answers take longer."""
    query = "SELECT logs FROM slower WHERE experiment = ? AND epoch = ?"
    row = file.execute(query, (experiment, epoch)).fetchone()
    return Slower(msgspec.json.decode(row[0], type=tuple[float, ...])) if row else Slower()


def close_slices(file: sqlite3.Connection, now_ms: int, allowed: SlownessAllowance) -> None:
    """Compares the arms in all slices that are complete, and deletes their times."""
    last = (now_ms - _BEHIND_MS) // MINUTE_MS
    query = "SELECT DISTINCT experiment, epoch FROM slice JOIN arm ON arm.number = slice.arm WHERE minute < ?"
    for experiment, epoch in file.execute(query, (last,)).fetchall():
        _Closing(file, experiment, epoch, allowed).until(last)


class _Closing:
    """Slices of one experiment's epoch."""

    def __init__(self, file: sqlite3.Connection, experiment: str, epoch: int, allowed: SlownessAllowance) -> None:
        self._file = file
        self._key = (experiment, epoch)
        self._allowed = allowed
        query = "SELECT number, arm FROM arm WHERE experiment = ? AND epoch = ?"
        self._arms: dict[int, str] = dict(file.execute(query, self._key).fetchall())

    def until(self, last: int) -> None:
        """Closes the slices that end before a minute."""
        evidence = slower(self._file, *self._key)
        marks = ",".join("?" * len(self._arms))
        query = f"SELECT DISTINCT minute FROM slice WHERE arm IN ({marks}) AND minute < ? ORDER BY minute"
        numbers = tuple(self._arms)
        first: int | None = None
        times: dict[tuple[str, int], float] = {}
        for (minute,) in self._file.execute(query, (*numbers, last)).fetchall():
            first = minute if first is None else first
            for user, arm, ms in self._users(minute):
                times[user, arm] = max(ms, times.get((user, arm), 0.0))
            if len(times) < _LEAST and minute - first < _MOST_MINUTES:
                continue
            evidence = self._closed(evidence, times, minute)
            self._file.execute(
                f"DELETE FROM slice WHERE arm IN ({marks}) AND minute BETWEEN ? AND ?", (*numbers, first, minute)
            )
            first, times = None, {}
        self._file.execute(
            "INSERT OR REPLACE INTO slower VALUES (?, ?, ?)", (*self._key, msgspec.json.encode(evidence.logs).decode())
        )

    def _users(self, minute: int) -> list[tuple[str, int, float]]:
        """Returns user, arm and slowest time of the users in a minute."""
        marks = ",".join("?" * len(self._arms))
        return self._file.execute(
            "SELECT slice.user, slice.arm, ms FROM slice JOIN sums ON sums.arm = slice.arm AND sums.user = slice.user "
            f"WHERE minute = ? AND slice.arm IN ({marks}) AND (slow_ms IS NULL OR slow_ms < ?)",
            (minute, *self._arms, minute * MINUTE_MS - _REST_MS),
        ).fetchall()

    def _closed(self, evidence: Slower, times: dict[tuple[str, int], float], minute: int) -> Slower:
        """Returns the evidence with a slice, whose slowest users are marked."""
        challengers = {number for number, arm in self._arms.items() if arm == CHALLENGER}
        users = [
            (float(self._allowed.less(ms)) if arm in challengers else ms, user, arm)
            for (user, arm), ms in times.items()
        ]
        top = sorted(users, reverse=True)[: math.ceil(_TOP * len(users))]
        self._file.executemany(
            "UPDATE sums SET slow_ms = ? WHERE arm = ? AND user = ?",
            [(minute * MINUTE_MS, arm, user) for _, user, arm in top],
        )
        theirs = sum(arm in challengers for _, _, arm in users)
        mine = sum(arm in challengers for _, _, arm in top)
        return evidence.with_slice(mine, len(top), theirs, len(users) - theirs)
