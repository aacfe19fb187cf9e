"""Backfill: history from files is what the same messages sent by hand would be, each once, also after a crash."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.dataset.tables import load_events
from features.errors import DatasetError
from features.jobs.messages import encode_rows, event_messages
from streaming.backfill import send_history
from streaming.log.protocol import EventLog, Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
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
        sent = send_history(log, TOPICS.events, shards, sent=tmp_path / "sent")
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
            send_history(log, TOPICS.events, shards, sent=tmp_path / "sent")
        send_history(log, TOPICS.events, shards, sent=tmp_path / "sent")
        assert send_history(log, TOPICS.events, shards, sent=tmp_path / "sent") == 0
        found = [message for n in (0, 1) for message in _all(log, n)]
    expected = pl.concat([pl.read_parquet(shard) for shard in shards])["value"].to_list()
    assert sorted(message.value for message in found) == sorted(expected)
    assert len({message.key for message in found}) > 5


def _all(log: EventLog, partition: int) -> list[Message]:
    return list(log.read(TOPICS.events, partition, 0, log.end_offsets(TOPICS.events)[partition]))


def test_a_range_without_events_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no event lies in the range"):
        event_messages(world.dataset, tmp_path, start=1 << 60)


def test_an_event_is_sent_once_whatever_its_file_is_called_and_whichever_ranges_overlap(tmp_path: Path) -> None:
    def events(*at: int, **more: list[object]) -> pl.DataFrame:
        return pl.DataFrame(
            {"user": [f"u{n}" for n in at], "item": [1] * len(at), "at": at, "label": [1] * len(at)} | more
        )

    (tmp_path / "data.toml").write_text(
        'name="data"\n[events]\npath="e-*.parquet"\nuser="user"\nitem="item"\ntime="at"\nlabel={column="label"}\n'
        '[split]\nby="random"\n'
    )
    # Two equal rows are two events.
    first, renamed = tmp_path / "e-1.parquet", tmp_path / "e-0.parquet"
    events(100, 200, 200, 300).write_parquet(first)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions(2))

        def send(start: int | None = None, stop: int | None = None, sent: str = "sent") -> int:
            dataset = load_dataset(tmp_path / "data.toml")
            shards = event_messages(dataset, tmp_path / "work", start=start, stop=stop)
            return send_history(log, TOPICS.events, shards, sent=tmp_path / sent)

        assert send(stop=250_000_000) == 3
        assert send(stop=250_000_000) == 0
        assert send(start=150_000_000) == 1
        os.utime(first)
        assert send() == 0
        first.rename(renamed)
        # Another type of the same value, and rows before and behind the ones that were there.
        events(50, 100, 200, 200, 300, 400).with_columns(pl.col("item").cast(pl.Float64)).write_parquet(renamed)
        assert send() == 2
        events(500).with_columns(pl.col("item").cast(pl.Float64)).write_parquet(tmp_path / "e-2.parquet")
        assert send(sent="lost") == 1
        messages = [json.loads(message.value) for n in (0, 1) for message in _all(log, n)]
    assert sorted(message["at"] for message in messages) == [50, 100, 200, 200, 300, 400, 500]
    assert len({message["_event_id"] for message in messages}) == 7


def test_ids_that_the_rows_have_are_kept_and_meet_those_of_messages(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        'name="data"\n[events]\npath="e.csv"\nuser="user"\nitem="item"\ntime="at"\nlabel={column="label"}\n'
        '[split]\nby="random"\n'
    )
    (tmp_path / "e.csv").write_text("user,item,at,label,_event_id\na,1,100,1,7\nb,2,200,1,8\nc,3,300,1,\n")
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(TOPICS.partitions())
        log.append(TOPICS.events, [(None, b'{"user": "a", "item": 1, "at": 100, "label": 1, "_event_id": 7}')])
        shards = event_messages(load_dataset(tmp_path / "data.toml"), tmp_path / "work")
        assert send_history(log, TOPICS.events, shards, sent=tmp_path / "sent") == 2
        found = [json.loads(message.value)["_event_id"] for message in _all(log, 0)]
    assert found[:2] == [7, "8"]
    assert len(found[2]) == 32
