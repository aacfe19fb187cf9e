"""Computes a slow value once per bundle in a background thread. Pages show "not ready" until it is done."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from models.bundle.bundle import Bundle

_LOGGER = logging.getLogger(__name__)
Made = TypeVar("Made")


class Later(Generic[Made]):
    """Slow value of a bundle, or None until it is computed.

    Args:
        make: Function of the bundle; runs in a thread of its own, one at a time.
    """

    def __init__(self, make: Callable[[Bundle], Made]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._bundle = ""
        self._made: Made | None = None
        self.failed = ""

    def get(self, bundle: Bundle) -> Made | None:
        """Returns the value of a bundle; starts its computation at the first call."""
        with self._lock:
            if bundle.id != self._bundle:
                self._bundle, self._made, self.failed = bundle.id, None, ""
                threading.Thread(target=self._run, args=(bundle,), name="console-later", daemon=True).start()
            return self._made

    def _run(self, bundle: Bundle) -> None:
        try:
            made = self._make(bundle)
        except Exception as error:
            # No caller waits for this thread: the page shows the error.
            _LOGGER.exception("console: %s could not be analysed", bundle.id)
            with self._lock:
                if bundle.id == self._bundle:
                    self.failed = f"{type(error).__name__}: {error}"
            return
        with self._lock:
            if bundle.id == self._bundle:
                self._made = made
