"""Lease of the one process that follows the releases on a log: an entry of the ledger every few seconds."""

import contextlib
import logging
import os
import socket
import time
from contextlib import AbstractContextManager
from typing import Protocol

from features.errors import FencedError, LogError, TesseraError
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.shared.ledger import EVERY_S, FollowedBundle, FollowEntry, FollowLedger

_LOGGER = logging.getLogger(__name__)
_PAUSE_S = 2.0


class _OpenLog(Protocol):
    def __call__(self) -> AbstractContextManager[EventLog]: ...


class FollowLease:
    """Writes the entries of the ledger, and waits out an outage of the log.

    Args:
        open_log: Opens a connection to the log.
        topics: Names of the topics.
        model: Name of the followed model.
    """

    def __init__(self, open_log: _OpenLog, topics: Topics, model: str) -> None:
        self._open_log = open_log
        self._topics = topics
        self._model = model
        self._ledger: FollowLedger | None = None
        self._opened = contextlib.ExitStack()
        self._due = 0.0

    @property
    def held(self) -> bool:
        """True if the last entry was written. Without the lease a newer follower would not be noticed."""
        return self._ledger is not None

    @property
    def due(self) -> bool:
        """True if it is time for an entry."""
        return time.monotonic() >= self._due

    def note(self, bundles: tuple[FollowedBundle, ...], *, registry: str = "", ended: bool = False) -> None:
        """Writes an entry. If the log does not answer, the next call opens it again.

        Args:
            bundles: Followed bundles, and those that were retired last.
            registry: Error of the registry, or "".
            ended: True at the end of the process.

        Raises:
            FencedError: Another follower has taken over.
        """
        self._due = time.monotonic() + EVERY_S
        process = f"{socket.gethostname()}:{os.getpid()}"
        try:
            if self._ledger is None:
                self._open()
            assert self._ledger is not None
            self._ledger.write(FollowEntry(time.time(), process, self._model, bundles, ended, registry))
        except FencedError as error:
            raise FencedError(
                f"another `tessera stream --follow` follows {self._model} on this log now, so this one ends; leave one "
                f"running ({error})"
            ) from error
        except LogError as error:
            _LOGGER.warning("the ledger of what is followed waits: %s", error)
            self.close()
            self._due = time.monotonic() + _PAUSE_S

    def close(self) -> None:
        """Closes the connection. The entries stay."""
        self._ledger = None
        with contextlib.suppress(TesseraError):
            self._opened.close()

    def _open(self) -> None:
        log = self._opened.enter_context(self._open_log())
        ledger = FollowLedger(log, self._topics)
        self._opened.callback(ledger.close)
        self._ledger = ledger
