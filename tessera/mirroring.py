"""A server's mirror: a thread that folds the log's deltas into it, and begins anew when the log was away."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from features.error import TesseraError
from models import delta
from models.bundle import Bundle
from serving.mirror import Mirror
from serving.rows import MirrorRows, StoreRows
from serving.store import OnlineStore
from streaming.writer import POSITION
from tessera.settings import Settings

_LOGGER = logging.getLogger(__name__)
_BATCH = 256
_WAIT_S = 0.1
_PAUSE_S = 1.0


@contextlib.contextmanager
def mirrored(settings: Settings, store: OnlineStore, bundle: Bundle) -> Iterator[MirrorRows]:
    """A bundle's rows from a mirror that is kept fresh from the settings' log."""
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        position = log.end_offsets(settings.topics.deltas)[0]
        if (found := store.read_records(bundle.id, POSITION, [settings.topics.deltas])) != [None]:
            # What a writer has not written yet is folded from here.
            position = min(position, int(found[0] or 0))
        else:
            position = 0
    mirror = Mirror(store, bundle.id)
    with following(settings, mirror, position, on_error=lambda error: _LOGGER.warning("mirror: %s", error)):
        yield MirrorRows(mirror, StoreRows(store, bundle.id))


@contextlib.contextmanager
def following(
    settings: Settings, mirror: Mirror, position: int, *, on_error: Callable[[TesseraError], None] = lambda error: None
) -> Iterator[None]:
    """Keeps a mirror fresh while the body runs.

    Args:
        position: of the deltas' topic, before the mirror read the store.
        on_error: called when the log is away; meanwhile the mirror says that it lags.
    """
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(settings, mirror, position, on_error, stop), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _follow(
    settings: Settings, mirror: Mirror, position: int, on_error: Callable[[TesseraError], None], stop: threading.Event
) -> None:
    at = position
    while not stop.is_set():
        try:
            with contextlib.closing(settings.open_log()) as log:
                with contextlib.closing(log.follow(settings.topics.deltas, at)) as follower:
                    while not stop.is_set():
                        messages = follower.poll(_BATCH, _WAIT_S)
                        for message in messages:
                            mirror.fold(delta.decode(message.value))
                            at = message.offset + 1
                        if len(messages) < _BATCH:
                            mirror.caught_up()
        except TesseraError as error:
            on_error(error)
            stop.wait(_PAUSE_S)
