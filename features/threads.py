"""Fixes the number of threads for numerics whose bits must not depend on the machine.

A product split over threads adds up in another order, so its last bits depend on the number of cores. Most models
trained here are small enough that one thread is also the fastest: on a busy machine, threads that wait for each other
between small operations have taken forty times as long.

Torch is limited where it is loaded, and is not loaded here: a worker that needs no torch stays half as large. A body
that uses torch imports it before the limit is set.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from threadpoolctl import threadpool_limits

# The numbers belong to the process: of several threads in here, the first sets them and the last restores them.
_lock = Lock()
_inside = 0
_before: int | None = None


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Runs the body with this many threads in torch, BLAS and OpenMP, then restores the previous numbers.

    Inside another such body nothing changes.
    """
    global _inside, _before
    with _lock:
        outermost = not _inside
        if outermost:
            torch = sys.modules.get("torch")
            _before = torch.get_num_threads() if torch else None
            if torch:
                torch.set_num_threads(count)
        _inside += 1
    try:
        if outermost:
            with threadpool_limits(count):
                yield
        else:
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _before is not None:
                sys.modules["torch"].set_num_threads(_before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the body with one thread."""
    with fixed_threads(1):
        yield
