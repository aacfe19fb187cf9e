"""The server never fails on any input: requests are made from the OpenAPI document, right and wrong."""

import contextlib
import json
from collections.abc import Iterator

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from serving.api.app import AppParts, create_app
from serving.api.hosts import LOOPBACK, Hosts
from serving.api.ingest import Intake
from serving.api.log_sink import LogSink
from serving.api.refusal import PROBLEM
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from tessera.settings import Settings
from tests.integration.world import World

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "user",
    "candidates",
    "k",
    "context",
    "filter",
    "explain",
    "item",
    "text",
    "aspect",
    "avoid",
    "without",
    "feature",
    "values",
    "events",
    "items",
)


class Sunk:
    """Counts what would be appended."""

    def __init__(self, sink: LogSink) -> None:
        self._sink = sink
        self.messages = 0

    def append(self, kind: str, messages: list[tuple[bytes, bytes]]) -> None:
        self.messages += len(messages)
        self._sink.append(kind, messages)

    def forget(self, user: str, *, by: str) -> None:
        self._sink.forget(user, by=by)
        self.messages += 1


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sunk]:
    settings = Settings(home=tmp_path_factory.mktemp("log"))
    with contextlib.closing(LogSink(settings.open_log, settings.topics)) as sink:
        yield Sunk(sink)


@pytest.fixture(scope="module")
def api_schema(world: World, sunk: Sunk) -> schemathesis.BaseSchema:
    store = MemoryStore()
    fill_store(store, world.bundle)
    # The name by which the library calls an app in its own process.
    parts = AppParts(intake=Intake(sunk), hosts=Hosts([*LOOPBACK, "testserver"]))
    app = create_app(Router(RankService(world.bundle, store)), parts)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_makes_the_server_fail(
    api_schema: schemathesis.BaseSchema,
    sunk: Sunk,
    mode: schemathesis.GenerationMode,
    subtests: pytest.Subtests,
) -> None:
    tried: dict[str, int] = {}
    for found in api_schema.get_all_operations():
        operation = found.ok()
        with subtests.test(operation.label):
            if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                before = sunk.messages
                response = case.call()
                assert response.status_code != 421
                case.validate_response(response, checks=[not_a_server_error])
                if response.status_code >= 400:
                    assert response.headers["content-type"] == [PROBLEM]
                    assert sunk.messages == before
                tried[case.operation.label] = tried.get(case.operation.label, 0) + 1

            send()
    assert len(tried) >= (10 if mode is schemathesis.GenerationMode.POSITIVE else 4)


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/retrieve", "/v1/embeddings", "/v1/events", "/v1/items"])
def test_any_json_at_all_is_answered(api_schema: schemathesis.BaseSchema, path: str) -> None:
    with TestClient(api_schema.app, raise_server_exceptions=False) as client:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
        def send(body: object) -> None:
            data = json.dumps(body).encode()
            response = client.post(path, content=data, headers={"content-type": "application/json"})
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.headers["content-type"] == PROBLEM

        send()
