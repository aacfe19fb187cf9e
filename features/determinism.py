"""One thread for numerics whose bits must not depend on the machine.

A product split over threads adds up in another order, so its last bits move with the number of cores. The models
trained here are small enough that one thread is also the fastest: on a busy machine, threads that wait for each other
between small operations have been seen to take forty times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the body with one thread in torch, BLAS and OpenMP, and restores the numbers there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
