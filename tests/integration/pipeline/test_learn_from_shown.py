"""A run and a stream learn from what was shown: files of impressions, then the topics."""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import load_events
from features.errors import DatasetError
from features.shown.message import Impression, Outcome, decode_impression, encode
from models.bundle.bundle import Bundle
from serving.api.app import AppParts, create_app
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import verify
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from streaming.log.protocol import Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.step_state import restore_step, snapshot_of
from tessera.cli.main import app
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.run import RunOptions, run
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import quiet

START = 1_700_000_000_000
EVENTS = """
name = "shown"
[events]
from = "impressions"
path = "shown.jsonl"
outcomes_path = "done.jsonl"
outcomes = ["click", "buy"]
window = "1m"
categorical = ["surface"]
[split]
by = "time"
"""
PLACED = EVENTS.replace('categorical = ["surface"]', 'placement = { position = "position", categorical = ["surface"] }')


def visits(count: int) -> Iterator[tuple[Impression, list[Outcome]]]:
    """Yields impressions, a second apart, with the clicks on them."""
    draw = random.Random(1)
    for number in range(count):
        at = START + 1_000 * number
        items = [f"i{draw.randrange(30)}" for _ in range(4)]
        shown = Impression(f"r{number}", f"u{draw.randrange(20)}", at, "b", "shown", items=items, surface="home")
        yield shown, [Outcome(shown.id, item, at + 5_000) for item in items if draw.random() < 0.3]


def described(directory: Path, text: str = EVENTS) -> Dataset:
    path = directory / "shown.toml"
    path.write_text(text)
    return load_dataset(path)


def write(directory: Path, count: int) -> None:
    pairs = list(visits(count))
    (directory / "shown.jsonl").write_bytes(b"\n".join(encode(shown) for shown, _ in pairs))
    (directory / "done.jsonl").write_bytes(b"\n".join(encode(one) for _, done in pairs for one in done))


@pytest.mark.parametrize("text", [EVENTS, PLACED], ids=["blind", "placed"])
def test_a_bundle_of_files_streams_the_topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(tmp_path, 2_000)
    # Clicks are drawn alike at all positions, so the run would leave the path out.
    options = RunOptions(placement="always")
    result = run(described(tmp_path, text), tmp_path / "run", options, console=quiet(), registry=None, until="publish")
    bundle = result.bundle
    assert bundle is not None
    examples = read_frame(tmp_path / "run" / "frame").examples
    # The last 660 s of the files have not closed.
    assert examples["time"].max() <= (START + 1_000 * 1_999 - 655_000) * 1_000  # type: ignore[operator]
    assert 0.2 < examples["label"].mean() < 0.4  # type: ignore[operator]
    now = [0]
    real = {name: getattr(time, name) for name in dir(time)}
    fake = SimpleNamespace(**real | {"time_ns": lambda: now[0] * 1_000_000})
    monkeypatch.setattr("streaming.log.sqlite.time", fake)
    log, store, topics = LocalLog(tmp_path / "log.db"), MemoryStore(), Topics("s")
    log.create_topics(topics.partitions())
    messages = [message for shown, done in visits(2_100) for message in (shown, *done)]
    for message in sorted(messages, key=lambda message: message.time_ms):
        now[0] = message.time_ms
        topic = topics.outcomes if isinstance(message, Outcome) else topics.impressions
        log.append(topic, [(b"key", encode(message))])
    now[0] = time.time_ns() // 1_000_000
    connections = StreamConnections.shared(log, store, topics=topics)
    totals = StreamService(bundle, connections).once()
    until = bundle.manifest.trained_until
    assert until is not None
    new = {(shown.id, item) for shown, _ in visits(2_100) for item in shown.items if shown.time_ms * 1_000 > until}
    assert totals.events == len(new)
    assert totals.bad == 0
    assert verify(log, bundle, store, topics).difference == ""
    assert StreamService(bundle, connections).once().events == 0
    assert_requests_name_their_surface(bundle, store)
    if text == PLACED:
        assert_the_place_enters_the_step_alone(bundle, topics)
    assert_a_restart_keeps_the_lag(bundle, topics)
    log.close()


def assert_a_restart_keeps_the_lag(bundle: Bundle, topics: Topics) -> None:
    """A history of impressions sees a label only once its window has closed, after a restart too."""
    before, after = Step(bundle, topics), Step(bundle, topics)
    assert before.history.lag == bundle.dataset.events.lag > 0
    restore_step(after, snapshot_of(before, deltas=(0,), inputs={}))
    assert after.history.lag == before.history.lag


