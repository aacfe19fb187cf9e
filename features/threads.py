"""Fixes the number of threads for numerics whose bits must not depend on the machine.

A product split over threads adds up in another order, so its last bits depend on the number of cores. Most models
trained here are small enough that one thread is also the fastest: on a busy machine, threads that wait for each other
between small operations have taken forty times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from threadpoolctl import threadpool_limits

# The numbers belong to the process: of several threads in here, the first sets them and the last restores them.
_lock = Lock()
_inside = 0
_before = 1


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Runs the body with this many threads in torch, BLAS and OpenMP, then restores the previous numbers.

    Inside another such body nothing changes.
    """
    import torch

    global _inside, _before
    with _lock:
        outermost = not _inside
        if outermost:
            _before = torch.get_num_threads()
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
            if not _inside:
                torch.set_num_threads(_before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the body with one thread."""
    with fixed_threads(1):
        yield
