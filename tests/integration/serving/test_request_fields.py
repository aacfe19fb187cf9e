"""Fields of requests and candidates, and features of two tables: trained, streamed, served, explained and proved."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.dataset.descriptor import load_dataset
from features.dataset.tables import load_events, message_columns
from features.errors import EventError
from features.jobs.messages import encode_rows
from features.shown.message import Impression, decode_impression
from models.bundle.bundle import Bundle, load_bundle
from models.bundle.catalogue import Catalogue
from models.bundle.request_features import request_frame, sent_values
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.table.default_schema import TableOptions
from serving.api.app import AppParts, create_app
from serving.api.log_sink import LogSink
from serving.client import Client
from serving.client_call import ApiError, request_headers
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.skew.prove import SkewLimits, prove, read_records
from serving.skew.report import SkewReport
from serving.skew.sample import SkewSampler
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from serving.traffic.shadow import _compared, _Job
from streaming.log.protocol import Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import World, quiet

FIELDS = """
[events.request]
device = { type = "category", default = "web" }
[events.candidate]
price_now = { type = "number", default = 5.0 }
badge = { type = "category" }
[features]
fresh = "EXTRACT(YEAR FROM event.time) - item.year"
relative = "event.price_now / NULLIF(item.year - 2000, 0)"
device_format = "event.device || '/' || item.format"
seen_by = "user.country || '/' || item.format"
dear = "event.price_now > 6"
"""
OPTIONS = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=8,
    aggregates="off",
    table=TableOptions(dim=8),
    training=TrainConfig(max_epochs=1, network=NetworkConfig(cross_layers=1, cross_rank=8, hidden=(16,))),
)
CROSSED = ("fresh", "relative", "device_format", "seen_by")
AT_US = 1_748_736_000_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("fields")
    path = write_synthetic(directory / "data", users=60, items=120, events=2_000)
    path.write_text(path.read_text().replace("filterable = [", 'read = { year = "number" }\nfilterable = [') + FIELDS)
    events = pl.read_parquet(path.parent / "events.parquet")
    rng = np.random.default_rng(0)
    price = pl.Series("price_now", rng.integers(0, 40, events.height) / 4)
    missing = pl.Series(rng.random(events.height) < 0.1)
    none = pl.Series([None], dtype=pl.Float64)
    events.with_columns(
        pl.Series("device", rng.choice(["phone", "tv", None], events.height).tolist(), dtype=pl.String),
        price.zip_with(~missing, none).alias("price_now"),
        pl.Series("badge", rng.choice(["new", "sale", None], events.height).tolist(), dtype=pl.String),
    ).write_parquet(path.parent / "events.parquet")
    dataset = load_dataset(path)
    result = run(dataset, directory / "run", OPTIONS, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return World(dataset, directory / "run", load_bundle(result.bundle.directory))


@pytest.fixture(scope="module")
def service(made: World) -> RankService:
    store = MemoryStore()
    fill_store(store, made.bundle)
    return RankService(made.bundle, store)


class Kept:
    """Keeps appended messages."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def append(self, kind: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
        self.messages += [message for _, message in messages]


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def http(service: RankService, kept: Kept) -> Iterator[TestClient]:
    parts = AppParts()
    recorder = Recorder(kept, parts.metrics)
    with TestClient(
        create_app(Router(service), replace(parts, recorder=recorder)), raise_server_exceptions=False
    ) as opened:
        yield opened
        recorder.close()


def caller(http: TestClient) -> Client:
    client = Client("http://shop")
    client._http = http
    http.headers.update(request_headers(None))
    return client


def candidates(bundle: Bundle, count: int) -> list[dict[str, Any]]:
    names = bundle.items["item_id"].to_list()[:count]
    return [{"item_id": name, "price_now": 2.0 + place, "badge": "sale"} for place, name in enumerate(names)]


def test_a_model_learns_from_fields_and_features_of_two_tables(made: World) -> None:
    bundle = made.bundle
    assert {"event.device", "event.badge", "event.device_format", "event.seen_by", "event.dear"} <= {
        feature.name for feature in bundle.schema.features
    }
    assert {"event.price_now", "event.fresh", "event.relative"} <= {one.name for one in bundle.schema.numeric}
    examples = read_frame(made.directory / "frame").examples
    raw = pl.read_parquet(made.dataset.directory / "events.parquet")[examples["event"].to_numpy()]
    assert examples["device"].equals(raw["device"].fill_null("web"))
    assert examples["price_now"].equals(raw["price_now"].fill_null(5.0).cast(pl.Float32))
    assert bundle.dataset.events.varying == {"price_now", "badge", "dear", *CROSSED}


