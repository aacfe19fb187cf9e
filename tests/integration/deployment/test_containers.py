"""Each container's command, as it stands in its manifest, does its work on a real broker, Redis, registry and store."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from features.storage.folders import Folders
from features.storage.location import Remote
from serving.api.keys import KeyFile
from streaming.log.kafka import KafkaLog
from tessera.settings import Settings
from tests.integration.world import World
from tests.kubernetes import Container, containers
from tests.mlflow_server import MlflowServer
from tests.object_store import object_store
from tests.servers import EXECUTABLE, free_port

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
CONTAINERS = {one.name: one for one in containers()}
ROOT = Path(__file__).parents[3]
# Other processes of the machine may slow down a start several times, but not its processor time.
_START_S = 300.0
_NAMED_S = 60.0
TRAINED = 'tessera_messages_total{kind="events"}'


def until(ready: Callable[[], object], seconds: float, doing: str) -> None:
    give_up = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if ready():
                return
        assert time.monotonic() < give_up, doing
        time.sleep(0.2)


_started: list["subprocess.Popen[bytes]"] = []


@pytest.fixture(autouse=True)
def _no_pod_is_left() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


class Pod:
    """Container that runs as a process of this machine: its command and variables, and a home of its own."""

    def __init__(self, container: Container, directory: Path, given: dict[str, str], *, index: int = 0) -> None:
        self.container = container
        self.home = directory / f"{container.name}-{index}"
        self.home.mkdir(exist_ok=True)
        own = container.environment(given, index=index)
        self._log = self.home / "log"
        base = {name: value for name, value in os.environ.items() if not name.startswith(("TESSERA_", "MLFLOW_"))}
        # The image's variables; what it names `tessera` is this environment's.
        base |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                container.arguments(own),
                env=base | own | {"TESSERA_HOME": str(self.home), "HOME": str(directory)},
                cwd=self.home,
                stdout=log,
                stderr=log,
            )
        _started.append(self.process)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def runs(self) -> bool:
        """Returns True. Fails with what the process said if it ended."""
        assert self.process.poll() is None, f"{self.container.name}: {self.said}"
        return True

    def refused(self) -> str:
        """Returns what the process said, which ended by itself and used less than a minute of processor time."""
        before = sum(os.times()[2:4])
        assert self.process.wait(_START_S) == 2, self.said
        assert sum(os.times()[2:4]) - before < _NAMED_S
        return self.said

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Returns the exit code after SIGTERM. It has ended within the pod's grace."""
        return self.process.wait(self.container.pod["terminationGracePeriodSeconds"])


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Address of a real Redis server of this test."""
    port = free_port()
    command = [EXECUTABLE, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        yield f"redis://127.0.0.1:{port}/0"
        server.kill()


@pytest.fixture
def given(kafka_address: str, redis: str, world: World, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Values of config map and secret for this machine; the registry has the world's bundle as its champion."""
    (tmp_path / "mlflow").mkdir()
    with contextlib.closing(MlflowServer(tmp_path / "mlflow")) as server, object_store(f"b{uuid.uuid4().hex}") as store:
        registry = f"http://127.0.0.1:{server.port}"
        until(server.answers, _START_S, "start of MLflow")
        Settings(home=tmp_path / "operator", mlflow=registry).open_registry().publish(
            world.bundle, params={}, metrics={}
        )
        yield {
            "TESSERA_KAFKA": kafka_address,
            "TESSERA_REDIS": redis,
            "TESSERA_TOPIC_PREFIX": f"k{uuid.uuid4().hex[:8]}-",
            "MLFLOW_TRACKING_URI": registry,
            "TESSERA_SNAPSHOTS": f"{store}/snapshots",
            "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
            "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
            "MEET": f"127.0.0.1:{free_port()}",
        }


