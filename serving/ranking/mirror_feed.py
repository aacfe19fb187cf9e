"""Folds the log's deltas into a server's mirror in a thread. Continues after an outage of the log."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from models.bundle import delta
from models.bundle.bundle import Bundle
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.shared_rows import SharedRows
from serving.store.protocol import OnlineStore
from serving.store.writer import position_of
from streaming.log.protocol import EventLog, Offsets, advanced, ends_of, offset_in
from streaming.log.topics import Topics

_BATCH = 256
_WAIT_S = 0.1
_PAUSE_S = 1.0


@contextlib.contextmanager
def mirrored(
    open_log: Callable[[], EventLog],
    topics: Topics,
    store: OnlineStore,
    bundle: Bundle,
    *,
    metrics: Metrics | None = None,
    shared: Path | None = None,
) -> Iterator[MirrorRows]:
    """Yields a bundle's rows from a mirror that is kept fresh from the log while the body runs.

    Args:
        open_log: Opens the event log. The mirror opens the log again after an outage.
        topics: Names of the log's topics.
        store: Store that has the bundle. While the mirror lags, rows come from the store.
        bundle: The mirrored bundle.
        metrics: Counts failures of the feed.
        shared: Directory in memory where several processes share the table. Default: the table is of this process.

    Raises:
        LogError: The log is unavailable at the start.
        StoreError: The store is unavailable at the start.
    """
    with contextlib.closing(open_log()) as log:
        log.create_topics(topics.partitions())
        # The mirror folds from this position, since later deltas may be missing in the store.
        stored = position_of(store, bundle.id, topics.deltas) or ()
        position = tuple(min(offset_in(stored, n), end) for n, end in enumerate(ends_of(log, topics.deltas)))
    with contextlib.ExitStack() as stack:
        held = None
        if shared is not None:
            held = stack.enter_context(contextlib.closing(SharedRows(shared, store, bundle.id, position)))
            # The process that read the table may be gone before it folded the deltas from its position on.
            position = tuple(min(offset, offset_in(held.position, n)) for n, offset in enumerate(position))
        mirror = Mirror(store, bundle.id, bundle.schema.aggregates, held)
        rounds = Rounds("mirror", "mirror", metrics or Metrics())
        stack.enter_context(mirror_feed(open_log, topics.deltas, mirror, position, rounds))
        yield MirrorRows(mirror, StoreRows(store, bundle.id))


@contextlib.contextmanager
def mirror_feed(
    open_log: Callable[[], EventLog], topic: str, mirror: Mirror, position: Offsets, rounds: Rounds
) -> Iterator[None]:
    """Folds deltas into a mirror while the body runs.

    Args:
        open_log: Opens the event log.
        topic: Name of the deltas' topic.
        mirror: Receives the deltas.
        position: First offset to read of each partition. The mirror's rows must contain all deltas before it.
        rounds: Records failures. While the feed fails, the mirror lags and rows come from the store.
    """
    offsets = position
    mirror.moved(offsets)

    def follow(stop: threading.Event) -> None:
        nonlocal offsets
        with contextlib.closing(open_log()) as log, contextlib.closing(log.follow(topic, offsets)) as follower:
            while not stop.is_set():
                messages = follower.poll(_BATCH, _WAIT_S)
                for message in messages:
                    mirror.fold(delta.decode(message.value))
                    offsets = advanced(offsets, [message])
                    mirror.moved(offsets)
                if len(messages) < _BATCH:
                    mirror.caught_up()
                    rounds.well()

    with contextlib.closing(Background("mirror", follow, rounds, every_s=_PAUSE_S, at_once=True)):
        yield