def assert_the_place_enters_the_step_alone(bundle: Bundle, topics: Topics) -> None:
    """The step learns from the logit at the place. A server's scores have the constant of the bundle."""
    assert bundle.schema.placement[0].positions == 4
    assert bundle.schema.placement[1].vocabulary == ("home",)
    at_home = bundle.rank("u1", ["i1", "i2"], context={"surface": "home"})
    assert np.array_equal(at_home, bundle.rank("u1", ["i1", "i2"]))
    logits, moved = {}, {}
    for position in (0, 3, None):
        step = Step(bundle, topics)
        path = step.ranker.network.placement
        path.weight.zero_()
        path.weight[1] = 0.25
        before = step.ranker.table.weight.detach().clone()
        row = {"user": "u1", "item": "i1", "time": START + 10**7, "surface": "home", "click": 1, "position": position}
        event = Message(topics.events, 0, 0, b"u1", msgspec.json.encode(row), START + 10**7)
        outcome = step.apply([event])
        assert not outcome.bad
        logits[position] = float(outcome.logits[0])
        moved[position] = float((step.ranker.table.weight.detach() - before).abs().sum())
    # The gain of the path is 16, and the cell of the first position alone is not 0.
    assert logits[0] - logits[3] == pytest.approx(4.0, abs=1e-4)
    assert logits[3] == logits[None]
    # A click at a position that users look at says less about the item.
    assert 0 < moved[0] < moved[3]


def assert_requests_name_their_surface(bundle: Bundle, store: MemoryStore) -> None:
    """An impression of a server has the surface that the ranking read, and no caller can give a position."""
    sink = Kept()
    parts = AppParts()
    recorder = Recorder(sink, parts.metrics)
    parts = replace(parts, recorder=recorder)
    with TestClient(create_app(Router(RankService(bundle, store)), parts)) as client:
        body = {"user": "u1", "candidates": ["i1", "i2"]}
        assert client.post("/v1/rank", json={**body, "context": {"surface": "home"}}).status_code == 200
        assert client.post("/v1/rank", json=body).status_code == 200
        assert client.post("/v1/rank", json={**body, "context": {"position": 0}}).status_code == 422
    recorder.close()
    shown = [decode_impression(message) for message in sink.messages]
    assert [one.surface for one in shown if isinstance(one, Impression)][:2] == ["home", ""]


