"""A running stream: trainer and writer each in a thread, started anew after an outage, stopped after the batch in hand.

What lies between the two is the log, so neither fills the other's memory. Each thread opens connections of its own.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from features.errors import FencedError, LogError, StoreError, TesseraError
from models.bundle.bundle import Bundle
from streaming.metrics import StreamMetrics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import open_writer

_LOGGER = logging.getLogger(__name__)
ROLES = ("trainer", "writer")
_LAG_EVERY_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_WRITER_WAIT_S = 0.1


class Live:
    """Runs until told to stop.

    Args:
        settings: where log and store are.
        bundle: whose table is trained.
        options: of the trainer.
        gauges: what is noted.
        roles: which of `ROLES` run here; the others may run elsewhere.
        failpoint: see `Trainer`.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        options: TrainerOptions,
        gauges: StreamMetrics,
        roles: tuple[str, ...] = ROLES,
        *,
        failpoint: Callable[[str], None] = lambda place: None,
    ) -> None:
        self._failpoint = failpoint
        self._settings = settings
        self._bundle = bundle
        self._options = options
        self._gauges = gauges
        self._roles = roles
        self._snapshots = Snapshots(settings.snapshots)
        self._fatal: list[BaseException] = []

    def run(self, stop: threading.Event, *, on_tick: Callable[[], None] = lambda: None) -> None:
        """Runs the roles until `stop` is set; calls `on_tick` four times a second, and once when they have ended.

        Raises:
            FencedError: another trainer has taken over.
            TesseraError: going on would do harm; the message says what to mend.
        """
        works = {"trainer": self._train, "writer": self._write}
        threads = [
            threading.Thread(target=self._supervised, args=(role, works[role], stop), name=role) for role in self._roles
        ]
        for thread in threads:
            thread.start()
        while not stop.wait(0.25):
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
                # An outage: what was not committed is done again from the log when it is over.
                self._gauges.outage(role, error)
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
        with ExitStack() as stack:
            log = stack.enter_context(contextlib.closing(self._settings.open_log()))
            trainer = stack.enter_context(
                contextlib.closing(
                    Trainer(
                        log,
                        self._bundle,
                        topics=self._settings.topics,
                        options=self._options,
                        snapshots=self._snapshots,
                        watch=self._gauges.batch,
                        failpoint=self._failpoint,
                    )
                )
            )
            due = 0.0
            while not stop.is_set():
                trainer.run_once()
                if time.monotonic() >= due:
                    self._gauges.behind(trainer.lag())
                    due = time.monotonic() + _LAG_EVERY_S
            with contextlib.suppress(TesseraError):
                trainer.write_snapshot()

    def _write(self, stop: threading.Event) -> None:
        settings = self._settings
        with ExitStack() as stack:
            store = stack.enter_context(contextlib.closing(settings.open_store()))
            log = stack.enter_context(contextlib.closing(settings.open_log()))
            writer = open_writer(
                self._bundle,
                log,
                store,
                settings.topics,
                snapshots=self._snapshots,
                storage=settings.storage,
                watch=self._gauges.visible,
            )
            stack.enter_context(contextlib.closing(writer))
            while not stop.is_set():
                writer.run_once(wait_s=_WRITER_WAIT_S)
