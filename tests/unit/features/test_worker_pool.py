"""The pool of workers: two engines that give their workers one id do not stop each other's."""

import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from apache_beam.portability.api import beam_fn_api_pb2

from features.jobs.worker_pool import WorkerPool, harness, listen

_SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(lambda request: _SLEEPS)
    yield made
    made.stop_all()


def _request(name: str) -> SimpleNamespace:
    return SimpleNamespace(worker_id=name)


def test_a_worker_is_stopped_by_its_id(pool: WorkerPool) -> None:
    pool.StartWorker(_request("1-1"), None)
    pool.StartWorker(_request("1-2"), None)
    (first,), (second,) = pool._processes["1-1"], pool._processes["1-2"]
    pool.StopWorker(_request("1-1"), None)
    assert first.poll() is not None
    assert second.poll() is None
    pool.StopWorker(_request("unknown"), None)


def test_of_two_workers_with_one_id_none_is_stopped_until_one_has_ended(pool: WorkerPool) -> None:
    for _ in range(2):
        pool.StartWorker(_request("1-1"), None)
    first, second = pool._processes["1-1"]
    pool.StopWorker(_request("1-1"), None)
    assert first.poll() is None
    assert second.poll() is None
    first.kill()
    first.wait()
    pool.StopWorker(_request("1-1"), None)
    assert second.poll() is not None


def test_all_workers_end_with_the_pool(pool: WorkerPool) -> None:
    for _ in range(2):
        pool.StartWorker(_request("1-1"), None)
    processes = list(pool._processes["1-1"])
    pool.stop_all()
    assert all(process.poll() is not None for process in processes)


def test_a_command_that_cannot_start_is_an_error_in_the_answer() -> None:
    pool = WorkerPool(lambda request: ["/no/such/command"])
    assert "No such file" in pool.StartWorker(_request("1-1"), None).error


def test_a_worker_runs_in_this_python_and_connects_to_its_engine() -> None:
    request = beam_fn_api_pb2.StartWorkerRequest(worker_id="1-1")
    request.control_endpoint.url = "localhost:7"
    python, option, code = harness(request)
    assert (python, option) == (sys.executable, "-c")
    assert "'localhost:7', worker_id='1-1'" in code


def test_a_pool_answers_this_machine_alone_unless_it_is_told_otherwise(pool: WorkerPool) -> None:
    for host, others in ((None, False), ("[::]", True)):
        server, port = listen(pool, 0) if host is None else listen(pool, 0, host)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
            # Another address of this machine stands for another machine.
            with socket.socket() as other:
                other.settimeout(5)
                assert (other.connect_ex(("127.0.0.2", port)) == 0) is others
        finally:
            server.stop(0).wait()
