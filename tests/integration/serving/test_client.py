"""The Python client against `tessera serve` in a process of its own: every call, errors, retries, and the drain."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.client import ApiError, AsyncClient, Client
from tests.integration.served import Served
from tests.integration.world import World
from tests.servers import free_port


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Short: a socket lies below.
    found = Served(world, tmp_path_factory.mktemp("s"), "--drain-s", "0.2")
    yield found
    found.stop()


def test_every_call_of_the_client(served: Served, world: World) -> None:
    items = world.bundle.items["item_id"].to_list()[:5]
    user = world.bundle.history["user_id"][0]
    with Client(served.url, key=served.reader) as client:
        assert client.version().bundle == world.bundle.id
        ranking = client.rank(user, items, k=3, explain=True)
        assert (ranking.bundle, len(ranking.items), ranking.stale) == (world.bundle.id, 3, False)
        assert ranking.items[0].reasons
        assert client.rank(user).retrieved
        found = client.retrieve(item=items[0], k=4, filter={"column": "year", "gte": 1900})
        assert len(found.items) == 4
        assert found.plan.method
        embeddings = client.embeddings("item_id", items)
        assert len(embeddings.vectors) == 5
        assert len(embeddings.vectors[0]) == embeddings.width
        assert client.item(items[0]).item == items[0]
        with pytest.raises(ApiError) as missing:
            client.item("no/such item?")
        assert missing.value.status == 404
        with pytest.raises(ApiError, match="no scope 'write'"):
            client.send_events([json.loads(world.messages(1)[0])])
        with pytest.raises(ApiError) as wrong:
            client.rank("1", k=0)
        assert (wrong.value.status, wrong.value.field) == (422, "k")
        assert wrong.value.request_id
        with pytest.raises(ApiError, match="has no policy 'home'; choose of none") as unknown:
            client.rank(user, policy="home")
        assert unknown.value.field == "policy"
        with pytest.raises(ApiError, match="has no policy 'home'"):
            client.retrieve(item=items[0], policy="home", shown_to=user)
    with Client(served.url, key=served.writer) as client:
        assert client.send_events([json.loads(message) for message in world.messages(3)]) == 3
        assert client.send_items([{"item_id": "new-1", "title": "A title"}]) == 1
        with pytest.raises(ApiError) as wrong:
            client.send_items([{"title": "no id"}])
        assert wrong.value.field == "items.0"
    with Client(served.url) as client, pytest.raises(ApiError, match="an API key is needed"):
        client.version()


def test_a_ranking_says_as_of_when_its_aggregates_are(served: Served, world: World) -> None:
    items = world.bundle.items["item_id"].to_list()[:3]
    with Client(served.url, key=served.reader) as client:
        now, then = (client.rank("anyone", items, at=at) for at in (None, datetime(2031, 5, 1, tzinfo=UTC)))
    assert (now.as_of_source, then.as_of_source) == ("stream", "request")
    assert then.as_of == "2031-05-01T00:00:00Z"
    assert isinstance(now.as_of, str)


def test_the_async_client_makes_the_same_calls(served: Served, world: World) -> None:
    items = world.bundle.items["item_id"].to_list()[:5]

    async def calls() -> None:
        async with (
            AsyncClient(served.url, key=served.reader) as client,
            AsyncClient(served.url, key=served.writer) as writer,
        ):
            rankings = await asyncio.gather(*(client.rank(str(user), items, k=2) for user in range(20)))
            assert all(len(found.items) == 2 for found in rankings)
            assert (await client.retrieve(text="bread", k=2)).items
            assert (await client.embeddings("item_id", items)).width
            assert (await client.item(items[0])).item == items[0]
            assert (await client.version()).bundle == world.bundle.id
            assert await writer.send_events([json.loads(world.messages(1)[0])]) == 1
            assert await writer.send_items([{"item_id": "new-2", "title": "A title"}]) == 1
            with pytest.raises(ApiError):
                await client.rank("1", k=0)

    asyncio.run(calls())


class Grudging(BaseHTTPRequestHandler):
    """Refuses twice, then answers."""

    seen: list[str] = []  # noqa: RUF012 - the test's own

    def do_POST(self) -> None:
        self.seen.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        refuses = len(self.seen) % 3
        self.send_response(503 if refuses else 202)
        if refuses:
            self.send_header("retry-after", "0")
        body = (
            b'{"detail": "later"}'
            if refuses
            else b'{"bundle":"b","feature":"f","width":1,"vectors":[[1]],"accepted":1}'
        )
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def test_a_read_is_tried_again_and_a_write_that_may_have_been_taken_is_not() -> None:
    Grudging.seen.clear()
    with HTTPServer(("127.0.0.1", 0), Grudging) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            assert client.embeddings("f", ["a"]).vectors == [[1.0]]
            assert Grudging.seen == ["/v1/embeddings"] * 3
            with pytest.raises(ApiError, match="later"):
                client.send_events([{}])
            assert Grudging.seen[3:] == ["/v1/events"]
        server.shutdown()
        thread.join()
    with (
        Client(f"http://127.0.0.1:{free_port()}", retries=1) as client,
        pytest.raises(ConnectionError, match="no answer"),
    ):
        client.version()


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_answers_what_it_began_and_ends_in_order(world: World, tmp_path: Path) -> None:
    server = Served(world, tmp_path, "--drain-s", "1.5")
    answers: list[int] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.reader}"}) as client:
            while not stop.is_set():
                answers.append(client.post("/v1/rank", json={"user": "1"}).status_code)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    # A balancer has seen it by now, and sends nothing more.
    stop.set()
    thread.join()
    assert server.process.wait(30) == 0
    assert len(answers) > 10
    assert set(answers) == {200}
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    ranked = [line for line in lines if line.get("path") == "/v1/rank"]
    assert len(ranked) == len(answers)
    assert {(line["key"], line["bundle"], line["status"]) for line in ranked} == {("reader", world.bundle.id, 200)}


@pytest.mark.slow
def test_a_server_without_keys_serves_this_machine_alone(world: World, tmp_path: Path) -> None:
    command = ["serve", "--bundle", str(world.bundle.directory), "--host", "0.0.0.0", "--port", str(free_port())]
    environment = os.environ | {"TESSERA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "without API keys only this machine is served" in done.stderr
