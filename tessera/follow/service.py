"""Follows the releases of a model: trains each bundle that an alias or an experiment names, in one process.

Each bundle has its own table, deltas, transactional id and snapshots, as with a stream of its own. The inputs are read
once. A bundle's stream depends on its id alone, so a promotion or a rollback changes roles and interrupts nothing. The
log and the snapshots have all state, so a follower that was killed continues where each bundle was.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from features.errors import FencedError, TesseraError
from models.bundle.bundle import Bundle
from models.registry.release import CHAMPION
from streaming.shared.ledger import FollowedBundle
from streaming.shared.metrics import FollowMetrics
from streaming.shared.reads import SharedReads
from streaming.trainer import Totals, TrainerOptions
from tessera.follow.lease import FollowLease
from tessera.follow.release import ReleaseWatch, Wanted
from tessera.follow.stream import FollowedStream
from tessera.stream_service import ROLES, StreamConnections, StreamService

_LOGGER = logging.getLogger(__name__)
POLL_S = 0.1
"""Time between two looks at the registry, seconds. See `ReleaseWatch.changed` for the requests."""
_STATE_S, _CHECK_S, _KEEP_S = 0.25, 10.0, 60.0
_RETIRED = 5
# Servers that still answer from a retired bundle have this time, seconds, to swap.
_GRACE_S = 600.0


class FollowService:
    """Trains the bundles of a model's releases until it is told to stop.

    Args:
        watch: Names and opens the bundles.
        connections: Opens log and store.
        options: Options of each trainer.
        roles: Roles of each bundle that run here, as in `StreamService`.
        metrics: Receives the figures of each bundle.
        failpoint: See `Trainer`.
    """

    def __init__(
        self,
        watch: ReleaseWatch,
        connections: StreamConnections,
        options: TrainerOptions = TrainerOptions(),  # noqa: B008 - frozen
        *,
        roles: tuple[str, ...] = ROLES,
        metrics: FollowMetrics | None = None,
        failpoint: Callable[[str], None] = lambda place: None,
    ) -> None:
        self.metrics = metrics or FollowMetrics()
        self.streams: dict[str, FollowedStream] = {}
        self._watch = watch
        self._connections = connections
        self._options = options
        self._roles = roles
        self._failpoint = failpoint
        self._retired: list[FollowedBundle] = []
        self._joiner: FollowedStream | None = None
        self._lease = FollowLease(connections.log, connections.topics, watch.model)
        self._registry_error = ""
        self._state_due = 0.0
        self._checked = self._kept = time.monotonic()

    def run(self, stop: threading.Event, *, on_tick: Callable[[], None] = lambda: None) -> None:
        """Follows until `stop` is set.

        Args:
            stop: Ends each stream after its current batch.
            on_tick: Called at every poll of the registry, and once after the streams have ended.

        Raises:
            FencedError: Another follower, or another stream of a followed bundle, has taken over.
            TesseraError: The champion's stream cannot go on.
        """
        with contextlib.closing(SharedReads(self._connections.log)) as reads:
            self._options = replace(self._options, reads=reads)
            try:
                self._note(due=True)
                while not stop.is_set():
                    self._follow()
                    self._join()
                    self._raise_faults()
                    self._check_bundles()
                    self._keep_rows()
                    self._note()
                    on_tick()
                    stop.wait(POLL_S)
            finally:
                self._end()
                on_tick()
        self._raise_faults()

    def once(self) -> dict[str, Totals]:
        """Drains the topics for each bundle, one after the other. Returns the totals by bundle, the champion first.

        Raises:
            TesseraError: A bundle cannot be opened, log or store are unavailable, or too many messages are faulty.
        """
        found: dict[str, Totals] = {}
        joins: bool | None = None
        for wanted in (self._watch.changed() or {}).values():
            bundle = self._watch.open(wanted.release)
            found[bundle.id] = self._service(bundle, joins=joins).once()
            # The champion's joiner has appended the rows for all.
            joins = False
        return found

    def _service(
        self, bundle: Bundle, *, roles: tuple[str, ...] | None = None, joins: bool | None = False
    ) -> StreamService:
        streams = self.metrics.streams()
        return StreamService(
            bundle,
            self._connections,
            self._options,
            roles=self._roles if roles is None else roles,
            metrics=streams.get(bundle.id) or self.metrics.add(bundle.id),
            joins=joins,
            failpoint=self._failpoint,
        )

    # The registry.

    def _follow(self) -> None:
        """Starts, retires and renames streams as the registry says."""
        if not self._lease.held:
            # Without the ledger a newer follower could not be noticed before its tables are taken.
            return
        try:
            wanted = self._watch.changed()
        except Exception as error:
            # The registry's client raises the errors of its database or its server.
            if not self._registry_error:
                _LOGGER.warning("the registry cannot be followed; the streams go on: %s", error)
            self._registry_error = f"{type(error).__name__}: {error}"
            return
        self._registry_error = ""
        if wanted is None:
            return
        for bundle, one in wanted.items():
            if bundle in self.streams:
                self._rename(self.streams[bundle], one)
            else:
                self.streams[bundle] = self._stream(one)
                # Opens the bundle meanwhile.
                self.streams[bundle].start()
        # The entry fails if a newer follower has come, before a stream of this one takes a table from it.
        self._note(due=True)
        for bundle in wanted:
            self.streams[bundle].train()
        self._retire([stream for bundle, stream in self.streams.items() if bundle not in wanted])

    def _stream(self, wanted: Wanted) -> FollowedStream:
        metrics = self.metrics.add(wanted.release.bundle)
        return FollowedStream(wanted, lambda: self._watch.open(wanted.release), self._service, metrics)

    @staticmethod
    def _rename(stream: FollowedStream, wanted: Wanted) -> None:
        before, stream.wanted = stream.wanted.roles, wanted
        if before != wanted.roles:
            now = ", ".join(wanted.roles)
            _LOGGER.info("bundle %s: %s now, %s before; its stream goes on", stream.id, now, ", ".join(before))

    def _retire(self, streams: list[FollowedStream]) -> None:
        """Ends streams of bundles that nothing names, after their current batch, and names where each has ended."""
        for stream in streams:
            stream.stop()
        for stream in streams:
            stream.join()
            del self.streams[stream.id]
            self.metrics.remove(stream.id)
            state = stream.retired()
            self._retired = [*self._retired, state][-_RETIRED:]
            places = ", ".join(f"{topic}-{part} {at:,}" for topic, part, at in state.positions) or "no message"
            _LOGGER.info(
                "bundle %s: retired, since no alias and no experiment names it; ends at batch %d, before %s",
                stream.id,
                state.seq,
                places,
            )
            self._release_rows(stream.id)
        if streams:
            self._note(due=True)

    def _keep_rows(self) -> None:
        """Keeps followed bundles in the store. A server lets the champion before leave the store after a while.

        A rollback then finds rows that are as fresh as those of the champion.
        """
        if "writer" in self._roles and time.monotonic() - self._kept >= _KEEP_S:
            self._kept = time.monotonic()
            with contextlib.suppress(TesseraError), self._connections.store() as store:
                for stream in self.streams.values():
                    if stream.bundle is not None and not stream.error:
                        store.keep(stream.id)

    def _release_rows(self, bundle: str) -> None:
        """Lets the rows of a retired bundle leave the store."""
        if "writer" in self._roles:
            with contextlib.suppress(TesseraError), self._connections.store() as store:
                store.expire(bundle, after_s=_GRACE_S)

    def _join(self) -> None:
        """Runs the joiner of the champion, if its events come from impressions. One joiner feeds all bundles.

        The topic `joins` has all progress, so the joiner of a new champion continues where the one before has ended.
        """
        champion = next((stream for stream in self.streams.values() if stream.wanted.is_champion), None)
        if "trainer" not in self._roles or champion is None or champion.bundle is None:
            return
        if self._joiner is not None and self._joiner.id == champion.id:
            return
        bundle = champion.bundle
        self._end_joiner()
        if bundle.dataset.events.origin == "impressions":
            metrics = self.metrics.streams()[bundle.id]
            self._joiner = FollowedStream(
                champion.wanted, lambda: bundle, lambda one: self._service(one, roles=(), joins=True), metrics
            )
            self._joiner.start()
            self._joiner.train()

    def _end_joiner(self) -> None:
        if self._joiner is not None:
            self._joiner.stop()
            self._joiner.join()
            self._joiner = None

    def _end(self) -> None:
        """Ends all streams after their current batches, and says so in the ledger."""
        for stream in self.streams.values():
            stream.stop()
        self._end_joiner()
        for stream in self.streams.values():
            stream.join()
        with contextlib.suppress(FencedError):
            self._note(due=True, ended=True)
        self._lease.close()

    # Faults.

    def _raise_faults(self) -> None:
        for stream in self.streams.values():
            if isinstance(stream.error, FencedError):
                raise FencedError(
                    f"bundle {stream.id}: another stream trains it now, such as `tessera stream` beside `--follow`, so "
                    f"this one ends; leave one running ({stream.error})"
                )
            if stream.error is not None and CHAMPION in stream.wanted.roles:
                raise stream.error
        if self._joiner is not None and self._joiner.error is not None:
            raise self._joiner.error

    def _check_bundles(self) -> None:
        """Names followed bundles whose files have vanished, and fetches them again."""
        if time.monotonic() - self._checked < _CHECK_S:
            return
        self._checked = time.monotonic()
        for stream in self.streams.values():
            if stream.bundle is None or (stream.bundle.directory / "manifest.json").is_file():
                stream.warning = ""
                continue
            try:
                self._watch.open(stream.wanted.release)
                _LOGGER.warning("bundle %s: its files vanished and were fetched again", stream.id)
            except Exception as error:
                # The registry's client raises the errors of its database or its server.
                if not stream.warning:
                    _LOGGER.warning(
                        "bundle %s: its files vanished from %s, and the registry does not give them back: %s; its "
                        "stream goes on until this process ends: publish the bundle again, or name another version",
                        stream.id,
                        stream.bundle.directory,
                        error,
                    )
                stream.warning = f"its files vanished, and cannot be fetched: {error}"

    # The ledger.

    def _note(self, *, due: bool = False, ended: bool = False) -> None:
        """Updates the states of the streams, and writes an entry of the ledger, now or when it is due.

        Raises:
            FencedError: Another follower has taken over.
        """
        if not due and time.monotonic() < self._state_due:
            return
        self._state_due = time.monotonic() + _STATE_S
        states = tuple(stream.state() for stream in self.streams.values())
        self.metrics.states = {state.bundle: state for state in states}
        if due or self._lease.due:
            self._lease.note((*states, *self._retired), registry=self._registry_error, ended=ended)
