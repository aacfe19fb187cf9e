"""`tessera stream --follow`: every bundle of the release is trained, through publishing, promotion and retirement."""

import contextlib
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from features.errors import FencedError
from models.bundle.bundle import Bundle
from serving.rollout.lifecycle import parse_ramp, start, stop
from serving.store.page import key_of
from serving.store.redis.store import RedisStore
from serving.store.writer import filling_of
from streaming.dead_letter import move_waiting, put_back, read_dead_letters, waiting
from streaming.log.topics import Topics
from streaming.shared.ledger import FollowedBundle, FollowEntry, FollowLedger, newest_entry
from tessera import stream_service
from tessera.cli.main import app
from tessera.cli.operation import standing
from tessera.follow import lease, service
from tessera.follow.release import ReleaseWatch
from tessera.follow.report import what_is_followed
from tessera.follow.service import FollowService
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.streaming.following import MODEL, OPTIONS, ReleaseUnderLoad
from tests.servers import until

ROUNDS = int(os.environ.get("FOLLOW_ROUNDS", "3"))
KILLS = int(os.environ.get("FOLLOW_KILLS", "2"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.timeout(600 + 20 * (ROUNDS + KILLS)),
]


@pytest.fixture(params=["embedded", "kafka"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, topics: Topics) -> Iterator[ReleaseUnderLoad]:
    """A release on each kind of log."""
    kafka = "" if request.param == "embedded" else request.getfixturevalue("kafka_address")
    settings = Settings(home=tmp_path / "home", kafka=kafka, topics=topics)
    with contextlib.closing(ReleaseUnderLoad(settings, tmp_path)) as stage:
        yield stage


class Follower:
    """A service in a thread."""

    def __init__(self, settings: Settings) -> None:
        watch = ReleaseWatch(settings.open_registry(create=False), settings.bundles, MODEL)
        self.service = FollowService(watch, StreamConnections.of(settings), OPTIONS)
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.service.run(self.stop)
        except BaseException as error:
            self.error = error

    def start(self) -> "Follower":
        self.thread.start()
        return self

    def state(self, bundle: Bundle) -> FollowedBundle:
        return self.service.metrics.states.get(bundle.id, FollowedBundle(""))

    def end(self) -> None:
        self.stop.set()
        self.thread.join()


@contextlib.contextmanager
def following(settings: Settings) -> Iterator[Follower]:
    follower = Follower(settings).start()
    try:
        yield follower
    finally:
        follower.end()
    if follower.error is not None:
        raise follower.error


def test_releases_under_load_lose_no_event_and_double_none(
    stage: ReleaseUnderLoad, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tessera.follow")
    stage.trained = True
    first = stage.publish()
    waits: list[float] = []
    with following(stage.settings) as follower, stage.load():
        stage.await_delta(first)
        for number in range(ROUNDS):
            end = max(stage.log.end_offsets(stage.settings.topics.deltas).values())
            challenger = stage.publish()
            began = time.monotonic()
            stage.await_delta(challenger, end)
            waits.append(time.monotonic() - began)
            stage.promote()
            if number % 3 == 0:
                stage.roll_back()
            if number % 3 == 1:
                stage.publish()
                time.sleep(0.3)
                stage.retire_challenger()
            wanted = set(stage.aliased())
            until(lambda wanted=wanted: set(follower.service.streams) == wanted, 90)
    # The last events come after the last change of the release.
    stage.send(100)
    with following(stage.settings):
        stage.settle()
        time.sleep(0.5)
    applied = stage.check()
    assert all(applied[bundle] > 0 for bundle in stage.aliased())
    assert applied[first.id] > 0
    assert max(waits) < 30
    middle, tenth = np.percentile(waits, [50, 90])
    count = sum(applied.values())
    print(f"{len(waits)} rounds, {stage.sent:,} events sent, {count:,} applied in {len(applied)} tables; first delta")
    print(f"after publishing: median {middle:.2f} s, p90 {tenth:.2f} s, most {max(waits):.2f} s")
    retired = [line for line in caplog.messages if "retired" in line]
    assert len(retired) >= ROUNDS - 2
    entry = newest_entry(stage.log, stage.settings.topics)
    assert entry is not None
    assert entry.ended
    assert {one.bundle for one in entry.bundles if one.roles} == set(stage.aliased())


class Worker:
    """`tests.chaos.follow_worker` over a stage."""

    def __init__(self, stage: ReleaseUnderLoad) -> None:
        settings = stage.settings
        addresses = {"TESSERA_HOME": str(settings.home), "TESSERA_TOPIC_PREFIX": settings.topics.prefix}
        self._environment = os.environ | addresses | {"TESSERA_KAFKA": settings.kafka, "MLFLOW_TRACKING_URI": ""}
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.follow_worker", *arguments]
        self.process = subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_a_follower_killed_at_any_handover_resumes_as_if_undisturbed(stage: ReleaseUnderLoad) -> None:
    stage.trained = True
    first, worker, chance = stage.publish(), Worker(stage), random.Random(KILLS)
    worker.start()
    try:
        with stage.load(every_s=0.1):
            stage.await_delta(first)
            for number in range(KILLS):
                stage.publish()
                time.sleep(chance.uniform(0, 0.6))
                (stage.promote, stage.retire_challenger, stage.promote)[number % 3]()
                if number % 3 == 2:
                    stage.roll_back()
                time.sleep(chance.uniform(0, 0.6))
                worker.kill()
                worker.start(*([f"die={0.02}", f"seed={number}"] if number < KILLS - 1 else []))
                if not worker.alive():
                    worker.start()
        if not worker.alive():
            worker.start()
        stage.send(50)
        stage.settle()
        stage.await_written()
    finally:
        worker.kill()
    applied = stage.check()
    assert all(applied[bundle] > 0 for bundle in stage.aliased())
    assert applied[first.id] > 0


def test_of_two_followers_the_newer_one_goes_on_and_the_older_one_says_why(
    stage: ReleaseUnderLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EVERY_S", 0.5)
    first = stage.publish()
    stage.send(50)
    older = Follower(stage.settings).start()
    stage.await_delta(first)
    with following(stage.settings) as newer:
        # No event comes, so the ledger alone tells the older one.
        until(lambda: older.error is not None, 90)
        assert isinstance(older.error, FencedError)
        assert "another `tessera stream --follow` follows coloured" in str(older.error)
        assert not newer.error
        older.end()
        stage.send(50)
        stage.settle()
        time.sleep(0.5)
    assert stage.check() == {first.id: 100}


def test_a_plain_stream_of_a_followed_bundle_ends_the_follower_by_name(
    stage: ReleaseUnderLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_service, "_CONFIRM_S", 0.5)
    stage.publish()
    challenger = stage.publish()
    stage.send(50)
    follower = Follower(stage.settings).start()
    stage.await_delta(challenger)
    with StreamService(challenger, StreamConnections.of(stage.settings), OPTIONS) as plain:
        plain.drain()
        # The follower is idle, and learns it when it confirms its positions.
        until(lambda: follower.error is not None, 90)
        assert isinstance(follower.error, FencedError)
        assert f"bundle {challenger.id}: another stream trains it now" in str(follower.error)
        follower.end()
        stage.send(50)
        plain.drain()
    with following(stage.settings):
        stage.settle()
        time.sleep(0.5)
    assert set(stage.check().values()) == {100}


def test_a_bundle_that_vanishes_is_named_and_its_stream_goes_on(
    stage: ReleaseUnderLoad, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_CHECK_S", 1.0)
    monkeypatch.setattr(lease, "EVERY_S", 0.2)
    champion = stage.publish()
    challenger = stage.publish()
    stage.send(50)
    cache, artifacts = stage.settings.bundles / challenger.id, stage.settings.home / "mlflow"
    with following(stage.settings):
        stage.await_delta(challenger)
        stage.await_store(challenger)
        shutil.rmtree(cache)
        until(lambda: f"{challenger.id}: its files vanished and were fetched again" in caplog.text, 90)
        assert (cache / "manifest.json").is_file()
        artifacts.rename(artifacts.with_name("aside"))
        shutil.rmtree(cache)
        until(lambda: challenger.id in _warned(stage, "its files vanished, and cannot be fetched"), 90)
        stage.send(50)
        stage.settle()
    # A start without the files: the other bundle is trained, and the vanished one waits by name.
    stage.send(50)
    with following(stage.settings) as follower:
        until(lambda: follower.state(challenger).state == "paused", 90)
        assert follower.state(challenger).roles == ("challenger",)
        until(lambda: follower.state(champion).counts.get("events", 0) >= 50, 90)
        until(lambda: challenger.id in _warned(stage, ""), 90)
    artifacts.with_name("aside").rename(artifacts)
    with following(stage.settings):
        stage.settle()
        time.sleep(0.5)
    assert stage.check() == {champion.id: 150, challenger.id: 150}


def _warned(stage: ReleaseUnderLoad, why: str) -> set[str]:
    """Returns the bundles that the ledger says something about."""
    entry = newest_entry(stage.log, stage.settings.topics)
    assert entry is not None
    return {one.bundle for one in entry.bundles if one.why and why in one.why}


def test_a_challenger_that_the_events_do_not_fit_ends_alone(stage: ReleaseUnderLoad) -> None:
    champion, challenger = stage.publish(), stage.publish(label="other")
    stage.send(300)
    with following(stage.settings) as follower:
        stage.await_delta(champion)
        until(lambda: challenger.id in _warned(stage, "Is this the right topic"), 60)
        stage.send(50)
        until(lambda: follower.state(champion).counts.get("events", 0) >= 350, 90)
        stage.retire_challenger()
        until(lambda: set(follower.service.streams) == {champion.id}, 90)
    assert stage.check()[champion.id] == 350


def test_bundles_that_experiments_name_are_followed_too(stage: ReleaseUnderLoad) -> None:
    champion, challenger = stage.publish(), stage.publish()
    stage.retire_challenger()
    start(stage.registry, MODEL, "2", parse_ramp(None, 0.1), name="test")
    watch = ReleaseWatch(stage.registry, stage.settings.bundles, MODEL)
    wanted = watch.changed()
    assert wanted is not None
    assert {bundle: one.roles for bundle, one in wanted.items()} == {
        champion.id: ("champion", "experiment"),
        challenger.id: ("experiment",),
    }
    assert watch.changed() is None
    stop(stage.registry, MODEL, "test", why="the test")
    assert list(watch.changed() or {}) == [champion.id]


def test_a_rollback_finds_the_rows_of_the_champion_before_in_the_store(
    stage: ReleaseUnderLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_KEEP_S", 0.5)
    first, _ = stage.publish(), stage.publish()
    stage.send(50)
    with following(stage.settings), contextlib.closing(stage.settings.open_store()) as store:
        stage.settle()
        stage.promote()
        assert isinstance(store, RedisStore)
        filling = filling_of(store, first.id)
        # A server that swapped to the new champion lets the champion before go.
        store.expire(first.id, after_s=600)
        redis, mark = store._redis, key_of(first.id, "table")
        until(lambda: redis.command(first.id, "PTTL", mark) == -1, 90)
        stage.send(50)
        stage.settle()
        assert filling is not None
        assert filling_of(store, first.id) == filling
        stage.roll_back()
        stage.send(50)
        stage.settle()
        time.sleep(0.5)
    assert stage.check()[first.id] == 150


def test_once_drains_the_topics_for_each_bundle(stage: ReleaseUnderLoad) -> None:
    first, second = stage.publish(), stage.publish()
    stage.send(70)
    watch = ReleaseWatch(stage.registry, stage.settings.bundles, MODEL)
    totals = FollowService(watch, StreamConnections.of(stage.settings), OPTIONS).once()
    assert {bundle: one.events for bundle, one in totals.items()} == {first.id: 70, second.id: 70}
    assert stage.check() == {first.id: 70, second.id: 70}


def test_a_message_that_two_bundles_cannot_use_is_put_back_once(stage: ReleaseUnderLoad) -> None:
    stage.publish()
    stage.publish()
    topics, connections = stage.settings.topics, StreamConnections.of(stage.settings)
    watch = ReleaseWatch(stage.registry, stage.settings.bundles, MODEL)
    stage.send(30)
    stage.log.append(topics.events, [(b"u1", b'{"user_id": "u1"}'), (b"u2", b'{"user_id": "u2"}')])
    FollowService(watch, connections, OPTIONS).once()
    letters = read_dead_letters(stage.log, topics)
    assert len(letters) == 4
    assert len({one.letter.bundle for one in letters}) == 2
    fixed = {one.number: b'{"user_id": "u1", "item_id": "i1", "time": 1, "label": 1}' for one in letters[:1]}
    numbers = [one.number for one in letters]
    assert put_back(stage.log, topics, numbers, fixed) == [
        numbers[0],
        next(one.number for one in letters if one.letter.offset != letters[0].letter.offset),
    ]
    assert put_back(stage.log, topics, numbers, {}) == []
    assert [one.waits for one in read_dead_letters(stage.log, topics)] == [False] * 4
    assert waiting(stage.log, topics, "invalid") == set()
    # Letters that were moved to the end of their topic can still be put back.
    watch = ReleaseWatch(stage.registry, stage.settings.bundles, MODEL)
    FollowService(watch, connections, OPTIONS).once()
    late = sorted(waiting(stage.log, topics, "invalid"))
    assert len(late) == 2
    move_waiting(stage.log, topics, late[-1] + 1, changed={})
    moved = waiting(stage.log, topics, "invalid")
    assert len(moved) == 2
    assert len(put_back(stage.log, topics, moved, {})) == 1


def test_doctor_and_status_name_what_is_followed_and_what_is_not(stage: ReleaseUnderLoad) -> None:
    settings = stage.settings
    champion = stage.publish()
    assert what_is_followed(settings) == []
    stage.send(60)
    with following(settings) as follower:
        until(lambda: follower.state(champion).counts.get("events") == 60, 90)
        until(lambda: newest_entry(stage.log, settings.topics) is not None, 90)
        follower.service._note(due=True)
        [(level, found, _)] = what_is_followed(settings)
        assert level == "ok"
        assert re.fullmatch(rf"{champion.id} \(champion\): training, batch \d+, lag \d+", found)
        text = generate_latest(follower.service.metrics.registry).decode()
        assert f'tessera_messages_total{{bundle="{champion.id}",kind="events"}} 60.0' in text
        assert f'tessera_followed{{bundle="{champion.id}",role="champion",state="training"}} 1.0' in text
    [state] = standing(settings, MODEL, experiments=False)["followed"]
    assert state["bundle"] == champion.id
    assert state["seq"] >= 1
    assert {tuple(one) for one in state["positions"]} >= {(settings.topics.events, 0, 60)}
    [(level, found, remedy)] = what_is_followed(settings)
    assert level == "warning"
    assert "has ended" in found
    assert "tessera stream --follow" in remedy
    challenger = stage.publish()
    with contextlib.closing(FollowLedger(stage.log, settings.topics)) as ledger:
        paused = FollowedBundle(champion.id, ("champion",), "paused", "no file")
        ledger.write(FollowEntry(time.time(), "host:1", MODEL, (paused,), registry="no answer"))
        levels = [(level, found.partition(":")[0]) for level, found, _ in what_is_followed(settings)]
        assert levels == [
            ("fault", f"{champion.id} (champion)"),
            ("warning", "the follower cannot read the registry"),
            ("warning", f"{challenger.id} (challenger) is not trained yet"),
        ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--processes", "2"], "one process trains all bundles; leave out --processes"),
        (["--rank", "0"], "leave out --processes and --rank"),
        (["--bundle", "out"], "the registry names the bundles; leave out --bundle"),
    ],
)
def test_what_does_not_go_with_follow_is_refused_by_name(options: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["stream", "--follow", *options])
    assert result.exit_code != 0
    assert named in str(result.exception)
