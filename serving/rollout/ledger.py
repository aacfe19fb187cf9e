"""Impressions and outcomes joined by experiment: each arm's sums, and what was set aside.

Everything is a fold over two topics, so whoever reads them from the beginning comes to the same figures. An outcome
counts once for its impression and item; one that names no known impression or none of its items, that comes before
what it is of, or long after, is counted and set aside.

The fold is kept in a file (SQLite), with the positions behind what was folded, in one transaction: a judge that starts
again goes on where it was, and holds nothing in memory but a page cache. What no outcome can join any more is removed.

An experiment is told by its id, which holds its start, so that a name can be used again. It is counted by epochs: in
each the arms are the same ones throughout, and only within it are they compared.
"""

import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from features.hashing import fingerprint
from serving.rollout import tally
from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.impression import CLICK, Impression, Outcome, Shadowed, decode_outcome, encode
from serving.rollout.sequential import Slower
from serving.rollout.tally import Tally, bucket_of, percentile
from serving.rollout.time_slices import MINUTE_MS, SlownessAllowance, close_slices, slower
from streaming.log.protocol import Positions

WINDOW_MS = 7 * 86_400_000
# Clocks of two machines may be so far apart.
SKEW_MS = 60_000
_VERSION = 1
# Outcomes that wait for their impression: how many, and how long. A server's queue can be so far behind.
_MOST_EARLY, _EARLY_MS = 100_000, 86_400_000
# An impression is kept so much longer than its outcomes count, for those that come on the last day.
_KEPT_MS = WINDOW_MS + 86_400_000
_CACHE_KIB = 16_384

Arms = dict[str, Tally]


