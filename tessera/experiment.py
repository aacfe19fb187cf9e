"""Impressions and outcomes joined by experiment: each arm's sums, and what was set aside.

Everything is a fold over two topics, so whoever reads them from the beginning comes to the same figures. An outcome
counts once for its impression and item; one that names no known impression or none of its items, that comes before
what it is of, or long after, is counted and set aside.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from models.impression import Impression, Outcome, Shadowed
from models.sequential import Arm
from serving.assignment import CHALLENGER, CONTROL

WINDOW_MS = 7 * 86_400_000
# Clocks of two machines may be so far apart.
SKEW_MS = 60_000
_TIMES = 20_000
_BINS = 10


@dataclass
class Tally:
    """One arm as it stands.

    Attributes:
        users: impressions and outcomes by user; last_ms: when each was last shown something.
        failed, empty: requests without an answer, and answers without an item.
        ms: the last requests' times.
        predicted: sum of the scores of items shown; shown: how many they are.
        novel: items shown that the champion's training hardly knew; see `Ledger`.
    """

    users: dict[str, list[int]] = field(default_factory=dict)
    last_ms: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    failed: int = 0
    empty: int = 0
    predicted: float = 0.0
    shown: int = 0
    novel: int = 0
    ms: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))

    def arm(self) -> Arm:
        """The sums that the statistics read."""
        if not self.users:
            return Arm()
        sums = np.array(list(self.users.values()), dtype=np.float64)
        i, c = sums[:, 0], sums[:, 1]
        return Arm(len(sums), int(i.sum()), int(c.sum()), float(i @ i), float(c @ c), float(i @ c))

    def users_since(self, time_ms: float) -> int:
        """How many users were shown something at a time or later."""
        return sum(last >= time_ms for last in self.last_ms.values())

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(np.array(self.ms), 99)) if self.ms else 0.0

    @property
    def calibration(self) -> float | None:
        """Outcomes over what was predicted for the items shown; None before anything was."""
        outcomes = sum(found for _, found in self.users.values())
        return outcomes / self.predicted if self.predicted else None


@dataclass(frozen=True)
class _Shown:
    user: str
    time_ms: int
    arms: dict[str, str]
    items: frozenset[str]


class Ledger:
    """The fold.

    Args:
        experiments: names of those to keep.
        rare: ids of items that the champion's training hardly knew; how often they are shown is a guardrail.
    """

    def __init__(self, experiments: Iterable[str], *, rare: frozenset[str] = frozenset()) -> None:
        self.tallies = {name: {CONTROL: Tally(), CHALLENGER: Tally()} for name in experiments}
        self.shadows: dict[str, list[Shadowed]] = {name: [] for name in self.tallies}
        self.aside: Counter[str] = Counter()
        self.impressions = 0
        self._rare = rare
        self._shown: dict[str, _Shown] = {}
        self._counted: set[tuple[str, str, str]] = set()
        self._early: dict[str, list[Outcome]] = {}

    def show(self, message: Impression | Shadowed) -> None:
        """Takes an impression in; one that comes again counts once."""
        if isinstance(message, Shadowed):
            if message.experiment in self.shadows:
                self.shadows[message.experiment].append(message)
            return
        if message.id in self._shown:
            self.aside["repeated impression"] += 1
            return
        self.impressions += 1
        arms = {name: arm for name, arm in message.arms.items() if name in self.tallies and arm in self.tallies[name]}
        self._shown[message.id] = _Shown(message.user, message.time_ms, arms, frozenset(message.items))
        for name, arm in arms.items():
            tally = self.tallies[name][arm]
            tally.requests += 1
            tally.ms.append(message.ms)
            if message.failed:
                tally.failed += 1
                continue
            tally.empty += not message.items
            tally.users.setdefault(message.user, [0, 0])[0] += 1
            tally.last_ms[message.user] = max(message.time_ms, tally.last_ms.get(message.user, 0))
            tally.predicted += sum(message.scores)
            tally.shown += len(message.items)
            tally.novel += sum(item in self._rare for item in message.items)
        for outcome in self._early.pop(message.id, ()):
            self.note(outcome)

    def note(self, outcome: Outcome) -> None:
        """Takes an outcome in; one that is ahead of its impression waits for it."""
        shown = self._shown.get(outcome.impression)
        if shown is None:
            self._early.setdefault(outcome.impression, []).append(outcome)
            return
        key = (outcome.impression, outcome.item, outcome.what)
        if outcome.item not in shown.items:
            self.aside["item was not shown"] += 1
        elif outcome.time_ms < shown.time_ms - SKEW_MS:
            self.aside["before its impression"] += 1
        elif outcome.time_ms > shown.time_ms + WINDOW_MS:
            self.aside["too late"] += 1
        elif key in self._counted:
            self.aside["repeated outcome"] += 1
        else:
            self._counted.add(key)
            for name, arm in shown.arms.items():
                self.tallies[name][arm].users[shown.user][1] += 1

    @property
    def waiting(self) -> int:
        """Outcomes of impressions that nobody has seen yet."""
        return sum(len(found) for found in self._early.values())
