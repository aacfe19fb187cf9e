"""The stream of one followed bundle, in a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from features.errors import BundleError, FencedError, TesseraError
from models.bundle.bundle import Bundle
from streaming.metrics import StreamMetrics
from streaming.shared.ledger import FollowedBundle
from tessera.follow.release import Wanted
from tessera.stream_service import StreamService

_LOGGER = logging.getLogger(__name__)
_AGAIN_S = 30.0


class FollowedStream:
    """Opens a bundle and runs its stream until it is stopped.

    A bundle that cannot be opened, or whose files vanish while the stream reads them, is tried again every 30 seconds.
    A stream that fails otherwise is not started again, since its fault would harm: it stays `paused`, and its error is
    in `error`. Nothing is lost, since a later start continues at the last committed batch.

    Attributes:
        wanted: Version and roles of the bundle. The owner replaces it when the roles change.
        bundle: The opened bundle. None: it is not open yet.
        error: Error that ended the stream.

    Args:
        wanted: Version and roles of the bundle.
        open_bundle: Opens the bundle.
        service: Makes the stream of the bundle.
        metrics: Receives the figures of the stream.
    """

    def __init__(
        self,
        wanted: Wanted,
        open_bundle: Callable[[], Bundle],
        service: Callable[[Bundle], StreamService],
        metrics: StreamMetrics,
    ) -> None:
        self.wanted = wanted
        self.bundle: Bundle | None = None
        self.error: BaseException | None = None
        self.warning = ""
        self._open_bundle = open_bundle
        self._service = service
        self._metrics = metrics
        self._asked = False
        self._may_train = threading.Event()
        self._stop = threading.Event()
        self._state, self._since = "opening", time.time()
        self._why = ""
        self._thread = threading.Thread(target=self._run, name=f"follow-{wanted.release.bundle}")

    def start(self) -> None:
        """Starts the thread, which opens the bundle and then waits for `train`."""
        self._thread.start()

    def train(self) -> None:
        """Lets the stream take the bundle's table."""
        self._may_train.set()

    def stop(self) -> None:
        """Ends the stream after its current batch, and returns without waiting for the end."""
        self._asked = True
        self._stop.set()
        self._may_train.set()

    def join(self) -> None:
        """Waits until the stream has ended, with its snapshot written."""
        if self.started:
            self._thread.join()

    @property
    def id(self) -> str:
        """Id of the bundle."""
        return self.wanted.release.bundle

    @property
    def started(self) -> bool:
        """True after `start`."""
        return self._thread.ident is not None

    def retired(self) -> FollowedBundle:
        """Returns the state of a stream that has ended since nothing names its bundle."""
        return msgspec.structs.replace(self.state(), state="retired", roles=(), since=time.time())

    def state(self) -> FollowedBundle:
        """Returns the state for the ledger."""
        metrics = self._metrics
        p50, p99 = metrics.freshness_ms()
        loss = metrics.progressive()[0] if self._state == "training" else float("nan")
        return FollowedBundle(
            bundle=self.wanted.release.bundle,
            roles=self.wanted.roles,
            state=self._state,
            why=self._why or self.warning,
            since=self._since,
            seq=metrics.seq,
            positions=tuple((topic, part, at) for (topic, part), at in sorted(metrics.positions.items())),
            lag=sum(metrics.lag.values()),
            counts=dict(metrics.counts),
            freshness_ms=None if np.isnan(p50) else (p50, p99),
            log_loss=None if np.isnan(loss) else loss,
        )

    def _run(self) -> None:
        name = self.wanted.release.bundle
        while not self._stop.is_set():
            try:
                self.bundle = self._open_bundle()
            except Exception as error:
                # The registry's client raises the errors of its database or its server.
                if self._why != str(error):
                    _LOGGER.warning("bundle %s cannot be opened; it is tried again: %s", name, error)
                self._set("paused", str(error))
                self._stop.wait(_AGAIN_S)
            else:
                self._may_train.wait()
                if self._stop.is_set() or not self._stream(self.bundle):
                    return
                self._stop.wait(_AGAIN_S)

    def _stream(self, bundle: Bundle) -> bool:
        """Runs the stream to its end. Returns True if the bundle's files are to be opened again."""
        self._set("training", "")
        _LOGGER.info("bundle %s: its stream starts, as %s", bundle.id, ", ".join(self.wanted.roles))
        try:
            self._service(bundle).run(self._stop)
        except (BundleError, FileNotFoundError) as error:
            self._set("paused", str(error))
            _LOGGER.warning("bundle %s: its files cannot be read; they are opened again: %s", bundle.id, error)
            # The part that failed has set the event, to end the other parts.
            self._stop.clear()
            if self._asked:
                self._stop.set()
            return True
        except BaseException as error:
            self.error = error
            self._set("paused", f"{error if isinstance(error, TesseraError) else repr(error)}")
            if not isinstance(error, FencedError):
                expected = isinstance(error, TesseraError)
                _LOGGER.error("bundle %s: its stream ended: %s", bundle.id, error, exc_info=None if expected else error)
        return False

    def _set(self, state: str, why: str) -> None:
        self._since = self._since if (state, why) == (self._state, self._why) else time.time()
        self._state, self._why = state, why
