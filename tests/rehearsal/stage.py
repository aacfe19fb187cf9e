"""The rehearsal's stage: an MLflow server, the real Kafka and Redis, `tessera` as processes, and users who click."""

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from features.shown.message import Impression, decode_impression
from models.bundle.bundle import Bundle
from models.registry.lineage import Lineage
from models.registry.registry import Registry
from serving.rollout.experiment import Experiment
from serving.rollout.lifecycle import past, promoted, running, stop
from serving.rollout.look_log import looks_of
from streaming.log.topics import Topics
from tessera.settings import Settings
from tests.chaos.cluster import Process, until
from tests.rehearsal import faults
from tests.rehearsal.process import MlflowServer, Server
from tests.rehearsal.truth import CANDIDATES, Bundles, Truth

PLANNED, EVERY_S = 2_000, 2
_SHOWN, _AT_ONCE = 5, 12
# What requests that failed are answered with; 422 by a challenger that refuses what the champion takes.
_FAILED = (422, 500, 503)


@dataclass(frozen=True)
class Answer:
    """Answer of one request, or the reason for none."""

    user: str
    status: int
    bundle: str = ""
    impression: str = ""
    items: tuple[str, ...] = ()
    why: str = ""


@dataclass
class Seen:
    """Results of requests."""

    answers: list[Answer] = field(default_factory=list)
    clicks: int = 0

    def bundles(self) -> dict[str, str]:
        """Returns the bundle that ranked for each user."""
        return {one.user: one.bundle for one in self.answers}


