"""The running stream: it pauses while log or store are unavailable, continues, and stops for faults of its input."""

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tessera.stream_service
from features.errors import LogError, StoreError, StreamError
from serving.store.verify import verify
from serving.store.writer import StoreWriter, position_of
from streaming.log.sqlite import LocalLog
from streaming.metrics import StreamMetrics
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World

OPTIONS = TrainerOptions(batch=32, wait_s=0.02, lateness_s=1e9)


def _sent(settings: Settings, messages: list[bytes]) -> None:
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        log.append(settings.topics.events, [(None, message) for message in messages])


def _run(settings: Settings, world: World, gauges: StreamMetrics, *, events: int) -> None:
    """Until so many events were trained on, and a little longer, so that the store has them too."""
    stop, ticks, after = threading.Event(), iter(range(200)), iter(range(12))

    def tick() -> None:
        done = gauges.counts["events"] >= events and next(after, None) is None
        if done or next(ticks, None) is None:
            stop.set()

    StreamService(world.bundle, StreamConnections.of(settings), OPTIONS, metrics=gauges).run(stop, on_tick=tick)


def test_the_first_message_waits_for_no_library(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, gauges = Settings(home=tmp_path), StreamMetrics()
    _sent(settings, world.messages(40))
    loaded: list[int] = []
    monkeypatch.setattr(gauges, "prepare", lambda: loaded.append(gauges.counts["events"]))
    _run(settings, world, gauges, events=40)
    assert loaded == [0]
    # `prepare` loads all that `behind` computes with.
    code = (
        "import sys; from streaming.metrics import StreamMetrics; own = StreamMetrics(); own.prepare();"
        "before = set(sys.modules); own._seen.extend([(1.0, 0.3), (0.0, 0.1)]); own.behind({});"
        "print(*set(sys.modules) - before)"
    )
    assert subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], text=True).split() == []


def test_outages_of_log_and_store_are_waited_out(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, gauges = Settings(home=tmp_path), StreamMetrics()
    _sent(settings, world.messages(300))
    append, write, calls = LocalLog.write_messages, StoreWriter._write, {"log": 0, "store": 0}

    def failing_log(log: LocalLog, *arguments: object) -> None:
        calls["log"] += 1
        if calls["log"] in (3, 4):
            raise LogError("the broker is away")
        append(log, *arguments)  # type: ignore[arg-type]

    def failing_store(writer: StoreWriter, *arguments: object) -> None:
        calls["store"] += 1
        if calls["store"] == 1:
            raise StoreError("the store is away")
        write(writer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalLog, "write_messages", failing_log)
    monkeypatch.setattr(StoreWriter, "_write", failing_store)
    monkeypatch.setattr(tessera.stream_service, "_FIRST_PAUSE_S", 0.01)
    _run(settings, world, gauges, events=300)
    assert gauges.counts["outages"] == 3
    assert "away" in gauges.last_error
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        assert verify(log, world.bundle, store, settings.topics).difference == ""
    assert gauges.counts["events"] == 300
    loss, auc = gauges.progressive()
    assert 0 < loss < 2
    assert 0 <= auc <= 1
    metrics = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in gauges.registry.collect()
        for sample in family.samples
    }
    assert metrics["tessera_messages_total", ("events",)] == 300
    assert 0 < metrics["tessera_freshness_seconds_count", ("store",)] <= 300
    assert metrics["tessera_lag", ("events", "0")] == 0


def test_roles_run_once_one_after_the_other_leave_the_store_at_the_fold(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _sent(settings, world.messages(100))
    connections = StreamConnections.of(settings)
    totals = StreamService(world.bundle, connections, OPTIONS, roles=("trainer",)).once()
    assert totals.events == 100
    with contextlib.closing(settings.open_store()) as store:
        assert position_of(store, world.bundle.id, settings.topics.deltas) is None
    assert StreamService(world.bundle, connections, OPTIONS, roles=("writer",)).once().messages == 0
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        assert verify(log, world.bundle, store, settings.topics).difference == ""


def test_an_outage_ends_a_stream_that_runs_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    _sent(settings, world.messages(40))
    monkeypatch.setattr(StoreWriter, "_write", _away)
    with pytest.raises(StoreError, match="away"):
        StreamService(world.bundle, StreamConnections.of(settings), OPTIONS).once()


def _away(*_: object) -> None:
    raise StoreError("the store is away")


def test_a_wrong_topic_ends_the_run_with_its_reason(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    _sent(settings, [json.dumps({"metric": n}).encode() for n in range(400)])
    with pytest.raises(StreamError, match="Is this the right topic"):
        _run(settings, world, StreamMetrics(), events=400)
