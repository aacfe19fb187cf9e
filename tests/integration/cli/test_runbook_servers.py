"""The runbook's failures in which a server dies: a broker and a Redis of the test's own, and the real processes."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from serving.store.fill import fill_store
from streaming.log.topics import Topics
from tessera.cli.operation import diagnose
from tessera.settings import Settings
from tests.chaos.cluster import Cluster, Process, free_port, jars, until
from tests.integration.world import World
from tests.runbook import Operator

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
BATCH = 40


class Site:
    """A cluster, `tessera serve --mirror` and `tessera stream` on it, and somebody who sends events."""

    def __init__(self, directory: Path, world: World) -> None:
        self.world = world
        self.cluster = Cluster(directory / "cluster")
        home = directory / "home"
        environment = {
            "TESSERA_HOME": str(home),
            "TESSERA_KAFKA": self.cluster.kafka_address,
            "TESSERA_REDIS": self.cluster.redis_address,
            "TESSERA_TOPIC_PREFIX": "own-",
        }
        self.settings = Settings(
            home=home, kafka=self.cluster.kafka_address, redis=self.cluster.redis_address, topics=Topics("own-")
        )
        self.operator = Operator(environment, directory)
        self.settings.open_registry().publish(world.bundle, params={}, metrics={})
        port, metrics = free_port(), free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self._metrics = f"http://127.0.0.1:{metrics}/metrics"
        tessera = [sys.executable, "-m", "tessera"]
        serve, stream = ["serve", "--mirror", "--port", str(port)], ["stream", "--metrics-port", str(metrics)]
        self.server = Process("server", [*tessera, *serve], directory / "server.log", environment)
        self.stream = Process("stream", [*tessera, *stream], directory / "stream.log", environment)
        self.sent = 0
        self.server.start()
        self.stream.start()
        until(self.ready, seconds=120, doing="start of the server")

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/readyz").status_code == 200
        return False

    def reads_from(self) -> str:
        return str(self.client.get("/readyz").json()["mirror"]["reads_from"])

    def rank(self) -> dict[str, Any]:
        answer = self.client.post("/v1/rank", json={"user": "1", "k": 3})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def send(self) -> None:
        """The next events, by HTTP; all are taken."""
        for status in self.posted(BATCH):
            assert status == 202

    def posted(self, count: int) -> Iterator[int]:
        """Posts the next events and returns the server's answer to each."""
        for message in self.world.messages(self.sent + count)[self.sent :]:
            event = json.loads(message) | {"_event_id": self.sent}
            status = self.client.post("/v1/events", json={"events": [event]}).status_code
            self.sent += status == 202
            yield status

    def settled(self) -> bool:
        """Returns whether all that was sent was learnt, each event once."""
        text = httpx.get(self._metrics).text
        counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
        kinds = ("events", "neutral", "duplicates")
        return sum(counts.get(f'tessera_messages_total{{kind="{kind}"}}', 0) for kind in kinds) == self.sent

    def is_whole(self) -> None:
        """Returns whether every sent event counts once, and nothing waits."""
        until(self.settled, seconds=60, doing="the stream's catching up")
        out = self.operator.run("tessera status --json --no-experiments")
        found = json.loads(out)
        assert found["lag"] == {"own-items": 0, "own-events": 0, "own-deltas": 0}
        assert found["newest_delta_s"] < 120
        until(lambda: self.reads_from() == "mirror", seconds=20, doing="the mirror's catching up")
        assert not self.rank()["stale"]
        assert self.stream.alive()

    def said(self, process: Process, words: str) -> bool:
        return words in process.log.read_text()

    def faults(self) -> dict[str, str]:
        return {one.what: one.found for one in diagnose(self.settings) if one.level == "fault"}

    def close(self) -> None:
        self.client.close()
        for process in (self.server, self.stream):
            process.kill()
        self.cluster.close()


