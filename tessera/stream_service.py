"""Wiring of the online parts: a stream's trainer and writer, and a server, each over the settings' log and store."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from features.errors import TesseraError
from models.bundle.bundle import Bundle
from models.registry.registry import CHAMPION
from serving.store.fill import fill_store
from serving.store.protocol import OnlineStore
from serving.store.verify import replay
from serving.store.writer import StoreWriter, position_of
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tessera.settings import Settings

_DRAIN_WAIT_S = 0.5


def champion(settings: Settings, model: str | None) -> Bundle:
    """The bundle that serves."""
    registry = settings.open_registry(create=False)
    return registry.open(registry.resolve(model, CHAMPION), settings.bundles)


class Stream:
    """Trainer and store writer in one loop: what a micro-batch changed is in the store before the next one starts.

    Args:
        bundle: whose table is trained.
        log, store: open; they stay open.
        topics: their names.
        options: of the trainer.
        snapshots: see `Trainer`.
        storage: how a store that is filled for the first time keeps rows.
    """

    def __init__(
        self,
        bundle: Bundle,
        log: EventLog,
        store: OnlineStore,
        *,
        topics: Topics,
        options: TrainerOptions = TrainerOptions(),  # noqa: B008 - frozen
        snapshots: Snapshots | None = None,
        storage: str = "float32",
    ) -> None:
        self.trainer = Trainer(log, bundle, topics=topics, options=options, snapshots=snapshots)
        self.freshness_ms: list[float] = []
        self.writer = open_writer(
            bundle, log, store, topics, snapshots=snapshots, storage=storage, watch=self.freshness_ms.extend
        )

    def run_once(self, *, wait_s: float | None = None) -> int:
        """One micro-batch through trainer and writer; returns how many messages it took."""
        taken = self.trainer.run_once(wait_s=wait_s)
        while self.writer.run_once():
            pass
        return taken

    def drain(self) -> None:
        """Goes on until both topics are read to their ends and the store has all of it."""
        while not self.trainer.drained():
            self.run_once(wait_s=_DRAIN_WAIT_S)
        while self.writer.run_once(wait_s=_DRAIN_WAIT_S):
            pass

    def close(self) -> None:
        """Lets go of the log; what was committed stays."""
        self.trainer.close()
        self.writer.close()


def open_writer(
    bundle: Bundle,
    log: EventLog,
    store: OnlineStore,
    topics: Topics,
    *,
    snapshots: Snapshots | None = None,
    storage: str = "float32",
    watch: Callable[[list[float]], None] = lambda ages_ms: None,
) -> StoreWriter:
    """A writer to a store, which is filled first, and whenever it was emptied, from snapshot and log."""
    log.create_topics(topics.partitions())

    def refill() -> None:
        fill_store(store, bundle, storage=storage)
        if position_of(store, bundle.id, topics.deltas) is None:
            replay(log, bundle, store, topics, snapshots.newest(bundle) if snapshots is not None else None)

    refill()
    return StoreWriter(log, bundle.id, store, topics=topics, refill=refill, watch=watch)


@contextlib.contextmanager
def open_stream(settings: Settings, bundle: Bundle, *, options: TrainerOptions) -> Iterator[Stream]:
    """A stream over the settings' log and store, closed in order."""
    with contextlib.closing(settings.open_store()) as store, contextlib.closing(settings.open_log()) as log:
        stream = Stream(
            bundle,
            log,
            store,
            topics=settings.topics,
            options=options,
            snapshots=Snapshots(settings.snapshots),
            storage=settings.storage,
        )
        with contextlib.closing(stream):
            yield stream


def until_stopped() -> threading.Event:
    """An event that SIGINT and SIGTERM set, so that a loop ends after the batch in hand."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def refuse_shared_topics(settings: Settings) -> None:
    """Raises where two models would train on each other's events: several models, and topics of no model's own."""
    models = settings.open_registry().models() if settings.has_registry else []
    if len(models) > 1 and not settings.topics.prefix:
        raise TesseraError(
            f"the registry holds several models ({', '.join(models)}), and the topics items and events belong to none; "
            "set TESSERA_TOPIC_PREFIX for each model, or give each a TESSERA_HOME"
        )


def bundle_at(settings: Settings, model: str | None, directory: Path | None) -> Bundle:
    """A bundle from a directory where one is named, else the champion."""
    from models.bundle import bundle as bundles

    return bundles.load_bundle(directory) if directory else champion(settings, model)
