"""`tessera stream --follow`: every bundle of the release is trained, through publishing, promotion and retirement."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.log.topics import Topics
from streaming.shared.ledger import newest_entry
from tessera.follow.release import ReleaseWatch
from tessera.follow.service import FollowService
from tessera.settings import Settings
from tessera.stream_service import StreamConnections
from tests.integration.streaming.following import MODEL, OPTIONS, ReleaseUnderLoad
from tests.servers import until

ROUNDS = int(os.environ.get("FOLLOW_ROUNDS", "3"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.timeout(120 + 20 * ROUNDS),
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
            until(lambda wanted=wanted: set(follower.service.streams) == wanted, 20)
    # The last events come after the last change of the release.
    stage.send(100)
    with following(stage.settings):
        stage.settle()
        time.sleep(0.5)
    applied = stage.check()
    assert all(applied[bundle] > 0 for bundle in stage.aliased())
    assert applied[first.id] > 0
    assert max(waits) < 5
    print(f"first delta after publishing: median {sorted(waits)[len(waits) // 2]:.2f} s, most {max(waits):.2f} s")
    retired = [line for line in caplog.messages if "retired" in line]
    assert len(retired) >= ROUNDS - 2
    entry = newest_entry(stage.log, stage.settings.topics)
    assert entry is not None
    assert entry.ended
    assert {one.bundle for one in entry.bundles if one.roles} == set(stage.aliased())
