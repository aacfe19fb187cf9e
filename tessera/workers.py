"""Several processes that serve one port.

The parent holds the port, starts the workers by `fork`, starts a worker again that ended by itself, and hands SIGTERM
on. Each worker is a whole server with a listening socket of its own on the port (SO_REUSEPORT), so the kernel deals out
the connections. Workers follow the registry each for itself, as the servers of several machines do. The callers' rates
and the rows of the mirrors lie in memory that they share. prometheus_client's multiprocess mode adds up their metrics.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from features.errors import TesseraError
from tessera.server import ServeOptions, Shared, run_server
from tessera.settings import Settings

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_SHM = Path("/dev/shm")
_POLL_S = 0.1
_PAUSE_S = 1.0
_log = logging.getLogger("tessera.workers")


@dataclass
class _Worker:
    """A process of the server.

    Attributes:
        number: From 1.
        pid: Of the process.
        pipe: Becomes readable when the worker answers, or has ended.
        ready: True if the worker answered at some time.
    """

    number: int
    pid: int
    pipe: int
    ready: bool = False


def run_workers(settings: Settings, options: ServeOptions) -> None:
    """Serves one port from several processes until SIGTERM or SIGINT.

    Args:
        settings: Addresses of store, log and registry.
        options: Choices of the server, with at least two workers.

    Raises:
        TesseraError: The port is taken, or a worker ended before it answered for the first time.
    """
    if not hasattr(socket, "SO_REUSEPORT") or not hasattr(os, "fork"):
        raise TesseraError("--workers: this system cannot share a port; start servers behind a proxy")
    with (
        _metrics_directory() as directory,
        tempfile.TemporaryDirectory(
            prefix="tessera-mirror-", dir=memory_directory(), ignore_cleanup_errors=True
        ) as mirrors,
        _reserved(options.host, options.port) as (family, address),
    ):
        # Loaded before the fork, so that the workers share the libraries' pages.
        from prometheus_client import multiprocess, values

        import serving.api.app
        from serving.api.guard import Limits
        from serving.api.rate import SharedBuckets
        from tessera.stream_service import until_stopped

        assert serving.api.app
        # prometheus_client has chosen when it was imported, perhaps before the directory had a name.
        values.ValueClass = values.get_value_class()
        rates = SharedBuckets(options.per_second, Limits().burst_s)
        stop = until_stopped()
        start = partial(_start, settings, options, family, address, (directory, Path(mirrors), rates))
        # The first worker fills the store; the others find it filled.
        workers = [start(1)]
        try:
            _until_ready(workers, stop)
            workers += [start(number) for number in range(2, options.workers + 1)]
            _until_ready(workers, stop)
            _watch(workers, start, stop, multiprocess.mark_process_dead)
        finally:
            _end(workers)
            rates.close()


def _start(
    settings: Settings,
    options: ServeOptions,
    family: int,
    address: tuple[str, int],
    common: tuple[Path, Path, Any],
    number: int,
) -> _Worker:
    """Starts a worker; returns in the parent alone."""
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Worker(number, pid, reading)
    status = 1
    try:
        from tessera.stream_service import until_stopped

        os.close(reading)
        stop = until_stopped()
        listening = _bound(family, address)
        shared = Shared(number, listening, *common, partial(_tell, writing), lambda: os.getppid() != parent)
        run_server(settings, options, stop, shared)
        status = 0
    except TesseraError as error:
        _log.error("worker %d: %s", number, error)
    except BaseException:
        _log.exception("worker %d ended", number)
    finally:
        # The parent's clean-up is not the worker's.
        logging.shutdown()
        os._exit(status)


def _tell(pipe: int) -> None:
    os.write(pipe, b"1")


def _until_ready(workers: list[_Worker], stop: threading.Event) -> None:
    """Waits until all workers answer.

    Raises:
        TesseraError: A worker has ended.
    """
    for worker in workers:
        while not worker.ready and not stop.is_set():
            if select.select([worker.pipe], [], [], _POLL_S)[0]:
                if not os.read(worker.pipe, 1):
                    raise TesseraError(f"worker {worker.number} did not start; its message stands above")
                worker.ready = True


def _watch(
    workers: list[_Worker], start: Callable[[int], _Worker], stop: threading.Event, forget: Callable[[int], object]
) -> None:
    """Starts workers again that ended by themselves, until `stop` is set."""
    while not stop.wait(_POLL_S):
        for place, worker in enumerate(workers):
            if os.waitpid(worker.pid, os.WNOHANG) == (0, 0):
                continue
            forget(worker.pid)
            os.close(worker.pipe)
            _log.warning("worker %d (process %d) ended; it starts again", worker.number, worker.pid)
            # A worker that cannot start must not take the machine's time.
            time.sleep(_PAUSE_S)
            workers[place] = start(worker.number)


def _end(workers: list[_Worker]) -> None:
    """Hands SIGTERM to all workers and waits for their ends."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGTERM)
    for worker in workers:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(worker.pid, 0)
        os.close(worker.pipe)


def memory_directory() -> Path:
    """Returns the directory of the system whose files lie in memory, or the one of temporary files without it."""
    return _SHM if os.access(_SHM, os.W_OK) else Path(tempfile.gettempdir())


@contextlib.contextmanager
def _metrics_directory() -> Iterator[Path]:
    """Names a directory where the workers keep their metrics, and removes it at the end."""
    directory = tempfile.mkdtemp(prefix="tessera-metrics-")
    os.environ[_METRICS] = directory
    try:
        yield Path(directory)
    finally:
        del os.environ[_METRICS]
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[tuple[int, tuple[str, int]]]:
    """Holds a port without listening; yields the family of addresses and the address.

    Raises:
        TesseraError: The host has no address, or another process has the port.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Without SO_REUSEPORT, so that another server of the same kind is noticed.
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        held = _bound(family, (str(address[0]), int(address[1])))
    except OSError as error:
        raise TesseraError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    with held:
        yield family, held.getsockname()[:2]


def _bound(family: int, address: tuple[str, int]) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(address)
    return found