class Ledger:
    """The fold. One thread uses it.

    Args:
        path: its file, made where there is none; None keeps it in a temporary file, for as long as this lives.
        copy: start from what the file holds and leave it as it is.
        outcome: which outcomes count. A file that was made for others is begun again, and so is another version's.
        familiar: ids of items that the champion's training knew well; how often others are shown is a guardrail. None
            at all: nothing is known of items.
        allowed: how much slower a challenger may be.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        copy: bool = False,
        outcome: str = CLICK,
        familiar: frozenset[str] = frozenset(),
        allowed: SlownessAllowance = SlownessAllowance(),  # noqa: B008 - frozen
    ) -> None:
        self.familiar = familiar
        self._outcome = outcome
        self._allowed = allowed
        self._made_for = f"{_VERSION} {outcome} {allowed}"
        self._file = _opened(path, copy=copy)
        self._arms: dict[tuple[str, int, str], int] = {}
        # What was folded since the last read, by what it is added to: one statement a batch instead of one a message.
        self._sums: dict[tuple[int, str], list[float]] = {}
        self._times: Counter[tuple[int, int]] = Counter()
        if self._meta() != self._made_for:
            self.restart()
        rows = self._file.execute("SELECT experiment, epoch, arm, number FROM arm")
        self._arms = {(experiment, epoch, arm): number for experiment, epoch, arm, number in rows}

    def close(self) -> None:
        """Closes the file; what was not kept is lost."""
        self._file.close()

    def restart(self) -> None:
        """Forgets everything: the topics, or what counts, are others than those that were folded."""
        tables = self._file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        with self._file:
            for (name,) in tables:
                self._file.execute(f"DROP TABLE {name}")
        self._file.executescript(tally.SCHEMA)
        self._file.execute("INSERT INTO meta VALUES ('made for', ?)", (self._made_for,))
        self._file.commit()
        self._arms.clear()

    def keep(self, positions: Positions) -> None:
        """Makes what was folded durable, together with the positions behind it."""
        self._flush()
        rows = [(topic, part, position) for (topic, part), position in positions.items()]
        self._file.executemany("INSERT OR REPLACE INTO position VALUES (?, ?, ?)", rows)
        self._file.commit()

    @property
    def positions(self) -> Positions:
        """The next offset to fold of each partition; empty where nothing was kept yet."""
        return {(topic, part): at for topic, part, at in self._file.execute("SELECT * FROM position")}

    def arms(self, experiment: str, epoch: int) -> Arms:
        """Both arms of an experiment's epoch; empty ones where nothing has come."""
        self._flush()
        return {arm: Tally(self._file, self._arm(experiment, epoch, arm)) for arm in (CONTROL, CHALLENGER)}

    def epochs(self, experiment: str) -> dict[int, Arms]:
        """Returns all epochs of an experiment in which anything came, oldest first."""
        found = sorted({epoch for name, epoch, _ in self._arms if name == experiment})
        return {epoch: self.arms(experiment, epoch) for epoch in found}

    def slower(self, experiment: str, epoch: int) -> Slower:
        """Evidence that the challenger's answers take longer than the control's, of all slices that were closed."""
        return slower(self._file, experiment, epoch)

    def close_slices(self, now_ms: int) -> None:
        """Compares the arms' times in the minutes that are over; see `serving.rollout.time_slices`."""
        self._flush()
        close_slices(self._file, now_ms, self._allowed)

    def show(self, message: Impression | Shadowed) -> None:
        """Takes an impression in; one that comes again counts once."""
        if isinstance(message, Shadowed):
            self._show_shadowed(message)
            return
        arms = [
            self._arm(name, message.epochs.get(name, 0), arm)
            for name, arm in message.arms.items()
            if arm in (CONTROL, CHALLENGER)
        ]
        number = _number(message.id)
        # An outcome of what counts for nobody is known, and counts for nobody.
        items = np.array([_number(item) for item in message.items], dtype=np.int64).tobytes() if arms else b""
        row = (number, message.time_ms, message.user if arms else "", np.array(arms, dtype=np.int64).tobytes(), items)
        if not self._file.execute("INSERT OR IGNORE INTO shown VALUES (?, ?, ?, ?, ?)", row).rowcount:
            self._set_aside("repeated impression")
            return
        novel = sum(map(self._is_novel, message.items)) if arms else 0
        for arm in arms:
            self._add(arm, message, novel)
        for early, data in self._file.execute("SELECT number, outcome FROM early WHERE id = ?", (number,)).fetchall():
            self._file.execute("DELETE FROM early WHERE number = ?", (early,))
            self.note(decode_outcome(data))

    def _add(self, arm: int, message: Impression, novel: int) -> None:
        sums = self._sums.setdefault((arm, message.user), [0.0] * len(tally.COLUMNS))
        sums[tally.REQUESTS] += 1
        self._times[arm, bucket_of(message.ms)] += 1
        self._file.execute(
            "INSERT INTO slice VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET ms = MAX(ms, excluded.ms)",
            (arm, message.time_ms // MINUTE_MS, message.user, message.ms),
        )
        if message.failed:
            sums[tally.FAILED] += 1
            return
        sums[tally.ANSWERS] += 1
        sums[tally.EMPTY] += not message.items
        sums[tally.PREDICTED] += sum(message.scores)
        sums[tally.SHOWN] += len(message.items)
        sums[tally.NOVEL] += novel

    def note(self, outcome: Outcome) -> None:
        """Takes an outcome in; one that is ahead of its impression waits for it."""
        number, item = _number(outcome.impression), _number(outcome.item)
        query = "SELECT time_ms, user, arms, items FROM shown WHERE id = ?"
        shown = self._file.execute(query, (number,)).fetchone()
        if shown is None:
            waiting = (number, time.time_ns() // 1_000_000, encode(outcome))
            self._file.execute("INSERT INTO early(id, since_ms, outcome) VALUES (?, ?, ?)", waiting)
            return
        time_ms, user, arms, items = shown
        if not arms:
            return
        if item not in np.frombuffer(items, dtype=np.int64):
            self._set_aside("item was not shown")
        elif outcome.time_ms < time_ms - SKEW_MS:
            self._set_aside("before its impression")
        elif outcome.time_ms > time_ms + WINDOW_MS:
            self._set_aside("too late")
        elif not self._file.execute(
            "INSERT OR IGNORE INTO counted VALUES (?, ?, ?)", (number, item, outcome.what)
        ).rowcount:
            self._set_aside("repeated outcome")
        else:
            for arm in np.frombuffer(arms, dtype=np.int64).tolist():
                self._count(arm, user, outcome)

    def _count(self, arm: int, user: str, outcome: Outcome) -> None:
        self._file.execute(
            "INSERT INTO kinds VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1", (arm, outcome.what)
        )
        if outcome.what == self._outcome:
            sums = self._sums.setdefault((arm, user), [0.0] * len(tally.COLUMNS))
            sums[tally.OUTCOMES] += 1
            sums[tally.NOVEL_OUTCOMES] += self._is_novel(outcome.item)

    def forget(self, now_ms: int, going: Iterable[str]) -> None:
        """Removes what can change no figure any more: call it when both topics were read to their ends.

        Args:
            now_ms: by the judge's own clock; a wrong clock in a message removes nothing.
            going: ids of the experiments that run; the sums of all others are removed.
        """
        old = now_ms - _KEPT_MS
        self._file.execute("DELETE FROM counted WHERE id IN (SELECT id FROM shown WHERE time_ms < ?)", (old,))
        self._file.execute("DELETE FROM shown WHERE time_ms < ?", (old,))
        most = "SELECT MAX(number) - ? FROM early"
        gone = self._file.execute(
            f"DELETE FROM early WHERE since_ms < ? OR number <= ({most})", (now_ms - _EARLY_MS, _MOST_EARLY)
        ).rowcount
        self._set_aside("unknown impression", gone)
        wanted = set(going)
        for experiment in {name for name, *_ in self._arms if name not in wanted}:
            self._remove(experiment)
        shadows = [name for (name,) in self._file.execute("SELECT experiment FROM shadow") if name not in wanted]
        for table in ("shadow", "shadow_times"):
            self._file.executemany(f"DELETE FROM {table} WHERE experiment = ?", [(name,) for name in shadows])

    def _remove(self, experiment: str) -> None:
        self._flush()
        for key in [key for key in self._arms if key[0] == experiment]:
            number = self._arms.pop(key)
            for table in ("sums", "kinds", "times", "slice"):
                self._file.execute(f"DELETE FROM {table} WHERE arm = ?", (number,))
            self._file.execute("DELETE FROM arm WHERE number = ?", (number,))
        self._file.execute("DELETE FROM slower WHERE experiment = ?", (experiment,))

    @property
    def aside(self) -> Counter[str]:
        """Messages that were set aside, by reason; see `waiting` too."""
        return Counter(dict(self._file.execute("SELECT why, count FROM aside").fetchall()))

    @property
    def waiting(self) -> int:
        """Outcomes of impressions that nobody has seen yet."""
        return int(self._file.execute("SELECT COUNT(*) FROM early").fetchone()[0])

    @property
    def impressions(self) -> int:
        """How many are kept, for outcomes to come."""
        return int(self._file.execute("SELECT COUNT(*) FROM shown").fetchone()[0])

    def shadowed(self, experiment: str) -> dict[str, Any]:
        """How many rankings in the shadow there were, how alike, how far off, how slow, how often broken."""
        query = "SELECT ranked, failed, alike, compared, drift FROM shadow WHERE experiment = ?"
        row = self._file.execute(query, (experiment,)).fetchone()
        ranked, failed, alike, compared, drift = row or (0, 0, 0.0, 0, 0.0)
        query = "SELECT bucket, count FROM shadow_times WHERE experiment = ?"
        times = dict(self._file.execute(query, (experiment,)).fetchall())
        return {
            "ranked": ranked,
            "failed": failed,
            "rank_correlation": alike / compared if compared else None,
            "score_drift": drift / ranked if ranked else None,
            "p50_ms": percentile(times, 0.5) if times else None,
            "p99_ms": percentile(times, 0.99) if times else None,
        }

    def _show_shadowed(self, message: Shadowed) -> None:
        alike, ranked = message.correlation, not message.failed
        self._file.execute(
            "INSERT INTO shadow VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET ranked = ranked + excluded.ranked, "
            "failed = failed + excluded.failed, alike = alike + excluded.alike, "
            "compared = compared + excluded.compared, drift = drift + excluded.drift",
            (message.experiment, ranked, not ranked, alike or 0.0, ranked and alike is not None, message.drift),
        )
        if ranked:
            self._file.execute(
                "INSERT INTO shadow_times VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
                (message.experiment, bucket_of(message.ms)),
            )

    def _is_novel(self, item: str) -> bool:
        return bool(self.familiar) and item not in self.familiar

    def _set_aside(self, why: str, count: int = 1) -> None:
        if count:
            self._file.execute(
                "INSERT INTO aside VALUES (?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count", (why, count)
            )

    def _arm(self, experiment: str, epoch: int, arm: str) -> int:
        key = (experiment, epoch, arm)
        if key not in self._arms:
            made = self._file.execute("INSERT INTO arm(experiment, epoch, arm) VALUES (?, ?, ?)", key)
            self._arms[key] = int(made.lastrowid or 0)
        return self._arms[key]

    def _flush(self) -> None:
        names = ", ".join(tally.COLUMNS)
        added = ", ".join(f"{name} = {name} + excluded.{name}" for name in tally.COLUMNS)
        marks = ", ".join("?" * len(tally.COLUMNS))
        self._file.executemany(
            f"INSERT INTO sums(arm, user, {names}) VALUES (?, ?, {marks}) ON CONFLICT DO UPDATE SET {added}",
            [(arm, user, *sums) for (arm, user), sums in self._sums.items()],
        )
        self._file.executemany(
            "INSERT INTO times VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [(arm, bucket, count) for (arm, bucket), count in self._times.items()],
        )
        self._sums.clear()
        self._times.clear()

    def _meta(self) -> str:
        with contextlib.suppress(sqlite3.DatabaseError):
            row = self._file.execute("SELECT value FROM meta WHERE name = 'made for'").fetchone()
            return str(row[0]) if row else ""
        return ""


def _opened(path: Path | None, *, copy: bool) -> sqlite3.Connection:
    """Returns a ledger's file, or a temporary one that is gone when it is closed."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect("" if path is None or copy else path)
    if path is not None and copy and path.exists():
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as other:
            other.backup(file)
    file.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if path is not None and not copy:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
    return file


def _number(name: str) -> int:
    """64 bits of a name, signed as the file wants them: two of 10^8 impressions share one in 1 of 3,700 ledgers."""
    return int(fingerprint([name]).view(np.int64)[0])
