"""Backfill: history from files is what the same messages sent by hand would be, each once, also after a crash."""

import contextlib
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.error import DatasetError
from features.jobs.messages import encode_rows, event_messages
from features.table import load_events
from streaming.backfill import send_history
from streaming.local import LocalLog
from streaming.log import EventLog, Message
from streaming.topic import Topics
from streaming.trainer import Trainer, TrainerOptions
from tests.integration.world import World

TOPICS = Topics()
# The last hundred or so of the synthetic events.
SINCE = 0.985


def _since(world: World) -> int:
    times = load_events(world.dataset).frame["time"]
    found = times.quantile(SINCE)
    assert found is not None
    return int(found) * 1_000_000


def _trained(log: EventLog, world: World) -> Any:
    options = TrainerOptions(batch=32, lateness_s=1e9)
    with contextlib.closing(Trainer(log, world.bundle, topics=TOPICS, options=options)) as trainer:
        while not trainer.drained():
            trainer.run_once(wait_s=0.3)
        step = trainer.step
        visits = {user: step.history.visits(user) for user in step.history.users().tolist()}
        return trainer.totals.events, step.ranker.table.weight.numpy().tobytes(), visits


def test_backfill_is_the_stream(world: World, tmp_path: Path) -> None:
    since = _since(world)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions())
        shards = event_messages(world.dataset, tmp_path / "backfill", start=since)
        sent = send_history(log, TOPICS.events, shards)
        by_backfill = _trained(log, world)
    rows = load_events(world.dataset).frame
    rows = rows.filter(pl.col("time") * 1_000_000 >= since).sort("time", maintain_order=True)
    assert sent == rows.height > 100
    with contextlib.closing(LocalLog(tmp_path / "by-hand.db")) as log:
        log.create_topics(TOPICS.partitions())
        log.append(TOPICS.events, [(None, value) for value in encode_rows(rows)])
        assert _trained(log, world) == by_backfill
    assert by_backfill[0] == sent


def test_a_backfill_that_was_cut_short_goes_on_and_sends_nothing_twice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.backfill._CHUNK", 30)
    shards = event_messages(world.dataset, tmp_path / "backfill", start=_since(world))
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions(2))
        whole, calls = log.append, 0

        def append(topic: str, messages: list[tuple[bytes | None, bytes]]) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                whole(topic, messages[:11])
                raise ConnectionError("cut off")
            whole(topic, messages)

        monkeypatch.setattr(log, "append", append)
        with pytest.raises(ConnectionError):
            send_history(log, TOPICS.events, shards)
        send_history(log, TOPICS.events, shards)
        assert send_history(log, TOPICS.events, shards) == 0
        found = [message for n in (0, 1) for message in _all(log, n)]
    expected = pl.concat([pl.read_parquet(shard) for shard in shards])["value"].to_list()
    assert sorted(message.value for message in found) == sorted(expected)
    assert len({message.key for message in found}) > 5


def _all(log: EventLog, partition: int) -> list[Message]:
    return list(log.read(TOPICS.events, partition, 0, log.end_offsets(TOPICS.events)[partition]))


def test_a_range_without_events_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no event lies in the range"):
        event_messages(world.dataset, tmp_path, start=1 << 60)
