"""A bundle with a position path: a server's values equal the log's, and its scores do not drift from the profile's."""

import contextlib
import random
import time
from collections.abc import Iterator

import pytest

from features.dataset.descriptor import load_dataset
from features.shown.message import Impression, Outcome, encode
from models.bundle.bundle import Bundle, load_bundle
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.table.default_schema import TableOptions
from serving.api.log_sink import LogSink
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.skew.drift import DriftReport, DriftWatch
from serving.skew.prove import prove, read_records
from serving.skew.report import SkewReport
from serving.skew.sample import SkewSampler
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import quiet

START_MS = 1_700_000_000_000
USERS, ITEMS, REQUESTS = 800, 40, 4_000
# Nearly all clicks are on the first of four positions.
EXAMINED = (0.8, 0.1, 0.02, 0.01)
DESCRIPTOR = """
name = "placed"
[events]
from = "impressions"
path = "shown.jsonl"
outcomes_path = "done.jsonl"
outcomes = ["click"]
window = "1m"
placement = { position = "position", categorical = ["surface"] }
[split]
by = "time"
"""
OPTIONS = RunOptions(
    placement="always",
    aggregates="declared",
    table=TableOptions(dim=8),
    training=TrainConfig(max_epochs=6, batch=256, network=NetworkConfig(cross_layers=1, cross_rank=8, hidden=(16,))),
)


def visits() -> Iterator[tuple[Impression, list[Outcome]]]:
    """Yields impressions, a second apart, with the clicks on them."""
    draw = random.Random(1)
    for number in range(REQUESTS):
        at = START_MS + 1_000 * number
        items = [f"i{item}" for item in draw.sample(range(ITEMS), 4)]
        user, surface = f"u{draw.randrange(USERS)}", draw.choice(["home", "cart"])
        shown = Impression(f"r{number}", user, at, "b", "shown", items=items, surface=surface)
        clicked = [item for item, examined in zip(items, EXAMINED, strict=True) if draw.random() < examined]
        yield shown, [Outcome(shown.id, item, at + 5_000) for item in clicked]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("placed")
    pairs = list(visits())
    (directory / "shown.jsonl").write_bytes(b"\n".join(encode(shown) for shown, _ in pairs))
    (directory / "done.jsonl").write_bytes(b"\n".join(encode(one) for _, done in pairs for one in done))
    (directory / "placed.toml").write_text(DESCRIPTOR)
    dataset = load_dataset(directory / "placed.toml")
    result = run(dataset, directory / "run", OPTIONS, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return load_bundle(result.bundle.directory)


@pytest.fixture(scope="module")
def reports(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[SkewReport, DriftReport]:
    """Reports of one request of each user, of items drawn as the impressions' were."""
    path, topics, metrics = tmp_path_factory.mktemp("served") / "log.db", Topics(), Metrics()
    store = MemoryStore()
    fill_store(store, bundle)
    with contextlib.closing(LocalLog(path)) as log, contextlib.closing(LogSink(lambda: LocalLog(path), topics)) as sink:
        log.create_topics(topics.partitions())
        service = RankService(bundle, store, deltas=topics.deltas)
        draw = random.Random(2)
        with contextlib.closing(SkewSampler(sink, metrics, 1.0)) as sampler:
            for number in range(USERS):
                items = [f"i{item}" for item in draw.sample(range(ITEMS), 4)]
                sampler.offer(f"s{number}", service.rank(f"u{number}", items, 4, context={"surface": "home"}))
                while sampler.waiting > 32:
                    time.sleep(0.002)
        records, _ = read_records(log, topics)
        proved = prove(log, bundle, topics, records)
    assert bundle.profile is not None
    watch = DriftWatch(bundle.schema, bundle.profile, bundle=bundle.id, varying=bundle.dataset.events.varying)
    watch.add(records)
    return proved, watch.look()


def test_no_served_value_differs(reports: tuple[SkewReport, DriftReport]) -> None:
    report, _ = reports
    assert (report.requests, report.different, dict(report.skipped)) == (USERS, 0, {})


def test_scores_at_the_constant_of_the_path_do_not_drift_from_the_profile(
    bundle: Bundle, reports: tuple[SkewReport, DriftReport]
) -> None:
    _, drift = reports
    curve = bundle.network().placement.curves()
    logits = [row["logit"] for row in curve if row["column"] == "position"]
    # The path decides so much of the logged scores that scores of logged positions have another distribution.
    assert float(logits[0]) - float(logits[3]) > 2.0
    (score,) = [one for one in drift.measures if one.name == "score"]
    assert drift.users == USERS
    assert not score.alarm
    assert score.psi < 0.25, drift
