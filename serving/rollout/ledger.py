"""Impressions and outcomes joined by experiment: the sums of each arm, and the quarantined messages.

Everything is a fold over two topics, so all readers from the beginning get the same figures. An outcome counts once for
its impression and item. An outcome is counted as quarantined if it names an unknown impression or an item that the
impression lacks, or comes before its impression or long after it.

The fold is kept in a file (SQLite), with the positions after the folded messages, in one transaction. A judge that
restarts continues there, and holds nothing in memory but a page cache. Rows that no outcome can join any more are
removed.

An experiment is identified by its id, which holds its start, so that a name can be used again. It is counted by epochs:
within an epoch the arms do not change, and only within an epoch are they compared.
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
from features.shown.message import CLICK, Impression, Outcome, Shadowed, decode_outcome, encode
from features.shown.rule import refusal
from features.value.forgotten import ForgottenUsers
from serving.rollout import tally
from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.ledger_users import hide_users
from serving.rollout.sequential import Slower
from serving.rollout.tally import Tally, bucket_of, percentile
from serving.rollout.time_slices import MINUTE_MS, SlownessAllowance, close_slices, slower
from streaming.log.protocol import Positions

WINDOW_MS = 7 * 86_400_000
_VERSION = 1
# Outcomes that wait for their impression: number and time. A server's queue can lag this much.
_MOST_EARLY, _EARLY_MS = 100_000, 86_400_000
# An impression is kept this much longer than its outcomes count, for outcomes that arrive on the last day.
_KEPT_MS = WINDOW_MS + 86_400_000
_CACHE_KIB = 16_384

Arms = dict[str, Tally]


class Ledger:
    """Fold of impressions and outcomes. One thread uses it.

    Args:
        path: File, made if missing; None uses a temporary file that is deleted with this object.
        copy: True starts from the file's content and never changes the file.
        outcome: Outcomes that count. A file for other outcomes, or of another version, is cleared.
        familiar: Ids of items that the champion's training knew well; the share of other shown items is a guardrail.
            None: nothing is known about items.
        allowed: Slowness that a challenger is allowed.
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
        self._content = f"{_VERSION} {outcome} {allowed}"
        self._file = _opened(path, copy=copy)
        self._arms: dict[tuple[str, int, str], int] = {}
        # Folded since the last read, by the row to add to: one statement a batch instead of one a message.
        self._sums: dict[tuple[int, str], list[float]] = {}
        self._times: Counter[tuple[int, int]] = Counter()
        if self._meta() != self._content:
            self.restart()
        rows = self._file.execute("SELECT experiment, epoch, arm, number FROM arm")
        self._arms = {(experiment, epoch, arm): number for experiment, epoch, arm, number in rows}

    def close(self) -> None:
        """Closes the file; changes since the last `keep` are lost."""
        self._file.close()

    def restart(self) -> None:
        """Clears the ledger: the topics, or the outcomes that count, are not those that were folded."""
        tables = self._file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        with self._file:
            for (name,) in tables:
                self._file.execute(f"DROP TABLE {name}")
        self._file.executescript(tally.SCHEMA)
        self._file.execute("INSERT INTO meta VALUES ('made for', ?)", (self._content,))
        self._file.commit()
        self._arms.clear()

    def keep(self, positions: Positions) -> None:
        """Makes the folded messages durable, together with the positions after them."""
        self._flush()
        rows = [(topic, part, position) for (topic, part), position in positions.items()]
        self._file.executemany("INSERT OR REPLACE INTO position VALUES (?, ?, ?)", rows)
        self._file.commit()

    @property
    def positions(self) -> Positions:
        """Returns the next offset to fold of each partition; empty if nothing was kept yet."""
        return {(topic, part): at for topic, part, at in self._file.execute("SELECT * FROM position")}

    def arms(self, experiment: str, epoch: int) -> Arms:
        """Returns both arms of an experiment's epoch; empty ones without messages."""
        self._flush()
        return {arm: Tally(self._file, self._arm(experiment, epoch, arm)) for arm in (CONTROL, CHALLENGER)}

    def epochs(self, experiment: str) -> dict[int, Arms]:
        """Returns all epochs of an experiment with messages, oldest first."""
        starts = sorted({epoch for name, epoch, _ in self._arms if name == experiment})
        return {epoch: self.arms(experiment, epoch) for epoch in starts}

    def slower(self, experiment: str, epoch: int) -> Slower:
        """Returns the evidence, of all closed slices, that the challenger's answers take longer than the control's."""
        return slower(self._file, experiment, epoch)

    def close_slices(self, now_ms: int) -> None:
        """Compares the arms' times in past minutes; see `serving.rollout.time_slices`."""
        self._flush()
        close_slices(self._file, now_ms, self._allowed)

    def hide(self, users: ForgottenUsers) -> None:
        """Replaces the ids of forgotten users by salted hashes. No figure changes.

        Args:
            users: All forgotten users. Later messages must name them by their hashes, as `ForgottenUsers.alias` does.
        """
        self._flush()
        if hide_users(self._file, users):
            self._file.commit()
            # The write-ahead file keeps old pages until it is emptied.
            self._file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def show(self, message: Impression | Shadowed) -> None:
        """Folds an impression; a repeated impression counts once."""
        if isinstance(message, Shadowed):
            self._show_shadowed(message)
            return
        arms = [
            self._arm(name, message.epochs.get(name, 0), arm)
            for name, arm in message.arms.items()
            if arm in (CONTROL, CHALLENGER)
        ]
        number = _number(message.id)
        # An outcome of a kind that does not count is known, and counts for no arm.
        items = np.array([_number(item) for item in message.items], dtype=np.int64).tobytes() if arms else b""
        row = (number, message.time_ms, message.user if arms else "", np.array(arms, dtype=np.int64).tobytes(), items)
        if not self._file.execute("INSERT OR IGNORE INTO shown VALUES (?, ?, ?, ?, ?)", row).rowcount:
            self._quarantine("repeated impression")
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
        """Folds an outcome; an outcome that arrives before its impression waits for it."""
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
        was_shown = item in np.frombuffer(items, dtype=np.int64)
        why = refusal(time_ms, outcome.time_ms, window_ms=WINDOW_MS, was_shown=was_shown)
        if why is not None:
            self._quarantine(why)
        elif not self._file.execute(
            "INSERT OR IGNORE INTO counted VALUES (?, ?, ?)", (number, item, outcome.what)
        ).rowcount:
            self._quarantine("repeated outcome")
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
        """Removes rows that can change no figure any more: call it when both topics were read to their ends.

        Args:
            now_ms: Time of the judge's own clock, milliseconds; a wrong clock in a message removes nothing.
            going: Ids of the running experiments; the sums of all others are removed.
        """
        old = now_ms - _KEPT_MS
        self._file.execute("DELETE FROM counted WHERE id IN (SELECT id FROM shown WHERE time_ms < ?)", (old,))
        self._file.execute("DELETE FROM shown WHERE time_ms < ?", (old,))
        most = "SELECT MAX(number) - ? FROM early"
        removed = self._file.execute(
            f"DELETE FROM early WHERE since_ms < ? OR number <= ({most})", (now_ms - _EARLY_MS, _MOST_EARLY)
        ).rowcount
        self._quarantine("unknown impression", removed)
        kept = set(going)
        for experiment in {name for name, *_ in self._arms if name not in kept}:
            self._remove(experiment)
        shadows = [name for (name,) in self._file.execute("SELECT experiment FROM shadow") if name not in kept]
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
        """Counts quarantined messages by reason; see `waiting` too."""
        return Counter(dict(self._file.execute("SELECT why, count FROM aside").fetchall()))

    @property
    def waiting(self) -> int:
        """Number of outcomes whose impression has not arrived."""
        return int(self._file.execute("SELECT COUNT(*) FROM early").fetchone()[0])

    @property
    def impressions(self) -> int:
        """Number of impressions that are kept for outcomes to come."""
        return int(self._file.execute("SELECT COUNT(*) FROM shown").fetchone()[0])

    def shadowed(self, experiment: str) -> dict[str, Any]:
        """Returns the number of shadow rankings, their correlation, drift, times and failures."""
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

    def _quarantine(self, why: str, count: int = 1) -> None:
        if count:
            self._file.execute(
                "INSERT INTO aside VALUES (?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count", (why, count)
            )

    def _arm(self, experiment: str, epoch: int, arm: str) -> int:
        key = (experiment, epoch, arm)
        if key not in self._arms:
            cursor = self._file.execute("INSERT INTO arm(experiment, epoch, arm) VALUES (?, ?, ?)", key)
            self._arms[key] = int(cursor.lastrowid or 0)
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
    """Returns a ledger's file, or a temporary file that is deleted when it is closed."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect("" if path is None or copy else path)
    if path is not None and copy and path.exists():
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source:
            source.backup(file)
    file.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if path is not None and not copy:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
    return file


def _number(name: str) -> int:
    """Hashes a name to 64 bits, signed as SQLite needs: two of 10^8 impressions share one in 1 of 3,700 ledgers."""
    return int(fingerprint([name]).view(np.int64)[0])