def test_the_step_and_the_server_have_the_features_of_the_frame(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = read_frame(made.directory / "frame")
    test = frame.part("test").sort("time", "event")[:150]
    messages = encode_rows(message_columns(load_events(made.dataset), made.dataset.events)[test["event"].to_numpy()])
    topics, step, found = Topics(), Step(made.bundle, Topics()), []
    crossed = Catalogue.crossed

    def capture(self: Catalogue, *given: Any) -> pl.DataFrame:
        found.append(crossed(self, *given))
        return found[-1]

    monkeypatch.setattr(Catalogue, "crossed", capture)
    step.apply([Message(topics.events, 0, number, None, one, 2_000_000_000_000) for number, one in enumerate(messages)])
    assert step.bundle is made.bundle
    names = ("price_now", "dear", *CROSSED)
    assert found[0].select(names).equals(test.select(names))
    catalogue = Catalogue(made.bundle)
    items = catalogue.number_items(frame.items["item_id"].gather(test["item"]).to_list())
    for row in range(0, 150, 10):
        sent = json.loads(messages[row])
        context = {"device": sent["device"]} if "device" in sent else {}
        fields = {name: [sent.get(name)] for name in ("price_now", "badge")}
        asked = sent_values(made.bundle, context, fields, 1)
        served = request_frame(
            made.bundle, catalogue, asked, sent["user_id"], items[row : row + 1], at_us=test["time"][row]
        )
        assert served.select(names).equals(test[row : row + 1].select(names))


def test_server_bundle_and_client_give_one_answer(made: World, service: RankService, http: TestClient) -> None:
    asked = candidates(made.bundle, 12)
    at = "2025-05-31T00:00:00Z"
    answer = http.post(
        "/v1/rank", json={"user": "r00001", "candidates": asked, "k": 12, "context": {"device": "tv"}, "at": at}
    )
    assert answer.status_code == 200, answer.text
    scores = {one["item"]: one["score"] for one in answer.json()["items"]}
    local = service.rank("r00001", asked, 12, {"device": "tv"}, at=AT_US)
    assert scores == pytest.approx(dict(local.items))
    client = caller(http)
    same = client.rank("r00001", asked, k=12, context={"device": "tv"})
    dearer = client.rank("r00001", [one | {"price_now": 90.0} for one in asked], k=12, context={"device": "tv"})
    assert [one.score for one in dearer.items] != [one.score for one in same.items]
    # A bundle alone has no clock, so that the age of an item is missing.
    alone = made.bundle.rank("r00001", [*asked, asked[0]["item_id"]], context={"device": "tv"})
    assert alone.shape == (13,)
    assert np.isfinite(alone).all()
    assert alone[0] != alone[12]
    with pytest.raises(EventError, match=r"candidates: unknown field 'prise'; the nearest is 'price_now'"):
        made.bundle.rank("r00001", [{"item_id": "a", "prise": 1}])


def test_a_candidate_without_a_field_has_its_default(made: World, service: RankService) -> None:
    names = made.bundle.items["item_id"].to_list()[:5]
    plain = service.rank("r00001", names, 5, at=AT_US).items
    priced = [{"item_id": name, "price_now": 5.0} for name in names]
    sent = service.rank("r00001", priced, 5, {"device": "web"}, at=AT_US).items
    assert plain == sent
    # The first place of a repeated candidate counts.
    twice = service.rank("r00001", [*names, {"item_id": names[0], "price_now": 99.0}], 5, at=AT_US).items
    assert twice == plain
    found = service.rank("r00001", None, 5, {"device": "web"}, at=AT_US)
    assert found.retrieved
    again = dict(service.rank("r00001", [name for name, _ in found.items], 5, at=AT_US).items)
    assert dict(found.items) == pytest.approx(again, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"candidates": [{"item_id": "a", "prise_now": 1}]}, "candidates", "the nearest is 'price_now'"),
        ({"candidates": ["b", {"item_id": "a", "price_now": "9"}]}, "candidates.1.price_now", "a number is a finite"),
        ({"candidates": [{"item_id": "a", "price_now": True}]}, "candidates.0.price_now", "got 'True'"),
        ({"candidates": [{"item_id": "a", "badge": {"x": 1}}]}, "candidates.0.badge", "a category is text"),
        ({"candidates": [{"price_now": 1}]}, "candidates.0", "item_id is no id"),
        ({"candidates": [["a"]]}, "candidates.0", "valid string"),
        ({"candidates": ["a"], "context": {"devise": "tv"}}, "context", "the nearest is 'device'"),
        ({"candidates": ["a"], "context": {"price_now": 1}}, "context", "unknown column 'price_now'"),
        ({"candidates": ["a"], "context": {"device": [["tv"]]}}, "context.device", "expected text of at most"),
    ],
)
def test_a_wrong_field_is_refused_by_name(http: TestClient, body: dict[str, Any], field: str, said: str) -> None:
    answer = http.post("/v1/rank", json={"user": "r00001", **body})
    assert answer.status_code == 422
    assert answer.json()["field"] == field
    assert said in answer.json()["detail"]


