"""Ledger of a stream that follows the releases: which bundles it trains, and how far.

Each entry of the topic `followed` replaces the entry before it. Entries are written under one transactional id, so a
second follower of the same topics fences the first, which learns it at its next entry.
"""

import msgspec

from features.errors import LogError
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics

EVERY_S = 15.0
"""Time between two entries, seconds, unless something changes before."""
ALIVE_S = 60.0
"""A follower whose last entry is older than this, seconds, counts as ended."""


class FollowedBundle(msgspec.Struct, frozen=True):
    """State of one bundle.

    Attributes:
        bundle: Id of the bundle.
        roles: Aliases of its version, and `experiment` if a running experiment names the bundle.
        state: opening, training, paused or retired.
        why: Reason of a pause, or a warning; otherwise "".
        since: Start of the state, Unix seconds.
        seq: Number of the last micro-batch.
        positions: Topic, partition and next offset of each partition of the inputs.
        lag: Number of offsets of the inputs that are not read yet.
        counts: Messages since the start by their fate, batches and outages.
        freshness_ms: p50 and p99 of the ages of recent messages when the store had them; None before the first.
        log_loss: Log loss of recent events before they were learnt from; None if undefined.
    """

    bundle: str
    roles: tuple[str, ...] = ()
    state: str = "opening"
    why: str = ""
    since: float = 0.0
    seq: int = 0
    positions: tuple[tuple[str, int, int], ...] = ()
    lag: int = 0
    counts: dict[str, int] = {}
    freshness_ms: tuple[float, float] | None = None
    log_loss: float | None = None


class FollowEntry(msgspec.Struct, frozen=True):
    """Entry of the ledger.

    Attributes:
        at: Time of the entry, Unix seconds.
        process: Host and process id of the follower.
        model: Name of the model.
        bundles: Followed bundles, and those that were retired last.
        ended: True if the follower ended in order.
        registry: Error of the registry, or "".
    """

    at: float
    process: str
    model: str
    bundles: tuple[FollowedBundle, ...]
    ended: bool = False
    registry: str = ""

    def alive(self, now: float) -> bool:
        """Returns whether the follower still runs.

        Args:
            now: Present time, Unix seconds.
        """
        return not self.ended and now - self.at <= ALIVE_S


class FollowLedger:
    """Writer of the ledger. Opening it fences the follower before.

    Args:
        log: Log of the topics.
        topics: Names of the topics.
    """

    def __init__(self, log: EventLog, topics: Topics) -> None:
        self._topic = topics.followed
        log.create_topics({self._topic: 1})
        self._transactor = log.transactor(f"follow-{self._topic}")

    def write(self, entry: FollowEntry) -> None:
        """Writes an entry.

        Raises:
            FencedError: Another follower of these topics has taken over.
            LogError: The log does not answer.
        """
        with self._transactor.begin() as transaction:
            transaction.append(self._topic, msgspec.json.encode(entry), partition=0)

    def close(self) -> None:
        """Closes the writer. Its entries stay."""
        self._transactor.close()


def newest_entry(log: EventLog, topics: Topics) -> FollowEntry | None:
    """Returns the newest entry. None: no stream has followed the releases on this log.

    Raises:
        LogError: The log does not answer.
    """
    try:
        end = log.end_offsets(topics.followed)[0]
    except LogError:
        # The first follower makes the topic. A log that does not answer raises here again.
        log.end_offsets(topics.deltas)
        return None
    oldest = log.offsets_at(topics.followed, 0)[0]
    span, start = 8, end
    while start > oldest:
        start = max(oldest, end - span)
        found = list(log.read(topics.followed, 0, start, end))
        if found:
            return msgspec.json.decode(found[-1].value, type=FollowEntry)
        span *= 8
    return None
