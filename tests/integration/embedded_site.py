"""A registry with a champion, a server that follows it, and somebody at a shell, in this process."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from serving.api.app import AppParts, create_app
from serving.api.ingest import Intake
from serving.api.keys import KeyFile
from serving.api.log_sink import LogSink
from serving.store.memory import MemoryStore
from serving.traffic.follow import RegistryFollower, ServiceOpener
from serving.traffic.router import Router
from tessera.cli.operation import diagnose
from tessera.settings import Settings
from tests.integration.world import World
from tests.runbook import Operator

RANK = {"user": "1", "k": 3}


class Site:
    """The server has a store of its own; the commands' is the embedded one.

    Args:
        home: of all that is kept.
        worlds: whose bundles are published; the first is the champion.
        mlflow: address of the registry, "" for the embedded one.
        keys: that the server asks for.
    """

    def __init__(self, home: Path, *worlds: World, mlflow: str = "", keys: KeyFile | None = None) -> None:
        self.settings = Settings(home=home, mlflow=mlflow)
        self.operator = Operator({"TESSERA_HOME": str(home), "MLFLOW_TRACKING_URI": mlflow}, home)
        self.registry = self.settings.open_registry()
        self.bundles = [world.bundle for world in worlds]
        self.releases = [self.registry.publish(one, params={}, metrics={}) for one in self.bundles]
        self.stack = contextlib.ExitStack()
        store = MemoryStore()
        opener = ServiceOpener(store)
        service, close = opener(self.bundles[0])
        self.current = self.stack.enter_context(contextlib.closing(Router(service, close=close)))
        sink = self.stack.enter_context(contextlib.closing(LogSink(self.settings.open_log, self.settings.topics)))
        self.parts = AppParts(keys=keys, intake=Intake(sink))
        self.follower = RegistryFollower(
            self.settings.open_registry(create=False),
            self.settings.bundles,
            self.current,
            opener,
            model=None,
            grace_s=600,
            metrics=self.parts.metrics,
        )
        self.client = self.stack.enter_context(
            TestClient(create_app(self.current, self.parts), raise_server_exceptions=False)
        )

    def serves(self) -> str:
        """The bundle that answers a ranking."""
        answer = self.client.post("/v1/rank", json=RANK)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["bundle"])

    def send(self, messages: list[bytes]) -> None:
        with contextlib.closing(self.settings.open_log()) as log:
            log.create_topics(self.settings.topics.partitions())
            log.append(self.settings.topics.events, [(None, message) for message in messages])

    def streamed(self) -> dict[str, Any]:
        """Drains the topics once and returns the counts."""
        out = self.operator.run("tessera stream --once --lateness-s 1000000000 --json")
        return dict(json.loads(out[out.index("{") :]))

    def faults(self) -> dict[str, str]:
        """By what is at fault, what `doctor` found."""
        return {one.what: one.found for one in diagnose(self.settings) if one.level == "fault"}


@contextlib.contextmanager
def site(home: Path, *worlds: World, **options: Any) -> Iterator[Site]:
    made = Site(home, *worlds, **options)
    with made.stack:
        yield made