def test_nan_is_refused_by_name_over_http_and_in_the_client(http: TestClient) -> None:
    content = b'{"user": "r1", "candidates": [{"item_id": "a", "price_now": NaN}]}'
    answer = http.post("/v1/rank", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["field"]) == (422, "candidates.0.price_now")
    client = caller(http)
    with pytest.raises(ValueError, match=r"candidates.0.price_now: nan is no finite number"):
        client.rank("r1", [{"item_id": "a", "price_now": float("nan")}])
    with pytest.raises(ApiError, match="a number is a finite number") as refused:
        client.rank("r1", [{"item_id": "a", "price_now": "cheap"}])
    assert refused.value.field == "candidates.0.price_now"


def test_reasons_name_fields_and_features_of_two_tables(made: World, http: TestClient) -> None:
    body = {"user": "r00001", "candidates": candidates(made.bundle, 3), "explain": True}
    for one in http.post("/v1/rank", json=body).json()["items"]:
        assert {"event.price_now", "event.badge", "event.device", "event.fresh", "event.seen_by"} <= set(one["reasons"])
        assert one["reasons"]["event.badge"] != 0 or one["reasons"]["event.price_now"] != 0


def test_an_impression_has_the_values_that_were_served(
    made: World, service: RankService, http: TestClient, kept: Kept
) -> None:
    asked = [*candidates(made.bundle, 4), made.bundle.items["item_id"][6]]
    answer = http.post("/v1/rank", json={"user": "r00001", "candidates": asked, "k": 3}).json()
    http.__exit__(None, None, None)
    (shown,) = [decode_impression(message) for message in kept.messages]
    assert isinstance(shown, Impression)
    prices = {one["item_id"]: one["price_now"] for one in asked[:4]}
    assert shown.context == {"device": "web"}
    assert shown.items == [one["item"] for one in answer["items"]]
    assert shown.candidates["price_now"] == [prices.get(name, 5.0) for name in shown.items]
    assert shown.candidates["badge"] == ["sale" if name in prices else None for name in shown.items]
    # A shadow ranks with the same values, so an equal model gives equal scores.
    assert _compared(_Job("e", service, shown), shown, None).drift == pytest.approx(0, abs=1e-6)


def proved(world: World, directory: Path, service: RankService) -> SkewReport:
    topics, metrics = Topics(), Metrics()
    log = LocalLog(directory / "log.db")
    log.create_topics(topics.partitions())
    sink = LogSink(lambda: LocalLog(directory / "log.db"), topics)
    asked = candidates(world.bundle, 20)
    with contextlib.closing(log), contextlib.closing(sink):
        with contextlib.closing(SkewSampler(sink, metrics, 1.0)) as sampler:
            for number in range(6):
                answer = service.rank(f"r0000{number}", asked, 5, {"device": "tv"})
                sampler.offer(f"r{number}", answer)
        records, unreadable = read_records(log, topics)
        assert (len(records), unreadable) == (6, 0)
        return prove(log, world.bundle, topics, records, snapshot=None, limits=SkewLimits())


def test_served_fields_are_proved_and_a_swapped_one_is_named(
    made: World, service: RankService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "right").mkdir()
    report = proved(made, tmp_path / "right", service)
    assert (report.requests, report.different) == (6, 0)
    right = request_frame

    def wrong(bundle: Bundle, catalogue: Catalogue, sent: Any, *given: Any, **more: Any) -> pl.DataFrame:
        reversed_prices = {**sent.fields, "price_now": sent.fields["price_now"][::-1]}
        if catalogue is service._catalogue:
            sent = replace(sent, fields=reversed_prices)
        return right(bundle, catalogue, sent, *given, **more)

    monkeypatch.setattr("models.bundle.request_features.request_frame", wrong)
    (tmp_path / "wrong").mkdir()
    report = proved(made, tmp_path / "wrong", service)
    assert {"event.price_now", "event.relative"} <= {one.feature for one in report.differences}
    assert "event.device" not in {one.feature for one in report.differences}
