"""Something that takes a while and is wanted by pages: made once for a bundle, behind them, while they say so."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from models.bundle.bundle import Bundle

_LOGGER = logging.getLogger(__name__)
Made = TypeVar("Made")


class Later(Generic[Made]):
    """What a bundle's pages read, or None until it is there.

    Args:
        make: takes the bundle; runs in a thread of its own, one at a time.
    """

    def __init__(self, make: Callable[[Bundle], Made]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._bundle = ""
        self._made: Made | None = None
        self.failed = ""

    def get(self, bundle: Bundle) -> Made | None:
        """What was made of a bundle; begins to make it where nobody has."""
        with self._lock:
            if bundle.id != self._bundle:
                self._bundle, self._made, self.failed = bundle.id, None, ""
                threading.Thread(target=self._run, args=(bundle,), name="console-later", daemon=True).start()
            return self._made

    def _run(self, bundle: Bundle) -> None:
        try:
            made = self._make(bundle)
        except Exception as error:
            # Nobody waits for this thread: the page says what went wrong.
            _LOGGER.exception("console: %s could not be looked through", bundle.id)
            with self._lock:
                if bundle.id == self._bundle:
                    self.failed = f"{type(error).__name__}: {error}"
            return
        with self._lock:
            if bundle.id == self._bundle:
                self._made = made
