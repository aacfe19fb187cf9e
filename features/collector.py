"""Keeps long-lived objects away from Python's garbage collector while a service runs.

A full collection visits every object of the process, and no thread runs meanwhile. A loaded bundle has hundreds of
thousands of objects, so each full collection stops the stream and the requests for a fifth of a second.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Collects garbage, and then hides all objects that exist now from later collections while the body runs.

    Several bodies may run at the same time, such as one for each bundle. When one of them ends, the others go on, and
    what the ended body has left is collected. After the last body, collections visit all objects again.
    """
    global _users
    with _lock:
        _users += 1
        _freeze()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            gc.unfreeze()
            if _users:
                _freeze()


def _freeze() -> None:
    # What is garbage already would otherwise stay for ever. Objects that are hidden already cost nothing here.
    gc.collect()
    gc.freeze()
