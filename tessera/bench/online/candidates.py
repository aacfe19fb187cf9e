"""`candidates`: measures what the towers cost a retrieval for a user, over HTTP and in process.

One server answers the same users by content alone, by both sources, which is the default, and by content again, in an
order that rotates. The two of content are the control. The server reads histories from Redis.
"""

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import Bundle
from serving.ranking.service import RankService
from serving.retrieval.meaning import NOTHING, Meant
from serving.store.fill import fill_store
from serving.store.redis.store import RedisStore
from tessera.bench.harness.live_data import servers
from tessera.bench.harness.load import TIMEOUT_S
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.harness.served import server
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings
from tessera.terminal import one_thread

_K, _ROUNDS, _WARM = 20, 500, 50
_KINDS: tuple[tuple[str, ...], ...] = (("content",), (), ("content",))
"""Sources of the three requests of a round; empty for the default, which is both."""
Ask = Callable[[str, tuple[str, ...]], None]


def candidates(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Trains once, and measures each seed on the bundle."""
    if not dataset.has_content or dataset.events.user is None:
        raise TesseraError(f"bench candidates needs users and items with content; {dataset.name} lacks one")
    settings = servers("candidates")
    options = load_options(dataset, ["seed=0", "retrieval=towers", "towers.content_weight=1"])
    bundle = run(dataset, out / dataset.name, options, console=console, registry=None, until="publish").bundle
    if bundle is None:
        raise TesseraError("the run released no bundle to serve; see its report")
    one_thread()
    rows = measured_rows()
    for seed in range(seeds):
        with console.status(f"seed {seed}"):
            rows += measure(settings, bundle, seed, out)
    return BenchResult("candidates", dataset.name, seeds, rows, claims(rows))


def measure(settings: Settings, bundle: Bundle, seed: int, out: Path, *, rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """Returns the rows of a seed: over HTTP, and in process."""
    rows = []
    for name, open_ask in (("HTTP", _over_http(settings, bundle, out)), ("process", _in_process(settings, bundle))):
        with open_ask as ask:
            rows.append({"part": f"retrieve: {name}", "seed": seed} | _timed(ask, bundle, seed, rounds))
    return rows


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Judges the median over the seeds."""
    ratios = [row["ratio"] for row in rows if row["part"] == "retrieve: HTTP"]
    return [
        at_most("p50 of retrieve {user} by both sources over content alone, over HTTP", float(np.median(ratios)), 1.5)
    ]


def _timed(ask: Ask, bundle: Bundle, seed: int, rounds: int) -> dict[str, Any]:
    """Times the kinds of requests for the same users, in an order that rotates."""
    rng, users = np.random.default_rng(seed), sorted(set(bundle.history["user_id"].to_list()))
    taken: list[list[float]] = [[] for _ in _KINDS]
    for number in range(rounds + _WARM):
        user = users[rng.integers(len(users))]
        for place in range(len(_KINDS)):
            turn = (number + place) % len(_KINDS)
            began = time.perf_counter()
            ask(user, _KINDS[turn])
            if number >= _WARM:
                taken[turn].append(1_000 * (time.perf_counter() - began))
    before, both, after = (float(np.median(one)) for one in taken)
    content = float(np.sqrt(before * after))
    return {"p50_ms": both, "content_p50_ms": content, "ratio": both / content, "control": after / before}


@contextlib.contextmanager
def _over_http(settings: Settings, bundle: Bundle, out: Path) -> Iterator[Ask]:
    environment = {"TESSERA_REDIS": settings.redis, "TESSERA_HOME": str((out / "home").absolute()), "TESSERA_KAFKA": ""}
    options = ("--bundle", str(bundle.directory), "--quiet")
    with (
        server(environment, *options, log=out / "serve-candidates.log") as port,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection,
    ):

        def ask(user: str, sources: tuple[str, ...]) -> None:
            body = {"user": user, "k": _K} | ({"sources": sources} if sources else {})
            connection.request("POST", "/v1/retrieve", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise TesseraError(f"the server answered {response.status}: {answer.decode()}")

        yield ask


@contextlib.contextmanager
def _in_process(settings: Settings, bundle: Bundle) -> Iterator[Ask]:
    with contextlib.closing(RedisStore(settings.redis)) as store:
        fill_store(store, bundle)
        service = RankService(bundle, store)

        def ask(user: str, sources: tuple[str, ...]) -> None:
            service.retrieve(user=user, k=_K, meant=Meant(sources=sources) if sources else NOTHING)

        yield ask
