"""Keys, scopes and limits: who may call what, how much is taken, and what is said to those turned away."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from features.errors import TesseraError
from serving.api.app import AppParts, create_app
from serving.api.guard import Guard, Limits, scopes_of
from serving.api.hosts import LOOPBACK, Hosts
from serving.api.ingest import Intake
from serving.api.keys import SCOPES, KeyFile, Scope
from serving.load_state import State
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.traffic.router import Router
from tessera.pages.console.app import Console, add_console
from tessera.settings import Settings

RANK = {"user": "1", "candidates": ["a"]}


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "home" / "keys.json")


@pytest.fixture
def guarded(service: RankService, keys: KeyFile) -> Iterator[TestClient]:
    with TestClient(create_app(Router(service), AppParts(keys=keys)), raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def is_problem(response: Any, status: int) -> bool:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    assert response.json()["detail"]
    assert response.headers["x-request-id"]
    return True


def test_everything_but_health_asks_for_a_key(guarded: TestClient, keys: KeyFile) -> None:
    keys.add("somebody", ["read"])
    for path in ("/healthz", "/readyz"):
        assert guarded.get(path).status_code == 200
    for method, path in (
        ("POST", "/v1/rank"), ("POST", "/v1/retrieve"), ("POST", "/v1/embeddings"), ("POST", "/v1/events"),
        ("POST", "/v1/items"), ("GET", "/v1/items/a"), ("GET", "/v1/version"), ("POST", "/v1/admin/reload"),
        ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"),
    ):  # fmt: skip
        for headers in ({}, bearer("tsr_foreign"), bearer(""), {"authorization": "Basic !!"}, {"x-api-key": "é"}):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            assert is_problem(guarded.request(method, path, headers=encoded), 401)


def test_a_key_may_do_what_its_scopes_say(guarded: TestClient, keys: KeyFile) -> None:
    secrets = {scope: keys.add(scope, [scope]) for scope in ("read", "write", "admin")}
    calls = {
        "read": lambda headers: guarded.post("/v1/rank", json=RANK, headers=headers),
        "write": lambda headers: guarded.post("/v1/events", json={"events": [{}]}, headers=headers),
        "admin": lambda headers: guarded.post("/v1/admin/reload", headers=headers),
    }
    for held, secret in secrets.items():
        for needed, call in calls.items():
            response = call(bearer(secret))
            if held in (needed, "admin"):
                assert response.status_code not in (401, 403), response.text
            else:
                assert is_problem(response, 403)
                assert needed in response.json()["detail"]
    for headers in ({"x-api-key": secrets["read"]}, basic("", secrets["read"])):
        page = guarded.get("/docs", headers=headers)
        assert page.status_code == 200
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sources
        # Nothing comes from elsewhere.
        assert all(source.startswith("/") for source in sources)
        assert all(guarded.get(source, headers=headers).status_code == 200 for source in sources)


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_keys_are_kept_as_hashes_and_end_when_they_are_removed(guarded: TestClient, keys: KeyFile) -> None:
    secret = keys.add("reader", ["read"])
    assert secret not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o077 == 0
    assert guarded.get("/v1/version", headers=bearer(secret)).status_code == 200
    elsewhere = KeyFile(keys.path)
    elsewhere.remove("reader")
    time.sleep(1.1)
    assert is_problem(guarded.get("/v1/version", headers=bearer(secret)), 401)
    for wrong in (lambda: keys.remove("reader"), lambda: keys.add("x", []), lambda: keys.add("x", ["root"])):  # type: ignore[list-item]
        with pytest.raises(TesseraError):
            wrong()
    keys.add("x", ["read"])
    with pytest.raises(TesseraError, match="the name is taken"):
        keys.add("x", ["read"])


def test_a_damaged_key_file_is_an_error_and_opens_nothing(keys: KeyFile) -> None:
    keys.add("x", ["read"])
    keys.path.write_text("[{")
    with pytest.raises(TesseraError, match=r"keys\.json"):
        KeyFile(keys.path)


@pytest.mark.parametrize("damage", [b"[{", b"", b"\xff\xfe", b'[{"name": "x"}]'])
def test_a_key_file_damaged_under_a_server_changes_nothing_and_is_logged_once(
    guarded: TestClient, keys: KeyFile, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    secret = keys.add("reader", ["read"])
    assert guarded.get("/v1/version", headers=bearer(secret)).status_code == 200
    sound = keys.path.read_bytes()
    keys.path.write_bytes(damage)
    for _ in range(3):
        keys._check_at = 0.0
        assert guarded.get("/v1/version", headers=bearer(secret)).status_code == 200
        assert is_problem(guarded.get("/v1/version", headers=bearer("tsr_foreign")), 401)
    (said,) = [one for one in caplog.records if one.name == "serving.api.keys"]
    assert f"{keys.path}: " in said.getMessage()
    assert "the 1 keys read before are accepted" in said.getMessage()
    with pytest.raises(TesseraError, match=r"keys\.json"):
        keys.add("another", ["read"])
    assert keys.path.read_bytes() == damage
    keys.path.write_bytes(sound)
    assert keys.add("another", ["read"])


def test_keys_added_and_removed_in_two_shells_at_once_are_all_kept(tmp_path: Path) -> None:
    change = (
        "import sys, pathlib; from serving.api.keys import KeyFile\n"
        "file = KeyFile(pathlib.Path(sys.argv[1]))\n"
        "for n in range(20):\n"
        "    file.add(f'{sys.argv[2]}-{n}', ['read'])\n"
        "    n % 2 and file.remove(f'{sys.argv[2]}-{n}')\n"
    )
    path = tmp_path / "keys.json"
    shells = [subprocess.Popen([sys.executable, "-c", change, str(path), who]) for who in "ab"]
    assert [shell.wait(60) for shell in shells] == [0, 0]
    found = KeyFile(path).keys()
    assert {key.name for key in found} == {f"{who}-{n}" for who in "ab" for n in range(0, 20, 2)}


# Every route of a server with its console, and all the scopes that a key must have for it; () asks for no key.
NEEDED: dict[tuple[str, str], tuple[Scope, ...]] = {
    ("POST", "/v1/rank"): ("read",),
    ("POST", "/v1/retrieve"): ("read",),
    ("POST", "/v1/embeddings"): ("read",),
    ("GET", "/v1/items/{item_id:path}"): ("read",),
    ("GET", "/v1/version"): ("read",),
    ("GET", "/metrics"): ("read",),
    ("GET", "/docs"): ("read",),
    ("GET", "/docs/oauth2-redirect"): ("read",),
    ("GET", "/openapi.json"): ("read",),
    ("GET", "/static-offline-docs"): ("read",),
    ("POST", "/v1/events"): ("write",),
    ("POST", "/v1/items"): ("write",),
    ("POST", "/v1/outcomes"): ("write",),
    ("DELETE", "/v1/users/{user_id:path}"): ("forget",),
    ("POST", "/v1/admin/reload"): ("admin",),
    ("GET", "/console"): ("console",),
    ("GET", "/console/"): ("console",),
    ("GET", "/console/live"): ("console",),
    ("GET", "/console/models"): ("console",),
    ("GET", "/console/rollouts"): ("console",),
    ("GET", "/console/rollouts/{experiment}"): ("console",),
    ("GET", "/console/ids"): ("console",),
    ("GET", "/console/encoder"): ("console",),
    ("GET", "/console/upgrades"): ("console",),
    ("GET", "/console/concepts"): ("console",),
    ("GET", "/console/aggregates"): ("console",),
    ("GET", "/console/letters"): ("console",),
    ("GET", "/console/forgotten"): ("console",),
    ("GET", "/console/skew"): ("console",),
    ("GET", "/console/health"): ("console",),
    ("GET", "/console/console.css"): ("console",),
    ("GET", "/console/console.js"): ("console",),
    ("POST", "/console/letters"): ("console", "write"),
    ("GET", "/healthz"): (),
    ("GET", "/readyz"): (),
}


def _routes(routes: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for route in routes:
        if hasattr(route, "original_router"):
            yield from _routes(route.original_router.routes)
        else:
            yield from ((method, route.path) for method in getattr(route, "methods", None) or {"GET"})


@pytest.fixture(scope="module")
def whole(service: RankService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, KeyFile]]:
    """A server with everything that `tessera serve` adds, and its keys."""
    settings = Settings(home=tmp_path_factory.mktemp("whole"))
    keys = KeyFile(settings.home / "keys.json")
    current, parts = Router(service), AppParts(keys=keys)
    app = create_app(current, parts)
    with contextlib.closing(Console(settings, current, parts.metrics, keys)) as console:
        add_console(app, console)
        with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
            yield client, keys


def test_every_route_asks_for_its_scopes_and_no_others(whole: tuple[TestClient, KeyFile]) -> None:
    client, keys = whole
    found = {(method, path) for method, path in _routes(client.app.routes) if method != "HEAD"}  # type: ignore[attr-defined]
    assert found == NEEDED.keys()
    secrets = {
        held: keys.add(" ".join(held) or "none", held)
        for count in range(1, len(SCOPES) + 1)
        for held in itertools.combinations(SCOPES, count)
    }
    for (method, path), needed in NEEDED.items():
        place = re.sub(r"\{[^}]*\}", "x", path)
        for held, secret in secrets.items():
            headers = bearer(secret) | {"origin": "http://elsewhere.example"}
            answer = client.request(method, place, headers=headers, content=b"")
            if "admin" in held or set(needed) <= set(held):
                assert answer.status_code != 401
                assert "has no scope" not in answer.text, (method, path, held)
            else:
                assert is_problem(answer, 403)
                assert "has no scope" in answer.json()["detail"], (method, path, held)
        assert (client.request(method, place).status_code == 401) == bool(needed), (method, path)


def test_what_is_no_route_asks_for_the_scope_of_its_place() -> None:
    assert scopes_of("/nowhere", "GET") == ("read",)
    assert scopes_of("/v1/admin/anything", "GET") == ("admin",)
    assert scopes_of("/v1/users/anybody", "GET") == scopes_of("/v1/users/", "POST") == ("forget",)
    assert scopes_of("/console/anything", "GET") == scopes_of("/console/anything", "HEAD") == ("console",)
    assert scopes_of("/console/anything", "DELETE") == ("console", "write")
    assert scopes_of("/consoles", "GET") == ("read",)


# Names of the server.


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("shop.example.:8000", True),
        ("rebound.evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("shop.example.evil.example", False),
        ("10.0.0.7", False),
    ],
)
def test_a_server_without_keys_answers_to_its_own_names_alone(service: RankService, host: str, known: bool) -> None:
    parts = AppParts(hosts=Hosts([*LOOPBACK, "shop.example"]), intake=Intake(Nowhere()))
    app = create_app(Router(service), parts)
    with TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False) as client:
        for answer in (
            client.post("/v1/rank", json=RANK),
            client.post("/v1/items", json={"items": [{"item_id": "i1", "_deleted": True}]}),
            client.post("/console/letters", data={"number": "0"}, headers={"origin": f"http://{host}"}),
            client.get("/metrics"),
        ):
            if known:
                assert answer.status_code in (200, 202, 404)
            else:
                assert is_problem(answer, 421)
                assert "--allow-host" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200


def test_a_key_counts_under_any_name(service: RankService, keys: KeyFile) -> None:
    secret = keys.add("reader", ["read"])
    app = create_app(Router(service), AppParts(keys=keys))
    with TestClient(app, base_url="http://shop.example") as client:
        assert client.post("/v1/rank", json=RANK, headers=bearer(secret)).status_code == 200
        assert client.post("/v1/rank", json=RANK).status_code == 401


class Nowhere:
    """Takes what comes and keeps nothing."""

    def append(self, kind: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
        assert messages, kind

    def forget(self, user: str, *, by: str) -> None:
        assert user, by


def _client(service: RankService, **limits: Any) -> TestClient:
    return TestClient(create_app(Router(service), AppParts(limits=Limits(**limits))), raise_server_exceptions=False)


def test_a_body_too_large_is_refused_with_or_without_its_length(service: RankService) -> None:
    large = json.dumps({"user": "1", "candidates": ["x" * 100] * 100_000}).encode()
    assert len(large) > 10_000_000
    with _client(service, body_bytes=100_000) as client:
        headers = {"content-type": "application/json"}
        assert is_problem(client.post("/v1/rank", content=large, headers=headers), 413)
        parts = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
        assert is_problem(client.post("/v1/rank", content=parts, headers=headers), 413)
        assert client.post("/v1/rank", json=RANK).status_code == 200


def test_a_key_above_its_rate_is_told_when_to_come_again(service: RankService) -> None:
    with _client(service, per_second=2.0, burst_s=1.0) as client:
        answers = [client.post("/v1/rank", json=RANK) for _ in range(6)]
        assert [one.status_code for one in answers[:2]] == [200, 200]
        assert is_problem(answers[-1], 429)
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        time.sleep(0.6)
        assert client.post("/v1/rank", json=RANK).status_code == 200
        time.sleep(0.6)
        assert 'tessera_refused_total{why="rate"}' in client.get("/metrics").text


def test_more_requests_than_the_server_is_good_for_are_refused_at_once(
    service: RankService, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began, rank = threading.Event(), threading.Semaphore(0), service.rank

    def slow(*arguments: Any, **named: Any) -> Any:
        began.release()
        go.wait(20)
        return rank(*arguments, **named)

    monkeypatch.setattr(service, "rank", slow)
    answers: list[Any] = []
    with _client(service, in_flight=3) as client:
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/rank", json=RANK))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert all(began.acquire(timeout=10) for _ in threads)
        for _ in range(5):
            refused = client.post("/v1/rank", json=RANK)
            assert is_problem(refused, 503)
            assert refused.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        go.set()
        for thread in threads:
            thread.join()
        assert [one.status_code for one in answers] == [200, 200, 200]
        assert 'tessera_refused_total{why="overloaded"} 5.0' in client.get("/metrics").text


def test_slow_callers_hold_little_and_take_no_place_from_others() -> None:
    """Callers whose bodies stay unfinished: as many as may be answered keep a part, and the others are told at once."""
    places, part, callers = 4, bytes(50_000), 40
    state, go, answers = State(), asyncio.Event(), list[int]()

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": (await receive())["body"]})

    guard = Guard(inside, metrics=Metrics(), limits=Limits(in_flight=places, body_s=20), keys=None, state=state)

    async def call(*, slow: bool) -> int:
        sent, read = list[MutableMapping[str, Any]](), 0

        async def receive() -> MutableMapping[str, Any]:
            nonlocal read
            read += 1
            if slow and read > 1:
                await go.wait()
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": part, "more_body": slow}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await guard({"type": "http", "path": "/v1/rank", "method": "POST", "headers": []}, receive, send)
        answers.append(sent[0]["status"])
        return int(sent[0]["status"])

    async def scene() -> None:
        slow = [asyncio.create_task(call(slow=True)) for _ in range(callers)]
        while len(answers) < callers - places:
            await asyncio.sleep(0)
        assert answers == [503] * (callers - places)
        assert (state.receiving, state.in_flight) == (places, 0)
        assert [await call(slow=False) for _ in range(3)] == [200] * 3
        go.set()
        await asyncio.gather(*slow)
        assert state.receiving == 0
        # Where no more is answered, no body is read.
        state.in_flight = places
        assert await call(slow=True) == 503
        assert state.receiving == 0

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_a_draining_server_is_not_ready_and_still_answers(service: RankService) -> None:
    parts = AppParts()
    with TestClient(create_app(Router(service), parts)) as client:
        assert client.get("/readyz").status_code == 200
        parts.state.draining = True
        assert is_problem(client.get("/readyz"), 503)
        assert client.post("/v1/rank", json=RANK).status_code == 200


def test_a_request_keeps_the_id_it_came_with_where_that_is_a_plain_word(
    service: RankService, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(create_app(Router(service))) as client, caplog.at_level("INFO", logger="tessera.access"):
        given = client.post("/v1/rank", json=RANK, headers={"x-request-id": "order-7"})
        assert given.headers["x-request-id"] == "order-7"
        made = client.post("/v1/rank", json=RANK, headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
        assert made != "a b\tc"
        assert len(made) == 32
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [line["request_id"] for line in lines] == ["order-7", made]
    assert lines[0]["path"] == "/v1/rank"
    assert lines[0]["status"] == 200
    assert lines[0]["bundle"] == service.bundle.id