class Kept:
    """Keeps appended messages."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def append(self, kind: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
        self.messages += [message for _, message in messages]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('outcomes_path = "done.jsonl"', "", "needs outcomes_path"),
        ('window = "1m"', 'window = "0m"', "window: '0m' is no duration"),
        ('"buy"]', '"item"]', "'item' is the name of a column that each row has"),
        ('"buy"]', '"click"]', "names a kind more than once"),
        ('"buy"]', '"buy"]\nlabel = { column = "bye" }', "'bye' is no kind of outcome; the nearest is 'buy'"),
        ('["surface"]', '["buy"]', "an outcome is a label and no feature"),
        ('["surface"]', '["device"]', "rows of impressions lack it"),
        ('["surface"]', '["position"]', "would leak into the scores; write it as position"),
        ('["surface"]', '["surface"]\nplacement = {}', "placement names no column"),
        ('["surface"]', '["surface"]\nplacement = { categorical = ["surface"] }', "declared for another use too"),
        (
            '["surface"]',
            '[]\nplacement = { categorical = ["device"] }',
            "no column 'device'; there are position, surface",
        ),
        ('["surface"]', '[]\nplacement = { categorical = ["position"] }', "'position' is a number; write position ="),
        ('["surface"]', '[]\nplacement = { position = "surface" }', "'surface' is no number; write position ="),
        ('["surface"]', '[]\nplacement = { position = "position", first = 1 }', "are counted from 0; remove first"),
        ('["surface"]', '[]\nplacement = { position = "position", explore = 2 }', "less than or equal to 1"),
        ('["surface"]', '[]\nplacement = { place = "position" }', "unknown key 'place'"),
        ('window = "1m"', 'item = "sku"', "has the columns user, item and time"),
        ("[split]", '[aggregates]\nctr = { by = "item", value = "rate" }\n[split]', "before the outcome happened"),
        ('"shown.jsonl"', '"shown.csv"', "reads jsonl or parquet"),
    ],
)
def test_an_unusable_descriptor_is_refused_by_name(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(DatasetError) as refused:
        described(tmp_path, EVENTS.replace(old, new))
    assert said in str(refused.value)


def test_files_that_cannot_be_joined_are_refused_by_name(tmp_path: Path) -> None:
    dataset = described(tmp_path)
    with pytest.raises(DatasetError, match=r"shown.jsonl: \[events\] no such file"):
        load_events(dataset)
    write(tmp_path, 10)
    with pytest.raises(DatasetError, match="no impression has closed"):
        load_events(dataset)
    (tmp_path / "done.jsonl").write_text('{"item": "x"}\n')
    with pytest.raises(DatasetError, match=r"done.jsonl: \[events\] row 1: no outcome: .*impression"):
        load_events(dataset)
    (tmp_path / "done.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"done.jsonl: \[events\] no such file"):
        load_events(dataset)


def test_propensities_come_from_explored_impressions_alone(tmp_path: Path) -> None:
    examined, draw = (0.9, 0.3, 0.3), random.Random(2)
    shown, done = [], []
    for number in range(3_000):
        items = [f"i{place}" for place in range(3)]
        first = draw.randrange(2)
        explored = [first, first + 1] if number % 2 else []
        if explored and draw.random() < 0.5:
            items[first], items[first + 1] = items[first + 1], items[first]
        one = Impression(f"r{number}", "u", START + 1_000 * number, "b", "m", items=items, explored=explored)
        shown.append(one)
        for place, item in enumerate(items):
            if draw.random() < examined[place] * (0.9, 0.4, 0.2)[int(item[1:])]:
                done.append(Outcome(one.id, item, one.time_ms + 5_000))
    (tmp_path / "shown.jsonl").write_bytes(b"\n".join(map(encode, shown)))
    (tmp_path / "done.jsonl").write_bytes(b"\n".join(map(encode, done)))
    described(tmp_path, PLACED)
    asked = ["propensities", str(tmp_path / "shown.toml"), "--json"]
    answer = json.loads(CliRunner().invoke(app, asked).stdout)
    curve = {row["position"]: row for row in answer["propensities"]}
    assert curve[0]["value"] == 1.0
    for position in (1, 2):
        assert curve[position]["low"] < examined[position] / examined[0] < curve[position]["high"]
    (tmp_path / "shown.jsonl").write_bytes(b"\n".join(encode(replace_explored(one)) for one in shown))
    text = CliRunner().invoke(app, asked[:-1]).stdout
    assert "no exploration: not estimable" in text


def replace_explored(one: Impression) -> Impression:
    return msgspec.structs.replace(one, explored=[])


def test_a_server_explores_some_answers_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, 1_500)
    placed = described(tmp_path, PLACED.replace('"position", ', '"position", explore = 1.0, '))
    made = run(placed, tmp_path / "run", RunOptions(), console=quiet(), registry=None, until="publish")
    assert made.bundle is not None
    sink, store = Kept(), MemoryStore()
    fill_store(store, made.bundle)
    parts = AppParts()
    recorder = Recorder(sink, parts.metrics)
    parts = replace(parts, recorder=recorder)
    with TestClient(create_app(Router(RankService(made.bundle, store)), parts)) as client:
        body = {"user": "u1", "candidates": ["i1", "i2", "i3"]}
        answers = [client.post("/v1/rank", json=body).json() for _ in range(40)]
    recorder.close()
    shown = {one.id: one for one in map(decode_impression, sink.messages) if isinstance(one, Impression)}
    swaps = 0
    for answer in answers:
        one = shown[answer["impression"]]
        assert [item["item"] for item in answer["items"]] == one.items
        assert one.explored in ([0, 1], [1, 2])
        ordered = sorted(one.scores, reverse=True)
        moved = [place for place in range(3) if one.scores[place] != ordered[place]]
        assert moved in ([], one.explored)
        swaps += bool(moved)
    assert 0 < swaps < 40
    bundle = CliRunner().invoke(
        app, ["propensities", str(tmp_path / "shown.toml"), "--bundle", str(made.bundle.directory)]
    )
    assert "a server adds the constant" in bundle.stdout
    assert "no exploration: not estimable" in bundle.stdout
