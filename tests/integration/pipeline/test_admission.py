"""Admission, attention and content vectors: one rule and one score, trained, streamed and served."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from features.history import Jagged
from models.bundle.bundle import Bundle, write_bundle
from models.bundle.request_aggregates import answer
from models.bundle.request_features import request_events, sent_values
from models.ranker.train import predict
from models.table.batch import Assembler, Examples, aggregate_keys
from models.table.default_schema import TableOptions
from serving.ranking.service import RankService
from serving.store.memory import MemoryStore
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.trainer import TrainerOptions
from tessera.stream_service import StreamConnections, StreamService
from tests.build import coloured_parts

OPTIONS = {
    "mean": TableOptions(dim=4, admission=3),
    "attention": TableOptions(dim=4, admission=3, history="attention", chunks={"item_id": 2}),
    "content": TableOptions(dim=4, admission=3, content=True, budget=4_000),
}
NEW = {"item_id": "new", "text": "a red thing of kind1", "colour": "red"}


@dataclass
class Online:
    """A stream and a server over one store."""

    bundle: Bundle
    log: LocalLog
    stream: StreamService
    service: RankService

    def send(self, topic: str, *messages: dict[str, object]) -> None:
        self.log.append(topic, [(None, json.dumps(message).encode()) for message in messages])
        self.stream.drain()
        self.service.refresh()

    def event(self, item: str, time: int, user: str = "u0") -> None:
        self.send("events", {"user_id": user, "item_id": item, "time": time, "label": 1})

    def trained(self, user: str, items: list[str]) -> NDArray[np.float32]:
        """Returns the scores of the trainer's own table and catalogue."""
        step = self.stream.trainer.step
        catalogue, schema = step.catalogue, self.bundle.schema
        users, numbers = catalogue.number_users([user] * len(items)), catalogue.number_items(items)
        past = np.array(step.history.latest(int(users[0])), dtype=np.int64)
        same = np.zeros(len(items), dtype=np.int64)
        history = Jagged(past, np.array([0, len(past)])).take(same)
        rows = Examples(users, numbers, history, np.zeros(0, dtype=np.float32), same)
        keys = aggregate_keys(schema.aggregates, catalogue.users, catalogue.items, rows)
        rows = replace(rows, aggregates=answer(step.aggregates.state, keys, len(items), None)[0])
        sent = sent_values(self.bundle, {}, {}, 1)
        context = request_events(self.bundle, catalogue, sent, "", np.zeros(1, dtype=np.int64))
        source = Assembler(schema, catalogue.users, catalogue.items, context, catalogue.vectors)
        return predict(step.ranker, source, rows)

    def served(self, user: str, items: list[str]) -> list[float]:
        found = dict(self.service.rank(user, items, len(items)).items)
        return [found[name] for name in items]


@pytest.fixture(params=OPTIONS)
def online(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Online]:
    parts = coloured_parts(tmp_path, options=OPTIONS[request.param])
    bundle, store = write_bundle(parts, tmp_path / "bundle"), MemoryStore()
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        connections = StreamConnections.shared(log, store, topics=Topics())
        stream = StreamService(bundle, connections, TrainerOptions(batch=8)).open()
        with contextlib.closing(stream):
            yield Online(bundle, log, stream, RankService(bundle, store))


def admitted(online: Online, item: str) -> list[bool]:
    """Returns whether the item's id reads rows: in the trainer, in the server."""
    found = []
    for catalogue in (online.stream.trainer.step.catalogue, online.service._catalogue):
        _, count = catalogue.items.rows("item_id", catalogue.number_items([item]))
        found.append(bool(count[0]))
    return found


def test_a_new_item_reads_its_rows_after_as_many_events_as_the_rule_says(online: Online) -> None:
    online.send("items", NEW)
    for time in range(1_000, 1_002):
        online.event("new", time)
        assert admitted(online, "new") == [False, False]
    online.event("new", 1_002)
    assert admitted(online, "new") == [True, True]


def test_served_is_what_the_trainer_says_before_and_after_admission(online: Online) -> None:
    items = ["i0", "i1", "new", "i7"]
    online.send("items", NEW)
    for time in range(1_000, 1_004):
        np.testing.assert_allclose(online.served("u0", items), online.trained("u0", items), rtol=0, atol=1e-6)
        online.event("new", time)
        online.event("i1", time)
    np.testing.assert_allclose(online.served("u0", items), online.trained("u0", items), rtol=0, atol=1e-6)


def test_an_item_that_only_events_name_is_ranked_by_its_own_rows_once_admitted(online: Online) -> None:
    for time in range(1_000, 1_003):
        online.event("nameless", time)
    assert online.service.rank("u0", ["nameless"], 1).unknown_items == []
    assert admitted(online, "nameless") == [True, True]
    np.testing.assert_allclose(online.served("u0", ["nameless"]), online.trained("u0", ["nameless"]), atol=1e-6)


def test_a_restarted_trainer_and_a_fresh_server_admit_what_was_admitted(online: Online) -> None:
    for time in range(1_000, 1_003):
        online.event("nameless", time)
        online.event("shy", time) if time < 1_002 else None
    added = online.stream.trainer.step.catalogue.admission.added
    store = online.service._store
    online.stream.close()
    connections = StreamConnections.shared(online.log, store, topics=Topics())
    again = StreamService(online.bundle, connections, TrainerOptions(batch=8)).open()
    try:
        np.testing.assert_array_equal(again.trainer.step.catalogue.admission.added, added)
        fresh = Online(online.bundle, online.log, again, RankService(online.bundle, store))
        assert admitted(fresh, "nameless") == [True, True]
        assert admitted(fresh, "shy") == [False, False]
        fresh.event("shy", 1_009)
        assert admitted(fresh, "shy") == [True, True]
    finally:
        again.close()