class Stage:
    """All of it. Whatever is asked by `rank` and `visit` is accounted for by `account`."""

    def __init__(self, directory: Path, tessera: Path, mlflow: MlflowServer, kafka: str, redis: str) -> None:
        self.directory = directory
        self.tessera = tessera
        self.mlflow = mlflow
        self.topics = Topics(f"rehearsal-{uuid.uuid4().hex[:8]}-")
        self.environment = {
            "TESSERA_HOME": str(directory / "operator"),
            "TESSERA_KAFKA": kafka,
            "TESSERA_REDIS": redis,
            "TESSERA_TOPIC_PREFIX": self.topics.prefix,
            "MLFLOW_TRACKING_URI": mlflow.address,
            faults.VARIABLE: str(directory / "faults.json"),
        }
        self.breaks({})
        self.settings = Settings(
            home=directory / "operator", kafka=kafka, redis=redis, mlflow=mlflow.address, topics=self.topics
        )
        self.registry: Registry = self.settings.open_registry()
        self.truth = Truth()
        self.client = httpx.Client(timeout=60)
        self.servers = [
            Server(tessera, directory, name, self.environment | {"TESSERA_HOME": str(directory / name)})
            for name in ("one", "two")
        ]
        self._asked: list[Answer] = []
        self._turn = itertools.count()

    def open(self, bundles: Bundles) -> None:
        """Publishes bundles, the first of them as champion, and starts the servers."""
        self.bundles = bundles
        self.model = bundles.weak.dataset.name
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.versions = {
                one.id: self.registry.publish(one, params={}, metrics={}, lineage=Lineage(dataset="d")).version
                for one in (bundles.weak, bundles.good, bundles.bad, bundles.broken)
            }
        # What MLflow's client says of its own accord would stand in front of a command's JSON.
        assert said.getvalue() == ""
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait()

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        self.client.close()
        with contextlib.closing(self.settings.open_store()) as store:
            for bundle in self.versions:
                store.drop(bundle)

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command of an operator, whose exit status is known."""
        done = subprocess.run(
            [str(self.tessera), *words],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def experiments(self) -> list[Experiment]:
        return running(self.registry, self.model)

    def breaks(self, kinds: dict[str, str]) -> None:
        """Says how the networks of bundles break from now on, by bundle; see `faults`."""
        made = self.directory / "faults.new"
        made.write_text(json.dumps(kinds))
        made.replace(self.directory / "faults.json")

    def crown(self, bundle: Bundle) -> None:
        """Begins a scene: a champion, no experiment, and all servers know."""
        promoted(self.registry, self.registry.release(self.model, bundle.id))
        for one in self.experiments():
            stop(self.registry, self.model, one.name, why="the scene is over")
        self.reload()

    def reload(self) -> None:
        """Has all servers look at the registry now, instead of within a second."""
        for server in self.servers:
            assert self.client.post(f"{server.url}/v1/admin/reload").status_code == 200

    def begin(self, bundle: Bundle, name: str, *options: str) -> Experiment:
        """Starts an experiment, which all servers run when this returns."""
        version = self.versions[bundle.id]
        said = self.run("rollout", "start", "--challenger", version, "--name", name, *(options or ("--share", "0.5")))
        assert said.stdout.startswith(f"{name}: {bundle.id} against ")
        self.reload()
        return next(one for one in self.experiments() if one.name == name)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Process]:
        """A judge at work; it ends in order."""
        command = [str(self.tessera), "rollout", "watch", "--every-s", str(EVERY_S), "--planned", str(PLANNED)]
        process = Process("watch", command, self.directory / "watch.log", self.environment)
        process.start()
        assert process.running is not None
        try:
            yield process
            assert process.alive(), process.log.read_text()[-2_000:]
            process.signal(signal.SIGTERM)
            assert process.running.wait(60) == 0
        finally:
            if process.alive():
                process.signal(signal.SIGTERM)
                process.running.wait(60)

    def looks(self, experiment: Experiment) -> list[dict[str, Any]]:
        """Returns the looks of judges at an experiment, from MLflow."""
        return looks_of(self.registry, self.model, experiment)

    def ended(self, experiment: Experiment) -> str:
        """Why an experiment ended; empty while it runs."""
        return next((one.why for one in past(self.registry, self.model) if one.experiment == experiment), "")

    def until_ended(self, experiment: Experiment) -> str:
        until(lambda: self.ended(experiment) != "", seconds=60, doing=f"the end of {experiment.name}")
        return self.ended(experiment)

    def releases(self) -> dict[str, dict[str, Any]]:
        """By bundle, what `rollout list` says."""
        return {one["bundle"]: one for one in json.loads(self.run("rollout", "list", "--json").stdout)}

    def until_served(self, users: Sequence[str], bundle: Bundle) -> None:
        """Waits until every server answers users by a bundle; nobody tells the servers."""

        def served() -> bool:
            found = [self.rank(server, user) for server in self.servers for user in users]
            return all(one is not None and one.bundle == bundle.id for one in found)

        until(served, seconds=30, doing=f"the servers' following to {bundle.id}")

    def rank(self, server: Server, user: str) -> Answer | None:
        """Asks one server; None where it does not answer at all."""
        body = {"user": user, "candidates": CANDIDATES, "k": _SHOWN}
        try:
            response = self.client.post(f"{server.url}/v1/rank", json=body)
        except httpx.TransportError:
            return None
        found = response.json()
        if response.status_code == 200:
            items = tuple(one["item"] for one in found["items"])
            answer = Answer(user, 200, found["bundle"], found["impression"], items)
        else:
            answer = Answer(user, response.status_code, why=found["title"])
        self._asked.append(answer)
        return answer

    def visit(self, users: Iterable[str]) -> Seen:
        """Users ask, some at a time and of whichever server's turn it is, and click what they like of what they see."""
        seen = Seen()
        lock = threading.Lock()
        coming = iter(users)

        def visitor() -> None:
            while True:
                with lock:
                    user = next(coming, None)
                if user is None:
                    return
                answer, clicks = self._visited(user)
                with lock:
                    seen.answers.append(answer)
                    seen.clicks += clicks

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done in [pool.submit(visitor) for _ in range(_AT_ONCE)]:
                done.result()
        return seen

    @contextlib.contextmanager
    def visited(self, users: Sequence[str]) -> Iterator[Seen]:
        """Users come again and again while the body runs; what they saw is there behind it."""
        over = threading.Event()
        seen = Seen()

        def coming() -> Iterator[str]:
            for user in itertools.cycle(users):
                if over.is_set():
                    return
                yield user

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.visit, coming())
            try:
                yield seen
            finally:
                over.set()
            found = done.result()
        seen.answers, seen.clicks = found.answers, found.clicks

    def _visited(self, user: str) -> tuple[Answer, int]:
        """One visit; who gets no connection turns to the other server."""
        give_up = time.monotonic() + 60
        while (answer := self.rank(self._next(), user)) is None:
            assert time.monotonic() < give_up, "no server answers"
        clicked = self.truth.clicked(user, answer.items)
        if clicked:
            outcomes = [{"impression": answer.impression, "item": item} for item in clicked]
            while not self.send(outcomes):
                assert time.monotonic() < give_up, "no server takes outcomes"
        return answer, len(clicked)

    def send(self, outcomes: list[dict[str, Any]]) -> bool:
        """Sends outcomes to the next server; whether it took them, or is to be asked again."""
        try:
            response = self.client.post(f"{self._next().url}/v1/outcomes", json={"outcomes": outcomes})
        except httpx.TransportError:
            return False
        if response.status_code == 503:
            # A server that has just started is refused by its log while it opens it.
            time.sleep(0.1)
            return False
        assert response.status_code == 202, response.text
        return True

    def _next(self) -> Server:
        return self.servers[next(self._turn) % len(self.servers)]

    def account(self) -> list[Impression]:
        """Each answer is in the topic once, each failed request as such, and nothing else; the servers' logs agree.

        Returns:
            The topic.
        """
        answered = [one for one in self._asked if one.status == 200]
        failed = [one for one in self._asked if one.status in _FAILED]
        assert len(answered) + len(failed) == len(self._asked), Counter(one.status for one in self._asked)
        topic = self.topics.impressions
        with contextlib.closing(self.settings.open_log()) as log:

            def read() -> list[Any]:
                ends = log.end_offsets(topic)
                return [one for part, end in ends.items() for one in log.read(topic, part, 0, end)]

            until(lambda: len(read()) >= len(self._asked), seconds=30, doing="the impressions' coming")
            messages = read()
        decoded = [decode_impression(message.value) for message in messages]
        shown = [one for one in decoded if isinstance(one, Impression)]
        assert len(shown) == len(decoded)
        found = {one.id: one for one in shown}
        assert len(found) == len(shown)
        assert {name for name, one in found.items() if not one.failed} == {one.impression for one in answered}
        for one in answered:
            noted = found[one.impression]
            assert (noted.user, noted.bundle, tuple(noted.items)) == (one.user, one.bundle, one.items)
        assert Counter(one.user for one in found.values() if one.failed) == Counter(one.user for one in failed)
        # A server notes a request behind its answer.
        until(
            lambda: self._noted() == Counter(one.status for one in self._asked), seconds=10, doing="the servers' logs"
        )
        return shown

    def _noted(self) -> Counter[int]:
        lines = [line for server in self.servers for line in server.lines() if line.get("path") == "/v1/rank"]
        return Counter(line["status"] for line in lines)
