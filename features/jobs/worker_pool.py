"""Pool of Python workers for Flink and Spark: starts a process for each worker that an engine asks for.

    python -m features.jobs.worker_pool --service_port=50000

The pool runs what its callers send, so it listens on this machine alone unless `--host` names another address.

Beam's own pool keeps one process for each id of a worker. Two TaskManagers of one machine give their workers the same
ids, so that the TaskManager that is done first stops the worker of the other, which then waits for ever. This pool
keeps all processes of an id and stops a process only where the id has one. A worker whose TaskManager is gone ends by
itself, since its connection ends.
"""

import argparse
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from signal import SIGTERM, signal
from types import FrameType
from typing import Any

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.utils import thread_pool_executor

HOST = "127.0.0.1"
"""Interface on which a pool listens by default: this machine alone."""
_ENDS_S = 10.0
# Pings of an engine that waits are no fault.
_OPTIONS = (("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0))
Command = Callable[[Any], Sequence[str]]


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Servicer that starts and stops workers.

    Args:
        command: Returns the command of a worker from the engine's request.
    """

    def __init__(self, command: Command | None = None) -> None:
        self._command = command or harness
        self._processes: defaultdict[str, list[subprocess.Popen[bytes]]] = defaultdict(list)
        self._lock = threading.Lock()

    def StartWorker(self, request: Any, context: Any) -> Any:
        """Starts a worker; an error is in the answer."""
        try:
            process = subprocess.Popen(list(self._command(request)), close_fds=True)
        except OSError:
            return beam_fn_api_pb2.StartWorkerResponse(error=traceback.format_exc())
        with self._lock:
            self._processes[request.worker_id].append(process)
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, context: Any) -> Any:
        """Stops the worker of an id, unless several workers have the id: those end with their connections."""
        with self._lock:
            alive = self._alive(request.worker_id)
            only = alive.pop() if len(alive) == 1 else None
        if only is not None:
            end(only)
        return beam_fn_api_pb2.StopWorkerResponse()

    def stop_all(self) -> None:
        """Stops every worker."""
        with self._lock:
            for name in list(self._processes):
                for process in self._alive(name):
                    end(process)
            self._processes.clear()

    def _alive(self, name: str) -> list[subprocess.Popen[bytes]]:
        self._processes[name] = [process for process in self._processes[name] if process.poll() is None]
        return self._processes[name]


def harness(request: Any) -> list[str]:
    """Returns the command of a Beam worker in this Python environment."""
    started = (
        "from apache_beam.runners.worker.sdk_worker import SdkHarness; "
        f"SdkHarness({request.control_endpoint.url!r}, worker_id={request.worker_id!r}, state_cache_size=0, "
        "data_buffer_time_limit_ms=-1).run()"
    )
    return [sys.executable, "-c", started]


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process, at first by a request."""
    process.terminate()
    try:
        process.wait(_ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listen(pool: WorkerPool, port: int, host: str = HOST) -> tuple[grpc.Server, int]:
    """Starts a server of a pool; returns the server and its port.

    Args:
        pool: The pool.
        port: Port; 0 takes a free port.
        host: Name or address of the interface to listen on.

    Raises:
        RuntimeError: The address is in use, or is none of this machine.
    """
    server = grpc.server(thread_pool_executor.shared_unbounded_instance(), options=_OPTIONS)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    bound = server.add_insecure_port(f"{host}:{port}")
    server.start()
    return server, bound


def serve(port: int, host: str) -> None:
    """Serves a pool until the process is told to end."""
    pool = WorkerPool()

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal(SIGTERM, stop)
    server, _ = listen(pool, port, host)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        server.stop(0)
        pool.stop_all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a pool of Python workers for Flink and Spark.")
    parser.add_argument("--service_port", type=int, required=True, help="Port to listen on.")
    parser.add_argument("--host", default=HOST, help="Interface to listen on; by default this machine alone.")
    arguments = parser.parse_args()
    serve(arguments.service_port, arguments.host)
