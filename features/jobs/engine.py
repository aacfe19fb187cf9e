"""Engines that a batch job can run on: their names, their addresses, and the checks before a job is submitted.

An engine that cannot run the job is refused here, in seconds. Its own library would wait for ever, or fail in words
that name neither the address nor the remedy. `features.jobs.beam` runs the job.
"""

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from features.errors import TesseraError

_ANSWER_S = 10.0
# Flink's states of a task that a TaskManager has.
_DEPLOYED = ("initializing", "running", "finished")
_LOCAL = ("127.0.0.1", "localhost", "::1")
POOL = "127.0.0.1:50000"
"""Address at which each machine of a Flink or Spark cluster has its pool of Python workers."""
STARTS_S = 50.0
"""Default of `Engine.starts_s`: with the checks before, a worker that cannot start is an error within a minute."""

BEAM_NAMES = {
    "direct": "DirectRunner",
    "dask": "DaskRunner",
    "prism": "PrismRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "portable": "PortableRunner",
}
_NEEDS_ENDPOINT = {
    "flink": "the cluster's REST address, such as 127.0.0.1:8081",
    "spark": "the cluster's master, such as 127.0.0.1:7077",
    "portable": "the job server, such as 127.0.0.1:8099",
}


@dataclass(frozen=True)
class Engine:
    """Engine of a batch job. No byte of a job's output depends on the engine.

    Attributes:
        name: `direct` (this process, or processes that it starts), `dask`, `prism`, `flink`, `spark` or `portable` (any
            Beam job server). Beam's own names, `FlinkRunner` for example, mean the same.
        endpoint: `HOST:PORT` of the cluster; None where the engine starts in this process.
        options: Further Beam options, `--direct_num_workers=2` for example. They replace options that are set here.
        launcher: Beam's job-server jar of Flink or Spark, or Prism's binary.
        pool: `HOST:PORT` of the pool of Python workers, as the machines of a Flink or Spark cluster see it.
        starts_s: Seconds after which a job that the cluster runs and no worker has begun is cancelled.
        exchange: Address at an object store through which files go to workers that share no disk with this machine.

    Raises:
        TesseraError: The name is unknown, or the endpoint is missing, of no use, or not `HOST:PORT`.
    """

    name: str = "direct"
    endpoint: str | None = None
    options: tuple[str, ...] = ()
    launcher: Path | None = None
    pool: str = POOL
    starts_s: float = STARTS_S
    exchange: str = ""

    def __post_init__(self) -> None:
        names = {beam: name for name, beam in BEAM_NAMES.items()}
        object.__setattr__(self, "name", names.get(self.name, self.name))
        if self.name not in BEAM_NAMES:
            raise TesseraError(f"runner {self.name!r} is unknown; choose one of: {', '.join(BEAM_NAMES)}")
        if self.endpoint is None:
            if self.name in _NEEDS_ENDPOINT and not self.options:
                raise TesseraError(
                    f"runner {self.name}: no endpoint; give {_NEEDS_ENDPOINT[self.name]}, with --endpoint"
                )
        elif self.name == "direct":
            raise TesseraError(
                f"runner direct: endpoint {self.endpoint!r} is of no use, since the job runs on this machine; leave it "
                "out, or choose another runner"
            )
        else:
            address(self.endpoint)

    @property
    def waits(self) -> bool:
        """True if the engine waits for ever for a worker that cannot start."""
        return self.name in ("flink", "spark", "portable")

    def check(self) -> list[str]:
        """Returns the Beam options of a job, once the engine answers and can run it.

        Raises:
            TesseraError: Nothing answers at an address, the cluster has no worker that is free, or the launcher is
                missing; says what to do.
        """
        made = _OPTIONS[self.name](self)
        given = {option.partition("=")[0] for option in self.options}
        return [option for option in made if option.partition("=")[0] not in given] + list(self.options)

    def deployed(self, job: str) -> bool:
        """Returns True once the cluster runs tasks of a job, which need Python workers. Other engines than Flink cannot
        be asked, and count as if they did.
        """
        if self.name != "flink" or self.endpoint is None:
            return True
        return any(found["tasks"][state] for found in self._jobs(job) for state in _DEPLOYED)

    def cancel(self, job: str) -> None:
        """Ends a job by its name where Beam's own cancel leaves it on the cluster, as Flink's job server does."""
        if self.name != "flink" or self.endpoint is None:
            return
        for found in self._jobs(job):
            if found["state"] in ("CREATED", "RUNNING", "RESTARTING"):
                _json(self, Request(f"{self._rest}/jobs/{found['jid']}?mode=cancel", method="PATCH"))

    @property
    def _rest(self) -> str:
        return "http://{}:{}".format(*address(str(self.endpoint)))

    def _jobs(self, name: str) -> list[dict[str, Any]]:
        """Returns the jobs of a Flink cluster that have a name."""
        return [found for found in _json(self, f"{self._rest}/jobs/overview")["jobs"] if found["name"] == name]


def address(text: str) -> tuple[str, int]:
    """Returns host and port of `HOST:PORT`, with or without a scheme before it.

    Raises:
        TesseraError: The text is no such address.
    """
    host, _, port = text.rpartition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise TesseraError(f"endpoint {text!r}: expected HOST:PORT, such as 127.0.0.1:8081")
    return host, int(port)


