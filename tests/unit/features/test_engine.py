"""An engine that cannot run a job is refused by name and remedy before the job is submitted."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from features.errors import TesseraError
from features.jobs.engine import STARTS_S, Engine
from tessera.settings import Settings
from tests.servers import free_port


@contextmanager
def flink(jobs: Sequence[dict[str, Any]] = (), cancelled: list[str] | None = None, **overview: int) -> Iterator[str]:
    """Serves a cluster's overview and its jobs, and records the paths of PATCH requests; yields the address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"jobs": jobs} if self.path == "/jobs/overview" else overview)

        def do_PATCH(self) -> None:
            assert cancelled is not None
            cancelled.append(self.path)
            self._answer({})

        def _answer(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def job_of_flink(name: str, jid: str = "1", state: str = "RUNNING", **tasks: int) -> dict[str, Any]:
    counts = dict.fromkeys(("created", "scheduled", "deploying", "initializing", "running", "finished"), 0)
    return {"name": name, "jid": jid, "state": state, "tasks": counts | tasks}


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def jar(tmp_path: Path) -> Path:
    path = tmp_path / "job-server.jar"
    path.touch()
    return path


def test_a_flink_cluster_gets_its_jar_its_free_slots_and_the_pool(listening: str, jar: Path) -> None:
    with flink(**{"slots-total": 4, "slots-available": 3}) as endpoint:
        found = Engine("flink", endpoint, launcher=jar, pool=listening).check()
    assert found == [
        f"--flink_job_server_jar={jar}",
        f"--flink_master={endpoint}",
        "--parallelism=3",
        "--execution_mode_for_batch=BATCH_FORCED",
        "--environment_type=EXTERNAL",
        f"--environment_config={listening}",
    ]


def test_a_spark_cluster_gets_its_jar_its_master_and_the_pool(listening: str, jar: Path) -> None:
    found = Engine("SparkRunner", f"spark://{listening}", launcher=jar, pool=listening).check()
    assert found[:2] == [f"--spark_job_server_jar={jar}", f"--spark_master_url=spark://{listening}"]


def test_each_shard_is_a_task_of_dask(listening: str) -> None:
    assert Engine("dask").check() == ["--dask_partition_size=1"]
    assert Engine("dask", options=("--dask_npartitions=4",)).check() == ["--dask_npartitions=4"]
    assert Engine("dask", listening).check()[1:] == [f"--dask_client_address=tcp://{listening}"]


def test_an_option_of_the_user_replaces_ours(listening: str, jar: Path) -> None:
    chosen = ("--environment_type=LOOPBACK", "--parallelism=1")
    with flink(**{"slots-total": 2, "slots-available": 2}) as endpoint:
        found = Engine("flink", endpoint, chosen, launcher=jar).check()
    own = ["--execution_mode_for_batch=BATCH_FORCED"]
    assert found == [f"--flink_job_server_jar={jar}", f"--flink_master={endpoint}", *own, *chosen]


@pytest.mark.parametrize("name", ["dask", "flink", "portable", "prism", "spark"])
def test_an_endpoint_where_nothing_answers_is_named_with_a_remedy(name: str) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(TesseraError, match=rf"runner {name}: .* answers at {endpoint} \(.*; (start|fix)"):
        Engine(name, endpoint).check()


@pytest.mark.parametrize(("total", "remedy"), [(0, "start a TaskManager"), (2, "wait for the jobs")])
def test_a_flink_cluster_without_a_free_slot_is_refused(total: int, remedy: str) -> None:
    with flink(**{"slots-total": total, "slots-available": 0}) as endpoint:
        with pytest.raises(TesseraError, match=rf"none of the {total} task slots at {endpoint} is free; {remedy}"):
            Engine("flink", endpoint).check()


def test_a_job_of_flink_is_deployed_once_it_has_a_task_that_a_machine_runs() -> None:
    jobs: list[dict[str, Any]] = [job_of_flink("other", running=2)]
    with flink(jobs) as endpoint:
        engine = Engine("flink", endpoint)
        assert not engine.deployed("ours")
        jobs.append(job_of_flink("ours", scheduled=2, deploying=1))
        assert not engine.deployed("ours")
        jobs[-1] = job_of_flink("ours", initializing=1)
        assert engine.deployed("ours")
        assert Engine("spark", endpoint).deployed("ours")


def test_a_job_of_flink_that_has_not_ended_is_cancelled_by_its_name() -> None:
    jobs, cancelled = [job_of_flink("other", "1"), job_of_flink("ours", "2"), job_of_flink("ours", "3", "FAILED")], []
    with flink(jobs, cancelled) as endpoint:
        Engine("flink", endpoint).cancel("ours")
    assert cancelled == ["/jobs/2?mode=cancel"]


def test_a_cluster_without_its_pool_of_python_workers_is_refused(listening: str, jar: Path) -> None:
    pool = f"127.0.0.1:{free_port()}"
    with pytest.raises(TesseraError, match=rf"nothing answers at {pool} .*pool of Python workers .*spark.sh start"):
        Engine("spark", listening, launcher=jar, pool=pool).check()


def test_a_missing_job_server_is_named_with_the_command_that_makes_it(listening: str, tmp_path: Path) -> None:
    with pytest.raises(
        TesseraError, match=r"job server is missing \(.*no\.jar\); run `infra/spark.sh jar`.*TESSERA_SPARK_JAR"
    ):
        Engine("spark", listening, launcher=tmp_path / "no.jar", pool=listening).check()


def test_a_missing_prism_is_named_with_the_command_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TesseraError, match=r"binary is missing; run `infra/prism.sh`.*TESSERA_PRISM"):
        Engine("prism").check()


@pytest.mark.parametrize(
    ("name", "endpoint", "said"),
    [
        (
            "SlowRunner",
            None,
            "runner 'SlowRunner' is unknown; choose one of: direct, dask, prism, flink, spark, portable",
        ),
        ("flink", None, "runner flink: no endpoint; give the cluster's REST address"),
        ("direct", "127.0.0.1:1", "runner direct: endpoint '127.0.0.1:1' is of no use"),
        ("flink", "cluster", "endpoint 'cluster': expected HOST:PORT"),
        ("spark", "spark://a:99999", "expected HOST:PORT"),
    ],
)
def test_a_choice_that_cannot_work_is_refused_when_it_is_made(name: str, endpoint: str | None, said: str) -> None:
    with pytest.raises(TesseraError, match=said):
        Engine(name, endpoint)


def test_the_environment_gives_jar_pool_patience_and_exchange(tmp_path: Path) -> None:
    given = {"TESSERA_SPARK_JAR": "s.jar", "TESSERA_WORKER_POOL": "h:1", "TESSERA_WORKER_START_S": "90"}
    settings = Settings.from_environment(given | {"TESSERA_EXCHANGE": "s3://shop/tmp"})
    found = settings.engine("SparkRunner", "h:2", ["--x=1"])
    assert found == Engine("spark", "h:2", ("--x=1",), Path("s.jar"), "h:1", 90.0, "s3://shop/tmp")
    # Workers of the direct runner are on this machine.
    assert settings.engine("direct").exchange == ""
    assert Settings.from_environment({}).engine("flink", "h:2").starts_s == STARTS_S
    with pytest.raises(TesseraError, match="TESSERA_WORKER_START_S=soon: expected seconds"):
        Settings(tmp_path, worker_start_s="soon").engine("direct")
