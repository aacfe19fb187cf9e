"""Joins impressions with outcomes: one row for each shown item, with a label for each kind of outcome.

Laws:

- A row is made when its impression closes: `JoinRule.horizon_ms` after the impression was appended to the log. A label
  is 1 if an outcome of its kind counts by the rule, else 0. So a negative is never corrected, and all labels of a row
  are complete.
- Whether an outcome counts depends on the two messages and their append times alone (`features.shown.rule`).
- An impression and an outcome count once. A repeat of an impression is recognised for two horizons after the close.
- Rows come in order of (append time, impression, position). Two joins that read all messages appended before a time
  and close until this time have made the same rows, in the same order, however they read the two topics.

Append times are times of the log, so a wrong clock of a device closes no window. The time of a row is at most five
minutes after the append, as in `streaming.fresh_events`.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from features.shown.message import Impression, Outcome, Shadowed
from features.shown.rule import TOO_LATE, JoinRule, refusal

CLOCK_SLACK_MS = 300_000
"""Largest time of a row after the append of its impression, milliseconds."""
MOST_WAITING = 100_000
"""Number of outcomes that wait for their impression."""


class ShownRow(NamedTuple):
    """Item that was shown, after its impression closed.

    Attributes:
        id: Id of the row, a hash of impression and item.
        impression: Id of the impression.
        user: User of the ranking.
        item: Item that was shown.
        time_ms: Time when the item was shown, milliseconds since 1970.
        position: 0-based position of the item.
        surface: Place where the items were shown.
        labels: 1 or 0 for each kind of outcome of the rule.
        appended_ms: Time when the impression was appended, milliseconds since 1970.
        fields: Served values of the fields of request and candidate, by name.
        explored: Positions of the impression whose order chance decided, ascending.
        read_us: Time that expressions over the clock read, microseconds since 1970. None: the time of the row.
    """

    id: int
    impression: str
    user: str
    item: str
    time_ms: int
    position: int
    surface: str
    labels: tuple[int, ...]
    appended_ms: int
    fields: dict[str, Any] = {}  # noqa: RUF012
    explored: tuple[int, ...] = ()
    read_us: int | None = None


def row_id(impression: str, item: str) -> int:
    """Returns the id of a row: 64 bits of a hash of impression and item."""
    return xxh3_64_intdigest(f"{len(impression)} {impression}{item}".encode(errors="surrogatepass"))


@dataclass
class _Open:
    """Impression whose window has not closed.

    Attributes:
        message: The impression.
        at_ms: Time of its append.
        positions: First position of each item.
        found: Pairs of an item and the number of an outcome's kind.
    """

    message: Impression
    at_ms: int
    positions: dict[str, int]
    found: set[tuple[str, int]] = field(default_factory=set)


class Join:
    """Fold of impressions and outcomes to rows.

    Attributes:
        counts: Messages by what became of them: `joined`, `late`, `repeated impression` and the other reasons.

    Args:
        rule: Kinds of outcomes and window.
        closed_ms: Impressions that were appended at this time or earlier have closed before this fold.
    """

    def __init__(self, rule: JoinRule, *, closed_ms: int = -1) -> None:
        self.rule = rule
        self.closed_ms = closed_ms
        self.counts: Counter[str] = Counter()
        self._kinds = {kind: number for number, kind in enumerate(rule.outcomes)}
        self._open: dict[str, _Open] = {}
        self._due: list[tuple[int, str]] = []
        # Closed impressions, until no repeat and no outcome of theirs is expected.
        self._closed: dict[str, int] = {}
        self._closed_order: deque[tuple[int, str]] = deque()
        self._waiting: dict[str, list[tuple[Outcome, int]]] = {}
        self._waiting_order: deque[tuple[int, str]] = deque()

    def __len__(self) -> int:
        """Number of open impressions."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Number of outcomes that wait for their impression."""
        return sum(map(len, self._waiting.values()))

    def show(self, message: Impression | Shadowed, at_ms: int) -> None:
        """Folds an impression.

        Args:
            message: The impression. A ranking in the shadow was never shown and is skipped.
            at_ms: Time when the message was appended, milliseconds since 1970.
        """
        if isinstance(message, Shadowed):
            return
        if message.id in self._open or message.id in self._closed:
            self.counts["repeated impression"] += 1
        elif at_ms <= self.closed_ms:
            self._remember(message.id, at_ms)
            self.counts["late impression"] += 1
        else:
            positions: dict[str, int] = {}
            for position, item in enumerate(message.items):
                positions.setdefault(item, position)
            self.counts["empty impression" if message.failed or not positions else "impression"] += 1
            heapq.heappush(self._due, (at_ms, message.id))
            self._open[message.id] = shown = _Open(message, at_ms, {} if message.failed else positions)
            for outcome, outcome_at_ms in self._waiting.pop(message.id, ()):
                self._join(shown, outcome, outcome_at_ms)

    def note(self, outcome: Outcome, at_ms: int) -> None:
        """Folds an outcome. An outcome that arrives before its impression waits for the impression.

        Args:
            outcome: The outcome.
            at_ms: Time when the message was appended, milliseconds since 1970.
        """
        if outcome.what not in self._kinds:
            self.counts["other kind"] += 1
        elif shown := self._open.get(outcome.impression):
            self._join(shown, outcome, at_ms)
        elif outcome.impression in self._closed:
            self.counts["late"] += 1
        else:
            self._waiting.setdefault(outcome.impression, []).append((outcome, at_ms))
            self._waiting_order.append((at_ms, outcome.impression))
            if len(self._waiting_order) > MOST_WAITING:
                self._give_up(*self._waiting_order.popleft())

    def close(self, read_ms: int, *, most: int | None = None) -> list[ShownRow]:
        """Closes the impressions whose horizon has passed, and returns their rows.

        Args:
            read_ms: All messages that were appended before this time have been folded. Milliseconds since 1970.
            most: Number of rows after which no later impression closes. Another call continues. Default: no limit.
        """
        until = read_ms - self.rule.horizon_ms - 1
        while self._waiting_order and self._waiting_order[0][0] < read_ms - self.rule.grace_ms:
            self._give_up(*self._waiting_order.popleft())
        if until <= self.closed_ms:
            return []
        while self._closed_order and self._closed_order[0][0] < until - 2 * self.rule.horizon_ms:
            self._closed.pop(self._closed_order.popleft()[1], None)
        rows: list[ShownRow] = []
        last = self.closed_ms
        while self._due and self._due[0][0] <= until:
            if most is not None and len(rows) >= most and self._due[0][0] > last:
                until = last
                break
            last, name = heapq.heappop(self._due)
            rows += self._rows(self._open.pop(name))
            self._remember(name, last)
        self.closed_ms = until
        self.counts["row"] += len(rows)
        return rows

    def _remember(self, name: str, at_ms: int) -> None:
        self._closed[name] = at_ms
        self._closed_order.append((at_ms, name))

    def _join(self, shown: _Open, outcome: Outcome, at_ms: int) -> None:
        found = (outcome.item, self._kinds[outcome.what])
        why = refusal(
            shown.message.time_ms,
            outcome.time_ms,
            window_ms=self.rule.window_ms,
            was_shown=outcome.item in shown.positions,
        )
        if why is None and not self.rule.is_in_time(shown.at_ms, at_ms):
            why = TOO_LATE
        if why is None and found in shown.found:
            why = "repeated outcome"
        if why is None:
            shown.found.add(found)
        self.counts["joined" if why is None else "late" if why == TOO_LATE else why] += 1

    def _give_up(self, at_ms: int, impression: str) -> None:
        """Drops the waiting outcomes of an impression, of which one was appended at a time."""
        waiting = self._waiting.get(impression, [])
        kept = [pair for pair in waiting if pair[1] > at_ms]
        self.counts["unknown impression"] += len(waiting) - len(kept)
        if kept:
            self._waiting[impression] = kept
        else:
            self._waiting.pop(impression, None)

    def _rows(self, shown: _Open) -> Iterable[ShownRow]:
        message = shown.message
        explored = tuple(sorted(set(message.explored)))
        for item, position in shown.positions.items():
            labels = tuple(int((item, kind) in shown.found) for kind in range(len(self.rule.outcomes)))
            time_ms = min(message.time_ms, shown.at_ms + CLOCK_SLACK_MS)
            yield ShownRow(
                row_id(message.id, item),
                message.id,
                message.user,
                item,
                time_ms,
                position,
                message.surface,
                labels,
                shown.at_ms,
                message.values_at(position),
                explored,
                message.read_us,
            )