def _direct(engine: Engine) -> list[str]:
    return []


def _dask(engine: Engine) -> list[str]:
    # Dask would put 128 elements into one task.
    made = ["--dask_partition_size=1"]
    if any(option.startswith("--dask_npartitions") for option in engine.options):
        made = []
    if engine.endpoint is None:
        return made
    _connect(engine, engine.endpoint, "start `dask scheduler`, or fix the endpoint")
    host, port = address(engine.endpoint)
    scheme = engine.endpoint.rpartition("://")[0] or "tcp"
    return [*made, f"--dask_client_address={scheme}://{host}:{port}"]


def _prism(engine: Engine) -> list[str]:
    if engine.endpoint is not None:
        _connect(engine, engine.endpoint, "start prism, or leave the endpoint out")
        return [f"--job_endpoint={engine.endpoint}", "--environment_type=LOOPBACK"]
    if any(option.startswith("--prism_location") for option in engine.options):
        return ["--environment_type=LOOPBACK"]
    found = engine.launcher if engine.launcher and engine.launcher.is_file() else shutil.which("prism")
    if found is None:
        raise TesseraError(
            "runner prism: its binary is missing; run `infra/prism.sh`, which needs Go, or set TESSERA_PRISM to the "
            "path of the binary"
        )
    return [f"--prism_location={found}", "--environment_type=LOOPBACK"]


def _flink(engine: Engine) -> list[str]:
    if engine.endpoint is None:
        return []
    host, port = address(engine.endpoint)
    seen = _json(engine, f"{engine._rest}/overview")
    total, free = int(seen["slots-total"]), int(seen["slots-available"])
    if not free:
        raise TesseraError(
            f"runner flink: none of the {total} task slots at {engine.endpoint} is free; "
            + ("wait for the jobs that run" if total else "start a TaskManager (`infra/flink.sh start 2`)")
        )
    pool = _pool(engine)
    jar = [] if _gives(engine, "--flink_job_server_jar") else [f"--flink_job_server_jar={_jar(engine)}"]
    # Exchanges that are pipelined need all slots at once, so a job that lost a TaskManager would wait for another.
    exchanges = "--execution_mode_for_batch=BATCH_FORCED"
    return [*jar, f"--flink_master={host}:{port}", f"--parallelism={free}", exchanges, *pool]


def _spark(engine: Engine) -> list[str]:
    if engine.endpoint is None:
        return []
    _connect(engine, engine.endpoint, "start the cluster (`infra/spark.sh start 2`), or fix the endpoint")
    host, port = address(engine.endpoint)
    pool = _pool(engine)
    jar = [] if _gives(engine, "--spark_job_server_jar") else [f"--spark_job_server_jar={_jar(engine)}"]
    return [*jar, f"--spark_master_url=spark://{host}:{port}", *pool]


def _portable(engine: Engine) -> list[str]:
    if engine.endpoint is None:
        return []
    _connect(engine, engine.endpoint, "start the job server, or fix the endpoint")
    return [f"--job_endpoint={engine.endpoint}", *_pool(engine)]


_OPTIONS: dict[str, Callable[[Engine], list[str]]] = {
    "direct": _direct,
    "dask": _dask,
    "prism": _prism,
    "flink": _flink,
    "spark": _spark,
    "portable": _portable,
}


def _gives(engine: Engine, name: str) -> bool:
    return any(option.partition("=")[0] == name for option in engine.options)


def _pool(engine: Engine) -> list[str]:
    """Returns the options of the Python workers.

    A pool is checked where the cluster is on this machine. Elsewhere the address is that of each machine of the
    cluster, which cannot be seen from here.
    """
    if _gives(engine, "--environment_type"):
        return []
    if engine.endpoint is not None and address(engine.endpoint)[0] in _LOCAL:
        _connect(
            engine,
            engine.pool,
            f"start the pool of Python workers (`infra/{engine.name}.sh start` does), or set TESSERA_WORKER_POOL",
        )
    return ["--environment_type=EXTERNAL", f"--environment_config={engine.pool}"]


def _jar(engine: Engine) -> Path:
    if engine.launcher is None or not engine.launcher.is_file():
        raise TesseraError(
            f"runner {engine.name}: Beam's job server is missing ({engine.launcher}); run `infra/{engine.name}.sh jar`"
            f", or set TESSERA_{engine.name.upper()}_JAR to the path of its jar"
        )
    if shutil.which("java") is None:
        raise TesseraError(
            f"runner {engine.name}: java is not on the PATH; Beam's job server needs a Java runtime, 17 or newer"
        )
    return engine.launcher


def _connect(engine: Engine, endpoint: str, remedy: str) -> None:
    try:
        with socket.create_connection(address(endpoint), timeout=_ANSWER_S):
            pass
    except OSError as error:
        raise TesseraError(
            f"runner {engine.name}: nothing answers at {endpoint} ({error.strerror or error}); {remedy}"
        ) from error


def _json(engine: Engine, url: str | Request) -> dict[str, Any]:
    try:
        with urlopen(url, timeout=_ANSWER_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TesseraError(
            f"runner {engine.name}: no cluster answers at {engine.endpoint} ({reason}); "
            f"start it (`infra/{engine.name}.sh start 2`), or fix the endpoint"
        ) from error