@pytest.fixture(scope="module")
def site(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not jars():
        message = "no broker to kill: `make up` fetches its jars (needs Java 17 and Maven)"
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with contextlib.closing(Site(tmp_path_factory.mktemp("site"), world)) as made:
        made.send()
        made.is_whole()
        yield made


def test_while_the_broker_is_down_servers_answer_and_after_it_all_goes_on_by_itself(site: Site) -> None:
    # A request that is under way when the broker dies waits for it for half a minute; those after it do not.
    time.sleep(1.2)
    site.cluster.broker.kill()
    began = time.monotonic()
    assert list(site.posted(5)) == [503] * 5
    # At once, or those who wait for the log would take the places of those who only read.
    assert time.monotonic() - began < 5
    until(lambda: site.reads_from() == "store", seconds=20, doing="the mirror's stepping back")
    assert site.rank()["bundle"] == site.world.bundle.id
    assert "no Kafka broker listens" in site.faults()["log"]
    until(lambda: site.said(site.stream, "the trainer waits: "), seconds=20, doing="the stream's noticing")
    until(lambda: site.said(site.server, "impressions wait: "), seconds=20, doing="the server's noticing")
    site.cluster.start_broker()
    until(lambda: list(site.posted(1)) == [202], seconds=40, doing="the server's return")
    site.send()
    until(site.settled, seconds=60, doing="the stream's return")
    assert "equal" in site.operator.mends("broker-down")
    site.is_whole()


def test_while_redis_is_away_a_mirror_answers_and_says_that_it_is_stale(site: Site) -> None:
    site.cluster.redis.kill()
    until(lambda: site.rank()["stale"], seconds=10, doing="the server's noticing")
    assert "store" in site.faults()
    site.send()
    until(site.settled, seconds=60, doing="the trainer's going on")
    until(lambda: site.said(site.stream, "the writer waits: "), seconds=20, doing="the writer's noticing")
    site.cluster.start_redis()
    assert "equal" in site.operator.mends("redis-away")
    site.is_whole()


@pytest.mark.parametrize("how", ["emptied while it runs", "started again empty"])
def test_a_redis_that_has_lost_its_data_is_filled_from_the_log(site: Site, how: str) -> None:
    if how == "emptied while it runs":
        with redis.Redis(port=site.cluster.redis_port) as client:
            client.flushall()

        def filled() -> bool:
            found = {one.what: one for one in diagnose(site.settings)}["store of the champion"]
            return found.level == "ok"

        # The stream that runs fills it by itself.
        until(filled, seconds=60, doing="the writer's filling of the store")
    else:
        site.cluster.redis.kill()
        for path in site.cluster.directory.glob("appendonlydir"):
            for file in path.iterdir():
                file.unlink()
        for path in (*site.cluster.directory.glob("*.aof"), *site.cluster.directory.glob("*.rdb")):
            path.unlink()
        site.cluster.start_redis()
    assert "equal" in site.operator.mends("redis-lost")
    site.send()
    site.is_whole()
    assert "equal" in site.operator.run("tessera verify")


def test_a_store_that_a_server_put_back_without_the_stream_s_work_is_found_and_mended(site: Site) -> None:
    site.stream.kill()
    with redis.Redis(port=site.cluster.redis_port) as client:
        client.flushall()
    with contextlib.closing(site.settings.open_store()) as store:
        fill_store(store, site.world.bundle)
    found = {one.what: one for one in diagnose(site.settings)}["store of the champion"]
    assert "nothing of the log's deltas" in found.found
    assert "tessera replay" in found.remedy
    assert "equal" in site.operator.mends("redis-lost")


def test_a_process_of_several_that_dies_is_named_and_an_outage_ends_none(site: Site, tmp_path: Path) -> None:
    # A store of its own, since the other stream trains the same bundle.
    store = site.cluster.redis_address.removesuffix("0") + "1"
    more = {"TESSERA_TOPIC_PREFIX": "two-", "TESSERA_PARTITIONS": "2", "TESSERA_REDIS": store}
    environment, settings = site.operator.environment | more, replace(site.settings, topics=Topics("two-", 2))
    command = [sys.executable, "-m", "tessera", "stream", "--bundle", str(site.world.bundle.directory)]
    stream = Process("several", [*command, "--processes", "2"], tmp_path / "stream.log", environment)
    operator = Operator(environment, tmp_path)

    def sent(first: int, last: int) -> None:
        with contextlib.closing(settings.open_log()) as log:
            log.append(settings.topics.events, [(b"%d" % number, line) for number, line in numbered(first, last)])

    def numbered(first: int, last: int) -> list[tuple[int, bytes]]:
        return list(enumerate(site.world.messages(last)))[first:last]

    def settled() -> bool:
        lag = json.loads(operator.run("tessera status --json --no-experiments"))["lag"]
        return lag == {"two-items": 0, "two-events": 0, "two-deltas": 0}

    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
    sent(0, 40)
    stream.start()
    try:
        until(settled, seconds=90, doing="the first step")
        site.cluster.broker.kill()
        until(lambda: site.said(stream, "the 2 processes wait: "), seconds=120, doing="the processes' noticing")
        site.cluster.start_broker()
        sent(40, 80)
        until(settled, seconds=90, doing="the processes' return")
        assert stream.running is not None
        (dying,) = [
            one for one in psutil.Process(stream.running.pid).children() if " --rank 1 " in " ".join(one.cmdline())
        ]
        dying.kill()
        until(lambda: not stream.alive(), seconds=60, doing="the end of the others")
        assert site.said(stream, f"process 1 of 2 (pid {dying.pid}) was killed by SIGKILL")
        sent(80, 120)
        stream.start()
        until(settled, seconds=90, doing="the stream's going on")
        assert "equal" in operator.mends("stream-process")
        log_found = {one.what: one.found for one in diagnose(settings)}["log"]
        assert log_found.endswith("2 partitions, for up to 2 processes of `tessera stream`")
    finally:
        if stream.running is not None:
            stream.running.terminate()
            assert stream.running.wait(60) == 0
