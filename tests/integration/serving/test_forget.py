"""`DELETE /v1/users/{id}`: who may ask, what is appended, and what no log keeps."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from features.errors import EventError, LogError
from features.value.forgotten import hashed
from serving.api.app import AppParts, create_app
from serving.api.ingest import Intake
from serving.api.keys import KeyFile
from serving.api.log_sink import LogSink
from serving.ranking.service import RankService
from serving.traffic.router import Router
from streaming.dead_letter import encode_dead_letter
from streaming.forget.message import decode_tombstone, encode_line
from streaming.forget.request import audit, forget
from streaming.log.protocol import BLANK, EventLog, Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from tessera.pages.console.app import Console, add_console
from tessera.settings import Settings

TOPICS = Topics()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as opened:
        opened.create_topics(TOPICS.partitions())
        yield opened


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def client(service: RankService, log: EventLog, keys: KeyFile) -> Iterator[TestClient]:
    intake = Intake(LogSink(lambda: log, TOPICS))
    app = create_app(Router(service), AppParts(intake=intake, keys=keys))
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


def is_problem(response: Any, status: int) -> bool:
    assert response.status_code == status, response.text
    return bool(response.json()["status"] == status and response.json()["detail"])


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_key_with_the_scope_forgets_a_user_and_nothing_keeps_the_id(
    client: TestClient, log: EventLog, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    secret = keys.add("privacy", ["forget"])
    with caplog.at_level(logging.INFO):
        answer = client.delete("/v1/users/some/body%20else", headers=bearer(secret))
    assert (answer.status_code, answer.json()) == (202, {"accepted": 1})
    logged = [repr(vars(one)) for one in caplog.records if one.name.startswith("tessera")]
    assert logged
    assert not any("body" in text for text in logged)
    (line,) = audit(log, TOPICS)
    assert (line.kind, line.by) == ("requested", "privacy")
    assert line.user == hashed("some/body else", line.salt)
    (message,) = log.read(TOPICS.events, 0, 0, 10)
    assert message.key == b"some/body else"
    assert b"body" not in message.value
    request = decode_tombstone(message.value)
    assert request is not None
    assert (request.user, request.salt, request.at_us) == (line.user, line.salt, line.at_us)


def test_requests_share_a_salt(client: TestClient, log: EventLog, keys: KeyFile) -> None:
    secret = keys.add("privacy", ["forget"])
    for user in ("a", "b", "a"):
        assert client.delete(f"/v1/users/{user}", headers=bearer(secret)).status_code == 202
    lines = list(audit(log, TOPICS))
    assert len({line.salt for line in lines}) == 1
    assert lines[0].user == lines[2].user != lines[1].user


def test_other_keys_are_refused_and_wrong_ids_are_named(client: TestClient, log: EventLog, keys: KeyFile) -> None:
    writer, secret = keys.add("writer", ["read", "write", "console"]), keys.add("privacy", ["forget"])
    assert is_problem(client.delete("/v1/users/u"), 401)
    refused = client.delete("/v1/users/u", headers=bearer(writer))
    assert is_problem(refused, 403)
    assert "forget" in refused.json()["detail"]
    for wrong in ("", "x" * 5_000):
        answer = client.delete(f"/v1/users/{wrong}", headers=bearer(secret))
        assert is_problem(answer, 422)
        assert answer.json()["field"] == "user"
    assert is_problem(client.post("/v1/rank", json={"user": "u"}, headers=bearer(secret)), 403)
    assert list(audit(log, TOPICS)) == []
    assert log.end_offsets(TOPICS.events) == {0: 0}


def test_nothing_is_appended_if_one_id_of_several_is_wrong(log: EventLog) -> None:
    with pytest.raises(EventError, match="user: expected an id of 1 to"):
        forget(log, TOPICS, ["good", ""], by="test")
    assert list(audit(log, TOPICS)) == []


def test_a_log_that_is_away_is_a_503(service: RankService) -> None:
    def away() -> EventLog:
        raise LogError("the log is away")

    app = create_app(Router(service), AppParts(intake=Intake(LogSink(away, TOPICS))))
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost") as client:
        assert is_problem(client.delete("/v1/users/u"), 503)


def test_the_console_shows_the_audit_and_a_rewrite_takes_letters_away(service: RankService, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    current, parts = Router(service), AppParts()
    letter = encode_dead_letter(Message("events", 0, 0, b"somebody", b'{"user": "somebody"', 0), "undecodable", "why")
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(TOPICS.partitions())
        log.append(TOPICS.dead_letters, [(None, letter)])
        (request,) = forget(log, TOPICS, ["somebody"], by="console test")
        app = create_app(current, parts)
        with contextlib.closing(Console(settings, current, parts.metrics, None)) as console:
            add_console(app, console)
            with TestClient(app, raise_server_exceptions=False, base_url="http://localhost") as client:
                console.sampler.look()
                assert "somebody" in client.get("/console/letters").text
                page = client.get("/console/forgotten").text
                assert request.user in page
                assert "console test" in page
                assert "somebody" not in page
                assert isinstance(log, LocalLog)
                log.rewrite([Message(TOPICS.dead_letters, 0, 0, None, BLANK, 0)])
                log.append(TOPICS.forgotten, [(None, encode_line("rewritten", request, removed={"deadletters": 1}))])
                console.sampler.look()
                assert "somebody" not in client.get("/console/letters").text
                assert "deadletters 1" in client.get("/console/forgotten").text
