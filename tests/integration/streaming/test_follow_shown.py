"""A follower whose events come from impressions: one joiner feeds all bundles, and a promotion hands it over."""

import contextlib
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from features.shown.message import Outcome, encode
from models.bundle.bundle import Bundle, load_bundle, write_manifest
from models.registry.release import CHALLENGER
from serving.rollout.lifecycle import promoted
from serving.store.lag import deltas_behind
from serving.store.verify import verify
from streaming.log.protocol import EventLog
from streaming.trainer import TrainerOptions
from tessera.follow.release import ReleaseWatch
from tessera.follow.service import FollowService
from tessera.pipeline.run import RunOptions, run
from tessera.settings import Settings
from tessera.stream_service import StreamConnections
from tests.integration.pipeline.test_learn_from_shown import START, described, visits, write
from tests.integration.world import quiet
from tests.servers import until

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
FILED, SHOWN = 2_000, 2_400


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A bundle of files of impressions, and its copy under another id."""
    directory = tmp_path_factory.mktemp("shown")
    write(directory, FILED)
    result = run(described(directory), directory / "run", RunOptions(), console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    copy = directory / "copy"
    shutil.copytree(result.bundle.directory, copy)
    write_manifest(copy, msgspec.structs.replace(result.bundle.manifest, metrics={"copy": True}))
    return result.bundle, load_bundle(copy)


def _show(log: EventLog, settings: Settings, now: list[int], start: int, stop: int) -> None:
    """Appends impressions with their outcomes, each at its own time."""
    chosen = [pair for number, pair in enumerate(visits(stop)) if number >= start]
    messages = [message for shown, done in chosen for message in (shown, *done)]
    for message in sorted(messages, key=lambda message: message.time_ms):
        now[0] = message.time_ms
        kind = settings.topics.outcomes if isinstance(message, Outcome) else settings.topics.impressions
        log.append(kind, [(b"key", encode(message))])


def test_a_promotion_hands_the_joiner_over_and_every_row_is_trained_once_by_each(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Log and joiner have the time of the impressions, and an hour later in the end, so that all windows close.
    now = [START]
    real = {name: getattr(time, name) for name in dir(time)}
    fake = SimpleNamespace(**real | {"time_ns": lambda: now[0] * 1_000_000})
    for module in ("streaming.log.sqlite", "streaming.shown.joiner"):
        monkeypatch.setattr(f"{module}.time", fake)
    settings = Settings(home=tmp_path)
    registry = settings.open_registry()
    champion, challenger = bundles
    for bundle in bundles:
        release = registry.publish(bundle, params={}, metrics={})
    registry.challenge(release, verdict={})
    trained = champion.manifest.trained_until
    assert trained is not None
    rows = {(shown.id, item) for shown, _ in visits(SHOWN) for item in shown.items if shown.time_ms * 1_000 > trained}
    watch = ReleaseWatch(registry, settings.bundles, None)
    service = FollowService(watch, StreamConnections.of(settings), TrainerOptions(wait_s=0.02, lateness_s=1e9))
    stop = threading.Event()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        _show(log, settings, now, 0, FILED + 100)
        thread = threading.Thread(target=service.run, args=(stop,))
        thread.start()
        try:
            until(lambda: len(service.metrics.streams()) == 2, 90)
            streams = service.metrics.streams()
            until(lambda: all(one.counts["events"] > 0 for one in streams.values()), 120)
            first = service._joiner
            assert first is not None
            assert first.id == champion.id
            promoted(registry, registry.resolve(None, CHALLENGER))
            until(lambda: service._joiner is not None and service._joiner.id == challenger.id, 90)
            _show(log, settings, now, FILED + 100, SHOWN)
            now[0] += 3_600_000
            until(lambda: all(one.counts["events"] >= len(rows) for one in streams.values()), 120)
            with contextlib.closing(settings.open_store()) as store:
                until(lambda: [deltas_behind(log, store, one, settings.topics)[0] for one in bundles] == [0, 0], 120)
        finally:
            stop.set()
            thread.join()
        assert [one.counts["events"] for one in streams.values()] == [len(rows)] * 2
        with contextlib.closing(settings.open_store()) as store:
            for bundle in bundles:
                assert verify(log, bundle, store, settings.topics).difference == ""