def metric(port: int, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.slow
def test_the_containers_train_serve_and_drain_together(given: dict[str, str], world: World, tmp_path: Path) -> None:
    made = Pod(CONTAINERS["topics"], tmp_path, given)
    assert made.process.wait(_START_S) == 0, made.said
    prefix = given["TESSERA_TOPIC_PREFIX"]
    messages = [json.dumps(json.loads(one) | {"_event_id": number}) for number, one in enumerate(world.messages(200))]
    log = KafkaLog(given["TESSERA_KAFKA"])
    assert len(log.end_offsets(f"{prefix}deltas")) == 4

    metrics = [free_port(), free_port(), free_port()]
    trainers = [Pod(CONTAINERS["trainer"], tmp_path, given | {"METRICS_PORT": str(metrics[0])})]
    # A trainer answers its probe while it waits for the others.
    until(lambda: trainers[0].runs() and metric(metrics[0], "tessera_batches_total") == 0, _START_S, "first trainer")
    trainers.append(Pod(CONTAINERS["trainer"], tmp_path, given | {"METRICS_PORT": str(metrics[1])}, index=1))
    writer = Pod(CONTAINERS["writer"], tmp_path, given | {"METRICS_PORT": str(metrics[2])})
    (tmp_path / "server-0").mkdir()
    key = KeyFile(tmp_path / "server-0" / "keys.json").add("shop", ["read"])
    port = free_port()
    server = Pod(CONTAINERS["server"], tmp_path, given | {"PORT": str(port)})
    judge = Pod(CONTAINERS["judge"], tmp_path, given)
    pods = [*trainers, writer, server, judge]
    try:
        # The kubelet asks at the pod's address and not by a name that the server knows.
        asked = {"headers": {"Host": "10.1.2.3:8000"}}
        for place in metrics:
            until(
                lambda place=place: all(pod.runs() for pod in pods) and metric(place, "tessera_batches_total") == 0,
                _START_S,
                "metrics of trainers and writer",
            )
        ready = lambda: httpx.get(f"http://127.0.0.1:{port}/readyz", **asked).status_code  # noqa: E731
        until(lambda: all(pod.runs() for pod in pods) and ready() == 200, _START_S, "start of the server")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", **asked).status_code == 200
        log.append(f"{prefix}events", [(str(json.loads(one)["user_id"]).encode(), one.encode()) for one in messages])
        until(lambda: all(pod.runs() for pod in pods) and metric(metrics[0], TRAINED) >= 150, _START_S, "training")
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/rank",
            json={"user": json.loads(messages[0])["user_id"], "k": 3},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"http://127.0.0.1:{port}/v1/rank", json={"user": "1", "k": 3}).status_code == 401
        until(lambda: "no experiment" in judge.said or judge.said.strip(), 60, "a look of the judge")
    finally:
        for pod in pods:
            pod.terminate()
    # The server says that it drains before it ends.
    until(lambda: ready() == 503, 10, "draining")
    assert [pod.ended() for pod in pods] == [0] * len(pods), [pod.said[-500:] for pod in pods]
    # The last snapshot is at the store, and no pod kept a state that another start would need.
    address = Remote(f"{given['TESSERA_SNAPSHOTS']}/{prefix}/{world.bundle.id}")
    assert Folders(tmp_path / "none", address, record="manifest.json").complete()


@pytest.mark.parametrize("name", ["trainer", "server", "judge"])
def test_a_missing_secret_is_named_at_the_start(name: str, tmp_path: Path) -> None:
    said = Pod(CONTAINERS[name], tmp_path, {"TESSERA_REDIS": "", "AWS_SECRET_ACCESS_KEY": ""}).refused()
    assert "TESSERA_REDIS, AWS_SECRET_ACCESS_KEY: not set, but TESSERA_REQUIRE names it; set it in" in said
    assert "Traceback" not in said


def test_a_server_without_the_secret_of_its_keys_says_so(tmp_path: Path) -> None:
    given = {"TESSERA_REDIS": "redis://127.0.0.1:1/0", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    said = Pod(CONTAINERS["server"], tmp_path, given).refused()
    assert "--host 0.0.0.0: without API keys only this machine is served; `tessera keys add NAME`" in said
