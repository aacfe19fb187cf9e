"""One thread for numerics whose bits must not depend on the machine.

A product split over threads adds up in another order, so its last bits move with the number of cores. The models
trained here are small enough that one thread is also the fastest: on a busy machine, threads that wait for each other
between small operations have been seen to take forty times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from threadpoolctl import threadpool_limits

# The numbers are the process's: of several threads in here, the last to leave restores them.
_lock = Lock()
_inside = 0
_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the body with one thread in torch, BLAS and OpenMP, and restores the numbers there were."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        with threadpool_limits(1):
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
