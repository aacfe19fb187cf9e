"""Sums of one arm in one epoch, as a ledger keeps them: a row of sums for each user, and the times of answers."""

import math
import sqlite3
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.rollout.guardrails import Sums
from serving.rollout.sequential import Arm

SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE position(topic TEXT, part INTEGER, next INTEGER, PRIMARY KEY(topic, part)) WITHOUT ROWID;
CREATE TABLE aside(why TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID;
CREATE TABLE arm(number INTEGER PRIMARY KEY, experiment TEXT, epoch INTEGER, arm TEXT, UNIQUE(experiment, epoch, arm));
CREATE TABLE shown(id INTEGER PRIMARY KEY, time_ms INTEGER, user TEXT, arms BLOB, items BLOB);
CREATE INDEX shown_time ON shown(time_ms);
CREATE TABLE counted(id INTEGER, item INTEGER, what TEXT, PRIMARY KEY(id, item, what)) WITHOUT ROWID;
CREATE TABLE early(number INTEGER PRIMARY KEY, id INTEGER, since_ms INTEGER, outcome BLOB);
CREATE INDEX early_id ON early(id);
CREATE TABLE sums(arm INTEGER, user TEXT, requests REAL DEFAULT 0, failed REAL DEFAULT 0, empty REAL DEFAULT 0,
    answers REAL DEFAULT 0, outcomes REAL DEFAULT 0, predicted REAL DEFAULT 0, shown REAL DEFAULT 0,
    novel REAL DEFAULT 0, novel_outcomes REAL DEFAULT 0, slow_ms INTEGER, PRIMARY KEY(arm, user)) WITHOUT ROWID;
CREATE TABLE kinds(arm INTEGER, what TEXT, count INTEGER, PRIMARY KEY(arm, what)) WITHOUT ROWID;
CREATE TABLE times(arm INTEGER, bucket INTEGER, count INTEGER, PRIMARY KEY(arm, bucket)) WITHOUT ROWID;
CREATE TABLE slice(arm INTEGER, minute INTEGER, user TEXT, ms REAL, PRIMARY KEY(minute, arm, user)) WITHOUT ROWID;
CREATE TABLE slower(experiment TEXT, epoch INTEGER, logs TEXT, PRIMARY KEY(experiment, epoch)) WITHOUT ROWID;
CREATE TABLE shadow(experiment TEXT PRIMARY KEY, ranked INTEGER, failed INTEGER, alike REAL, compared INTEGER,
    drift REAL) WITHOUT ROWID;
CREATE TABLE shadow_times(experiment TEXT, bucket INTEGER, count INTEGER,
    PRIMARY KEY(experiment, bucket)) WITHOUT ROWID;
"""
COLUMNS = (
    "requests", "failed", "empty", "answers", "outcomes", "predicted", "shown", "novel", "novel_outcomes",
)  # fmt: skip
REQUESTS, FAILED, EMPTY, ANSWERS, OUTCOMES, PREDICTED, SHOWN, NOVEL, NOVEL_OUTCOMES = range(9)
# Buckets of times: this many for each doubling, so a percentile is right to 1.1 %.
_PER_DOUBLING = 32


def bucket_of(ms: float) -> int:
    """Returns the bucket of a time."""
    return math.floor(_PER_DOUBLING * math.log2(max(ms, 2.0**-10)))


def percentile(buckets: Mapping[int, int], share: float) -> float:
    """Returns the time below which a share of the counted times are; 0 if none was counted."""
    rest = share * sum(buckets.values())
    for bucket, count in sorted(buckets.items()):
        rest -= count
        if rest <= 0:
            return float(2 ** ((bucket + 0.5) / _PER_DOUBLING))
    return 0.0


_RATIO = "COUNT(*), SUM({e}), SUM({c}), SUM({e} * {e}), SUM({c} * {c}), SUM({e} * {c})"


class Tally:
    """Arm in one epoch; it reads the ledger's file at each call."""

    def __init__(self, file: sqlite3.Connection, number: int) -> None:
        self._file = file
        self._number = number

    def sums(self) -> Sums:
        """Returns the sums that the guardrails judge."""
        users, failed, empty, slow, requests = self._one(
            "COUNT(*), SUM(failed > 0), SUM(empty > 0), SUM(slow_ms IS NOT NULL), SUM(requests)"
        )
        return Sums(
            rate=self._arm("answers", "outcomes", "answers"),
            calibration=self._arm("predicted", "outcomes", "answers"),
            novelty=self._arm("shown", "novel", "answers"),
            users=int(users),
            failed=int(failed),
            empty=int(empty),
            slow=int(slow),
            requests=int(requests),
            p99_ms=percentile(dict(self._rows("SELECT bucket, count FROM times WHERE arm = ?")), 0.99),
        )

    def of_novel_items(self) -> Arm:
        """Returns outcomes by novel items shown, of users with any novel item."""
        return self._arm("novel", "novel_outcomes", "novel")

    def by_user(self) -> tuple[list[str], NDArray[np.float64]]:
        """Returns all users (U,) and their sums (U, 9), in the order of `COLUMNS`."""
        rows = self._rows(f"SELECT user, {', '.join(COLUMNS)} FROM sums WHERE arm = ? ORDER BY user")
        sums = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, len(COLUMNS))
        return [row[0] for row in rows], sums

    @property
    def kinds(self) -> Counter[str]:
        """Returns outcomes by kind."""
        return Counter(dict(self._rows("SELECT what, count FROM kinds WHERE arm = ?")))

    @property
    def requests(self) -> int:
        """Number of requests, answered or not."""
        return int(self._one("SUM(requests)")[0])

    def faults(self) -> tuple[int, int]:
        """Returns the numbers of requests without an answer, and of answers without an item."""
        failed, empty = self._one("SUM(failed), SUM(empty)")
        return int(failed), int(empty)

    def _arm(self, exposure: str, outcomes: str, counted: str) -> Arm:
        users, *sums = self._one(_RATIO.format(e=exposure, c=outcomes), f"AND {counted} > 0")
        return Arm(int(users), *sums)

    def _one(self, columns: str, where: str = "") -> list[float]:
        (row,) = self._rows(f"SELECT {columns} FROM sums WHERE arm = ? {where}")
        return [value or 0.0 for value in row]

    def _rows(self, query: str) -> list[Any]:
        return self._file.execute(query, (self._number,)).fetchall()
