"""A server's mirror: a thread that folds the log's deltas into it, and begins anew when the log was away."""

import contextlib
import threading
from collections.abc import Iterator

from models.bundle import delta
from models.bundle.bundle import Bundle
from serving.metrics import Metrics
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.rounds import Rounds
from serving.store.protocol import OnlineStore
from serving.store.writer import position_of
from tessera.settings import Settings

_BATCH = 256
_WAIT_S = 0.1
_PAUSE_S = 1.0


@contextlib.contextmanager
def mirrored(
    settings: Settings, store: OnlineStore, bundle: Bundle, metrics: Metrics | None = None
) -> Iterator[MirrorRows]:
    """A bundle's rows from a mirror that is kept fresh from the settings' log; failures are counted."""
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        # What a writer has not written yet is folded from here.
        position = position_of(store, bundle.id, settings.topics.deltas) or 0
        position = min(position, log.end_offsets(settings.topics.deltas)[0])
    mirror = Mirror(store, bundle.id)
    with following(settings, mirror, position, Rounds("mirror", "mirror", metrics or Metrics())):
        yield MirrorRows(mirror, StoreRows(store, bundle.id))


@contextlib.contextmanager
def following(settings: Settings, mirror: Mirror, position: int, rounds: Rounds) -> Iterator[None]:
    """Keeps a mirror fresh while the body runs.

    Args:
        position: of the deltas' topic, before the mirror read the store.
        rounds: notes what goes wrong; meanwhile the mirror lags, and rows come from the store.
    """
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(settings, mirror, position, rounds, stop), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _follow(settings: Settings, mirror: Mirror, position: int, rounds: Rounds, stop: threading.Event) -> None:
    at = position
    while not stop.is_set():
        with rounds.round(), contextlib.closing(settings.open_log()) as log:
            with contextlib.closing(log.follow(settings.topics.deltas, at)) as follower:
                while not stop.is_set():
                    messages = follower.poll(_BATCH, _WAIT_S)
                    for message in messages:
                        mirror.fold(delta.decode(message.value))
                        at = message.offset + 1
                    if len(messages) < _BATCH:
                        mirror.caught_up()
                        rounds.well()
        stop.wait(_PAUSE_S)
