"""Runs a stream: the trainer of a bundle's table, and the writer that keeps the online store fresh.

Trainer and writer share nothing but the log, so neither fills the other's memory. Each opens connections of its own.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from features.collector import frozen_heap
from features.errors import FencedError, LogError, StoreError, TesseraError
from features.storage.location import locate
from features.wire.schemas import Schemas
from models.bundle.bundle import Bundle
from models.registry.release import CHAMPION
from serving.store.fill import fill_store
from serving.store.protocol import OnlineStore
from serving.store.verify import replay
from serving.store.writer import StoreWriter, position_of
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.metrics import StreamMetrics
from streaming.shown.joiner import Joiner
from streaming.snapshot import Snapshots
from streaming.trainer import Totals, Trainer, TrainerOptions
from tessera.settings import Settings

_LOGGER = logging.getLogger(__name__)
ROLES = ("trainer", "writer")
_DRAIN_WAIT_S = 0.5
_LAG_EVERY_S = 1.0
_TICK_S = 0.25
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_WRITER_WAIT_S = 0.1
# An idle trainer learns after this time, seconds, that another trainer has taken over.
_CONFIRM_S = 15.0


@dataclass(frozen=True)
class StreamConnections:
    """Opens the systems of a stream.

    Attributes:
        log: Opens the event log for one role. The service leaves the context when the role ends.
        store: Opens the online store, likewise.
        topics: Names of the log's topics.
        snapshots: Keeps the trainer's state. None: a start reads the whole log.
        storage: Format of the rows of a bundle that the store does not hold yet: float32, float16 or int8.
        schemas: Schemas of messages in Avro and Protobuf.
    """

    log: Callable[[], AbstractContextManager[EventLog]]
    store: Callable[[], AbstractContextManager[OnlineStore]]
    topics: Topics = field(default_factory=Topics)
    snapshots: Snapshots | None = None
    storage: str = "float32"
    schemas: Schemas | None = None

    @staticmethod
    def of(settings: Settings, refused_schemas: Collection[int] = ()) -> "StreamConnections":
        """Returns the connections that the settings name. Each role opens and closes its own.

        Args:
            settings: Addresses.
            refused_schemas: Ids of schemas whose messages become dead letters.
        """
        return StreamConnections(
            log=lambda: closing(settings.open_log()),
            store=lambda: closing(settings.open_store()),
            topics=settings.topics,
            snapshots=settings.open_snapshots(),
            storage=settings.storage,
            schemas=settings.schemas(refused_schemas),
        )

    @staticmethod
    def shared(
        log: EventLog,
        store: OnlineStore,
        *,
        topics: Topics,
        snapshots: Snapshots | None = None,
        storage: str = "float32",
    ) -> "StreamConnections":
        """Returns connections over a log and a store that are open already and stay open."""
        return StreamConnections(lambda: nullcontext(log), lambda: nullcontext(store), topics, snapshots, storage)


class StreamService:
    """Runs the trainer and the store writer of one bundle, and the joiner where its events come from impressions.

    `run` gives each role a thread until it is told to stop. `once` drains the topics in the calling thread and ends.
    A caller that takes micro-batch after micro-batch opens the service with `with` and calls `run_once` or `drain`:
    then the changes of a micro-batch are in the store before the next micro-batch starts.

    Attributes:
        metrics: Figures of the stream.
        trainer, writer: The opened roles, between `open` and `close`.
        joiner: The opened joiner, which runs with the trainer. None if the events come from files.

    Args:
        bundle: Bundle whose table is trained.
        connections: Opens log and store.
        options: Options of the trainer.
        roles: Roles that run here, of `ROLES`. The other role may run in another process.
        metrics: Receives the figures of the stream.
        joins: True runs a joiner here. Default: with the trainer, if the events come from impressions.
        failpoint: See `Trainer`.
    """

    trainer: Trainer
    writer: StoreWriter
    joiner: Joiner | None = None

    def __init__(
        self,
        bundle: Bundle,
        connections: StreamConnections,
        options: TrainerOptions = TrainerOptions(),  # noqa: B008 - frozen
        *,
        roles: tuple[str, ...] = ROLES,
        metrics: StreamMetrics | None = None,
        joins: bool | None = None,
        failpoint: Callable[[str], None] = lambda place: None,
    ) -> None:
        self.metrics = metrics or StreamMetrics()
        shown = bundle.dataset.events.origin == "impressions"
        self._joins = "trainer" in roles and shown if joins is None else joins
        self._bundle = bundle
        self._connections = connections
        self._options = options
        self._roles = roles
        self._failpoint = failpoint
        self._fatal: list[BaseException] = []
        self._stack = contextlib.ExitStack()

    # Threads: one per role.

    def run(self, stop: threading.Event, *, on_tick: Callable[[], None] = lambda: None) -> None:
        """Runs each role in a thread until `stop` is set. A role starts again after an outage of log or store.

        Args:
            stop: Ends each role after its current batch.
            on_tick: Called four times a second, and once after the roles have ended.

        Raises:
            FencedError: Another trainer has taken over.
            TesseraError: To continue would do harm; the message says what to fix.
        """
        works = {"trainer": self._train, "writer": self._write, "joiner": self._join}
        roles = [*self._roles, *(["joiner"] if self._joins else [])]
        threads = [
            threading.Thread(target=self._supervised, args=(role, works[role], stop), name=role) for role in roles
        ]
        for thread in threads:
            thread.start()
        while not stop.wait(_TICK_S):
            on_tick()
        for thread in threads:
            thread.join()
        on_tick()
        if self._fatal:
            raise self._fatal[0]

    def _supervised(self, role: str, work: Callable[[threading.Event], None], stop: threading.Event) -> None:
        pause = _FIRST_PAUSE_S
        while not stop.is_set():
            began = time.monotonic()
            try:
                work(stop)
            except FencedError as error:
                self._end(error, stop)
            except (LogError, StoreError) as error:
                if role == "trainer" and self._options.peers.processes > 1:
                    # All processes begin again together, and their parent starts them.
                    self._end(error, stop)
                    return
                # An outage. Messages that were not committed are read from the log again.
                self.metrics.outage(role, error)
                _LOGGER.warning("the %s waits: %s", role, error)
                pause = _FIRST_PAUSE_S if time.monotonic() - began > _LONGEST_PAUSE_S else pause
                stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except BaseException as error:
                self._end(error, stop)

    def _end(self, error: BaseException, stop: threading.Event) -> None:
        self._fatal.append(error)
        stop.set()

    def _train(self, stop: threading.Event) -> None:
        self.metrics.prepare()
        with self._opened_trainer() as trainer, frozen_heap():
            due = confirm = 0.0
            while not stop.is_set():
                if trainer.run_ahead():
                    confirm = time.monotonic() + _CONFIRM_S
                elif time.monotonic() >= confirm:
                    trainer.confirm()
                    confirm = time.monotonic() + _CONFIRM_S
                if time.monotonic() >= due:
                    trainer.settle()
                    self.metrics.behind(trainer.lag())
                    self.metrics.reached(trainer.step.seq, trainer.positions())
                    due = time.monotonic() + _LAG_EVERY_S
            trainer.settle()
            with contextlib.suppress(TesseraError):
                trainer.write_snapshot()
            self.metrics.reached(trainer.step.seq, trainer.positions())

    def _join(self, stop: threading.Event) -> None:
        with self._opened_joiner() as joiner:
            while not stop.is_set():
                joiner.run_once(wait_s=_WRITER_WAIT_S)
                self.metrics.joined(joiner.counts)

    def _write(self, stop: threading.Event) -> None:
        # The trainer of this process freezes what the writer has loaded too.
        frozen = nullcontext() if "trainer" in self._roles else frozen_heap()
        with self._opened_writer() as writer, frozen:
            while not stop.is_set():
                writer.run_once(wait_s=_WRITER_WAIT_S)

    # The calling thread: one role after the other.

    def once(self) -> Totals:
        """Drains the topics, writes a snapshot, and returns the trainer's totals. An outage raises.

        Raises:
            LogError: The log is unavailable.
            StoreError: The store is unavailable.
            StreamError: Too many messages are faulty, or the snapshot cannot be written.
        """
        with self:
            self.drain()
            if "trainer" not in self._roles:
                return Totals()
            self.trainer.write_snapshot()
            return self.trainer.totals

    def open(self) -> Self:
        """Opens the roles for the calling thread and returns the service."""
        with contextlib.ExitStack() as stack:
            if self._joins:
                self.joiner = stack.enter_context(self._opened_joiner())
            if "trainer" in self._roles:
                self.trainer = stack.enter_context(self._opened_trainer())
            if "writer" in self._roles:
                self.writer = stack.enter_context(self._opened_writer())
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Closes the roles. Committed changes stay."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_once(self, *, wait_s: float | None = None) -> int:
        """Takes a micro-batch through trainer and writer; returns the number of its messages.

        Args:
            wait_s: Seconds that the micro-batch waits to fill. None: the trainer's option.
        """
        if self.joiner is not None:
            self.joiner.run_once(wait_s=0.0)
            self.metrics.joined(self.joiner.counts)
        messages = self.trainer.run_once(wait_s=wait_s) if "trainer" in self._roles else 0
        while "writer" in self._roles and self.writer.run_once():
            pass
        return messages

    def drain(self) -> None:
        """Runs until the input topics are read to their ends and the store has all deltas."""
        if self.joiner is not None:
            self.joiner.drain()
            self.metrics.joined(self.joiner.counts)
        while "trainer" in self._roles and not self.trainer.drained():
            self.run_once(wait_s=_DRAIN_WAIT_S)
        while "writer" in self._roles and self.writer.run_once(wait_s=_DRAIN_WAIT_S):
            pass

    @contextlib.contextmanager
    def _opened_joiner(self) -> Iterator[Joiner]:
        until = self._bundle.manifest.trained_until
        with self._connections.log() as log:
            events, topics = self._bundle.dataset.events, self._connections.topics
            joiner = Joiner(log, events, topics, trained_until=until, failpoint=self._failpoint)
            with closing(joiner):
                yield joiner

    @contextlib.contextmanager
    def _opened_trainer(self) -> Iterator[Trainer]:
        with self._connections.log() as log:
            trainer = Trainer(
                log,
                self._bundle,
                topics=self._connections.topics,
                options=self._options,
                snapshots=self._connections.snapshots,
                schemas=self._connections.schemas,
                watch=self.metrics.batch,
                failpoint=self._failpoint,
            )
            with closing(trainer):
                yield trainer
                trainer.end()

    @contextlib.contextmanager
    def _opened_writer(self) -> Iterator[StoreWriter]:
        to = self._connections
        with to.store() as store, to.log() as log:
            writer = open_writer(
                self._bundle,
                log,
                store,
                to.topics,
                snapshots=to.snapshots,
                storage=to.storage,
                watch=self.metrics.visible,
            )
            with closing(writer):
                yield writer


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
    """Returns a writer to a store. An empty store is filled from snapshot and log, now and whenever it was emptied."""
    log.create_topics(topics.partitions())

    def refill() -> None:
        fill_store(store, bundle, storage=storage)
        if position_of(store, bundle.id, topics.deltas) is None:
            replay(log, bundle, store, topics, snapshots.newest(bundle) if snapshots is not None else None)

    refill()
    return StoreWriter(log, bundle.id, store, topics=topics, refill=refill, watch=watch)


def champion(settings: Settings, model: str | None) -> Bundle:
    """Returns the bundle that serves."""
    registry = settings.open_registry(create=False)
    return registry.open(registry.resolve(model, CHAMPION), settings.bundles)


def until_stopped() -> threading.Event:
    """Returns an event that SIGINT and SIGTERM set, so that a loop ends after its current batch."""
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


def bundle_at(settings: Settings, model: str | None, place: str | None) -> Bundle:
    """Returns the bundle of a directory or an address, or the champion if neither is given.

    Raises:
        BundleError: There is no intact bundle.
        StorageError: The object store does not answer.
    """
    from models.bundle.bundle import load_bundle
    from models.registry.fetch import fetch_bundle

    if not place:
        return champion(settings, model)
    location = locate(place)
    return load_bundle(location) if isinstance(location, Path) else fetch_bundle(location, settings.bundles)
