"""A server with something to show, and a real Chromium that looks at it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

from models.registry.lineage import Lineage
from models.registry.release import CHALLENGER
from serving.rollout.experiment import RampStep
from serving.rollout.guardrails import Guardrails
from serving.rollout.judge import familiar_items, judging
from serving.rollout.lifecycle import start, stop
from serving.rollout.look_log import LookLog
from streaming.forget.request import forget
from streaming.log.topics import Topics
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World, make_world
from tests.servers import free_port

PARTITIONS = 2
ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "out" / "browser"
_CHROMIUM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A running server.

    Attributes:
        url: of the server; home: its directory.
        item: one that has a Semantic ID.
        letters: how many messages were quarantined.
    """

    url: str
    home: Path
    world: World
    item: str
    letters: int


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, headless; skipped without one."""
    path = os.environ.get("TESSERA_TEST_CHROMIUM")
    if not path:
        pytest.skip("no browser: `make test-browser` looks for a Chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=list(_CHROMIUM))
        yield found
        found.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The accessibility checker's script."""
    return Path(os.environ["TESSERA_TEST_AXE"]).read_text(encoding="utf-8")


@contextlib.contextmanager
def serving(home: Path, log: Path) -> Iterator[str]:
    """`tessera serve` over a home."""
    port = free_port()
    command = [sys.executable, "-m", "tessera", "serve", "--port", str(port), "--follow-s", "0.3", "--drain-s", "0"]
    environment = os.environ | {
        "TESSERA_HOME": str(home),
        "TESSERA_PARTITIONS": str(PARTITIONS),
        "TESSERA_KAFKA": "",
        "TESSERA_REDIS": "",
    }
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out) as process:
        try:
            give_up = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                        break
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A champion, two experiments, one of them ended, a stream with quarantined letters, and a forgotten user."""
    world = make_world(tmp_path_factory.mktemp("world"))
    other = make_world(tmp_path_factory.mktemp("other"), seed=1)
    home = tmp_path_factory.mktemp("home")
    settings = Settings(home=home, topics=Topics("", PARTITIONS))
    registry = settings.open_registry()
    for one, parent in ((world, None), (other, world.bundle.id)):
        measured = one.bundle.manifest.metrics["quality"]["ranker"]["all"]
        lineage = Lineage("d" * 64, one.bundle.manifest.encoder, one.bundle.manifest.codebook, parent)
        metrics = {f"all.{name}": float(value) for name, value in measured.items() if value is not None}
        release = registry.publish(one.bundle, params={}, metrics=metrics, lineage=lineage)
    registry.challenge(release, verdict={})
    start(registry, None, CHALLENGER, [RampStep(0.0, 0.2)], name="monday")
    stop(registry, None, "monday", why="rolled back: p99: 80.0 ms against 20.0")
    letters = _streamed(settings, world)
    start(registry, None, release.version, [RampStep(0.0, 0.5)], name="friday")
    with serving(home, home / "serve.log") as url:
        _visited(url, settings, world, other.bundle.id)
        yield Site(url, home, world, world.bundle.items["item_id"][0], letters)


def _streamed(settings: Settings, world: World) -> int:
    bad = [b"oops", b'{"event": 1}', "<script>alert(1)</script> ‮ hi".encode(), b"\xff\xfe"]
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        log.create_topics(settings.topics.partitions())
        log.append(settings.topics.events, [(None, message) for message in [*world.messages(100), *bad]])
        forget(log, settings.topics, [world.bundle.users["user_id"][-1]], by="privacy-team")
        options = TrainerOptions(batch=64, lateness_s=1e9)
        with StreamService(
            world.bundle, StreamConnections.shared(log, store, topics=settings.topics), options
        ) as stream:
            stream.drain()
    return len(bad)


def _visited(url: str, settings: Settings, world: World, challenger: str) -> None:
    """Users are shown something and click, and a judge looks again and again."""
    registry = settings.open_registry()
    model, rng = world.dataset.name, np.random.default_rng(0)
    candidates = world.bundle.items["item_id"].to_list()[:30]
    familiar, looks = familiar_items(registry, None, settings.home / "bundles"), LookLog(registry, model)
    with contextlib.closing(settings.open_log()) as log, httpx.Client(base_url=url) as client:
        with judging(
            registry, log, settings.topics, model=None, rule=Guardrails(planned=400), familiar=familiar
        ) as judge:
            for part in range(5):
                outcomes = []
                for number in range(80):
                    body = {"user": f"visitor-{part}-{number}", "candidates": candidates, "k": 5}
                    answer = client.post("/v1/rank", json=body).json()
                    if rng.random() < (0.5 if answer["bundle"] == challenger else 0.4):
                        outcomes.append({"impression": answer["impression"], "item": answer["items"][0]["item"]})
                assert client.post("/v1/outcomes", json={"outcomes": outcomes}).status_code == 202
                give_up = time.monotonic() + 20
                while sum(log.end_offsets(settings.topics.impressions).values()) < 80 * (part + 1):
                    assert time.monotonic() < give_up
                    time.sleep(0.05)
                for standing, experiment in zip(judge.look(), judge.experiments, strict=True):
                    looks.note(experiment, standing, time.time())
