"""Impressions and outcomes joined by experiment: each arm's sums, and what was set aside.

Everything is a fold over two topics, so whoever reads them from the beginning comes to the same figures. An outcome
counts once for its impression and item; one that names no known impression or none of its items, that comes before
what it is of, or long after, is counted and set aside.

An experiment is told by its id, which holds its start, so that a name can be used again. It is counted by epochs: in
each the arms are the same ones throughout, and only within it are they compared.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from models.impression import CLICK, Impression, Outcome, Shadowed
from models.sequential import Arm
from serving.assignment import CHALLENGER, CONTROL
from tessera.guardrail import Sums

WINDOW_MS = 7 * 86_400_000
# Clocks of two machines may be so far apart.
SKEW_MS = 60_000
_TIMES = 20_000
# What is summed for each user.
_REQUESTS, _FAILED, _EMPTY, _ANSWERS, _OUTCOMES, _PREDICTED, _SHOWN, _NOVEL, _NOVEL_OUTCOMES = range(9)


@dataclass
class Tally:
    """One arm in one epoch.

    Attributes:
        users: by user, the sums that the constants above name.
        kinds: outcomes by what they are.
        ms: the last requests' times.
    """

    users: dict[str, list[float]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    ms: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))

    def show(self, message: Impression, novel: int) -> None:
        """Takes in what a user was shown, or that they were not."""
        sums = self.users.setdefault(message.user, [0.0] * 9)
        sums[_REQUESTS] += 1
        self.ms.append(message.ms)
        if message.failed:
            sums[_FAILED] += 1
            return
        sums[_ANSWERS] += 1
        sums[_EMPTY] += not message.items
        sums[_PREDICTED] += sum(message.scores)
        sums[_SHOWN] += len(message.items)
        sums[_NOVEL] += novel

    def note(self, user: str, what: str, *, counts: bool, novel: bool) -> None:
        """Takes in what a user did."""
        self.kinds[what] += 1
        if counts:
            self.users[user][_OUTCOMES] += 1
            self.users[user][_NOVEL_OUTCOMES] += novel

    def sums(self, users: Iterable[str] | None = None) -> Sums:
        """What the rule judges; of some users, or all."""
        chosen = self.users.values() if users is None else [self.users[user] for user in users]
        found = np.array(list(chosen), dtype=np.float64).reshape(-1, 9)
        answered = found[found[:, _ANSWERS] > 0]
        return Sums(
            rate=Arm.of(answered[:, _ANSWERS], answered[:, _OUTCOMES]),
            calibration=Arm.of(answered[:, _PREDICTED], answered[:, _OUTCOMES]),
            novelty=Arm.of(answered[:, _SHOWN], answered[:, _NOVEL]),
            users=len(found),
            failed=int((found[:, _FAILED] > 0).sum()),
            empty=int((found[:, _EMPTY] > 0).sum()),
            ms=np.array(self.ms),
        )

    def of_novel_items(self) -> Arm:
        """Outcomes by novel items shown, of the users who were shown any."""
        found = np.array([sums for sums in self.users.values() if sums[_NOVEL]], dtype=np.float64).reshape(-1, 9)
        return Arm.of(found[:, _NOVEL], found[:, _NOVEL_OUTCOMES])

    @property
    def requests(self) -> int:
        """All of them, answered or not."""
        return int(sum(sums[_REQUESTS] for sums in self.users.values()))

    def answers(self) -> dict[str, int]:
        """Answers by user: who is heavy."""
        return {user: int(sums[_ANSWERS]) for user, sums in self.users.items()}

    def faults(self) -> tuple[int, int]:
        """Requests without an answer, and answers without an item."""
        failed = sum(sums[_FAILED] for sums in self.users.values())
        return int(failed), int(sum(sums[_EMPTY] for sums in self.users.values()))


Arms = dict[str, Tally]


@dataclass(frozen=True)
class _Shown:
    user: str
    time_ms: int
    tallies: tuple[Tally, ...]
    items: tuple[str, ...]


class Ledger:
    """The fold.

    Args:
        outcome: which outcomes count.
        familiar: ids of items that the champion's training knew well; how often others are shown is a guardrail. None
            at all: nothing is known of items.
    """

    def __init__(self, *, outcome: str = CLICK, familiar: frozenset[str] = frozenset()) -> None:
        self.shadows: dict[str, list[Shadowed]] = {}
        self.aside: Counter[str] = Counter()
        self.impressions = 0
        self.familiar = familiar
        self._outcome = outcome
        self._epochs: dict[str, dict[int, Arms]] = {}
        self._shown: dict[str, _Shown] = {}
        self._counted: set[tuple[str, str, str]] = set()
        self._early: dict[str, list[Outcome]] = {}

    def arms(self, experiment: str, epoch: int) -> Arms:
        """Both arms of an experiment's epoch; empty ones where nothing has come."""
        return self._epochs.setdefault(experiment, {}).setdefault(epoch, {CONTROL: Tally(), CHALLENGER: Tally()})

    def epochs(self, experiment: str) -> dict[int, Arms]:
        """All epochs of an experiment in which anything came, oldest first."""
        return dict(sorted(self._epochs.get(experiment, {}).items()))

    def show(self, message: Impression | Shadowed) -> None:
        """Takes an impression in; one that comes again counts once."""
        if isinstance(message, Shadowed):
            self.shadows.setdefault(message.experiment, []).append(message)
            return
        if message.id in self._shown:
            self.aside["repeated impression"] += 1
            return
        self.impressions += 1
        tallies = tuple(
            self.arms(name, message.epochs.get(name, 0))[arm]
            for name, arm in message.arms.items()
            if arm in (CONTROL, CHALLENGER)
        )
        self._shown[message.id] = _Shown(message.user, message.time_ms, tallies, tuple(message.items))
        novel = sum(map(self._is_novel, message.items)) if tallies else 0
        for tally in tallies:
            tally.show(message, novel)
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
            for tally in shown.tallies:
                counts = outcome.what == self._outcome
                tally.note(shown.user, outcome.what, counts=counts, novel=self._is_novel(outcome.item))

    def _is_novel(self, item: str) -> bool:
        return bool(self.familiar) and item not in self.familiar

    @property
    def waiting(self) -> int:
        """Outcomes of impressions that nobody has seen yet."""
        return sum(len(found) for found in self._early.values())
