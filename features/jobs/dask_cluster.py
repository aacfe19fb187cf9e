"""Cluster of Dask under a job: one of this machine, or a named one that is checked first."""

from collections.abc import Iterator
from contextlib import contextmanager

from features.errors import TesseraError
from features.jobs.engine import Engine, address

_ANSWER_S = 10.0
_NAMED = ("--dask_client_address", "--dask_scheduler_file")


@contextmanager
def dask_cluster(engine: Engine) -> Iterator[list[str]]:
    """Starts a cluster on this machine if the engine is Dask and names none, and gives the options that name it.

    Dask's own default would open a dashboard on every interface, on a port that a second job may hold.
    """
    if (
        engine.name != "dask"
        or engine.endpoint is not None
        or any(option.startswith(_NAMED) for option in engine.options)
    ):
        yield []
        return
    from distributed import LocalCluster

    with LocalCluster(host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield [f"--dask_client_address={cluster.scheduler_address}"]


def check_workers(endpoint: str) -> None:
    """Refuses a cluster without workers, which would keep the job waiting for ever.

    Raises:
        TesseraError: No scheduler answers at the endpoint, or it has no worker.
    """
    from distributed import Client

    host, port = address(endpoint)
    try:
        with Client(f"tcp://{host}:{port}", timeout=_ANSWER_S) as client:
            workers = len(client.nthreads())
    except OSError as error:
        raise TesseraError(f"runner dask: no scheduler answers at {endpoint} ({error}); see what runs there") from error
    if not workers:
        raise TesseraError(
            f"runner dask: the scheduler at {endpoint} has no worker; start `dask worker tcp://{host}:{port}`"
        )
