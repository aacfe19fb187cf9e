"""`doctor` names what is wrong and what to do; `status` says how things stand."""

import contextlib
import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from features import device
from features.storage.copy import files_below
from models.registry.release import CHAMPION
from serving.store.fill import fill_store
from streaming.log.topics import Topics
from streaming.trainer import TrainerOptions
from tessera.cli import operation
from tessera.cli.operation import Finding, diagnose, standing
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World
from tests.object_store import object_store
from tests.servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")


def found(settings: Settings) -> dict[str, Finding]:
    return {one.what: one for one in diagnose(settings)}


def test_a_new_home_is_sound_and_says_what_is_missing(tmp_path: Path) -> None:
    findings = found(Settings(home=tmp_path))
    assert not [one for one in findings.values() if one.level == "fault"]
    assert "tessera topics create" in findings["log"].remedy
    assert "tessera run" in findings["registry"].remedy
    assert "tessera keys add" in findings["keys"].remedy
    assert findings["store"].found.startswith("Redis ")
    assert findings["device"].level == "ok"
    assert "GB free for shared mirrors in " in findings["workers"].found


def test_too_little_memory_for_shared_mirrors_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "_LEAST_SHARED", 10**18)
    finding = found(Settings(home=tmp_path))["workers"]
    assert (finding.level, "--shm-size" in finding.remedy) == ("warning", True)


def test_the_partitions_of_a_stream_are_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, topics=Topics("", 4))
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
    assert "4 partitions, for up to 4 processes" in found(settings)["log"].found
    other = found(replace(settings, topics=Topics("", 2)))["log"]
    assert (other.level, other.remedy[:24]) == ("fault", "set TESSERA_PARTITIONS=4")


def test_an_object_store_is_written_and_a_missing_bucket_is_a_fault(tmp_path: Path) -> None:
    with object_store(f"b{uuid.uuid4().hex}") as store:
        sound = found(Settings(home=tmp_path, snapshots_at=f"{store}/snapshots"))["object store: TESSERA_SNAPSHOTS"]
        assert (sound.level, sound.found.startswith(f"{store}/snapshots: written and read in ")) == ("ok", True)
        assert files_below(store) == []
        wrong = found(Settings(home=tmp_path, snapshots_at="s3://none/x", exchange=f"{store}/exchange"))
        assert wrong["object store: TESSERA_EXCHANGE"].level == "ok"
        missing = wrong["object store: TESSERA_SNAPSHOTS"]
        assert (missing.level, "the store has no bucket 'none'; make it" in missing.found) == ("fault", True)
        assert "credentials may write" in missing.remedy
    # A directory is no object store, and is made by the first snapshot.
    assert not [name for name in found(Settings(home=tmp_path, snapshots_at=str(tmp_path))) if "object" in name]


def test_the_device_is_named_with_its_versions_or_with_the_part_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    monkeypatch.setattr(device, "missing_part", lambda **_: "torch finds no card")
    (processor,) = operation._device(settings)
    assert processor.level == "ok"
    assert processor.found == "processor; no GPU: torch finds no card"
    about = {"card": "H100", "memory_bytes": str(80 * 10**9), "cuda": "13.0", "torch": "2.13.0"}
    monkeypatch.setattr(device, "resolve", lambda *_: device.Device("cuda", about))
    monkeypatch.setattr(device.Device, "free_bytes", lambda _: 79 * 10**9)
    monkeypatch.setattr(operation, "version", {"fbgemm-gpu": "1.8.0"}.__getitem__)
    (card,) = operation._device(settings)
    assert card.found.startswith("H100, 80 GB, 79 GB free, CUDA 13.0, torch 2.13.0, driver ")
    assert card.found.endswith("fbgemm 1.8.0")


def test_what_does_not_answer_is_a_fault_with_a_remedy_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    findings = found(Settings(home=tmp_path, redis=f"redis://{nowhere}/0", storage="float8"))
    assert findings["store"].level == "fault"
    assert "TESSERA_REDIS" in findings["store"].remedy
    assert findings["home"].level == "ok"
    assert findings["log"].what == "log"


def test_a_damaged_champion_a_key_file_for_all_and_a_wrong_storage_are_faults(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage="float8", index="int4")
    settings.open_registry().publish(world.bundle, params={}, metrics={})
    (tmp_path / "keys.json").write_text("[]")
    findings = found(settings)
    assert "float32, float16, int8" in findings["storage"].remedy
    assert findings["index"].remedy == "set TESSERA_INDEX to one of float32, int8"
    assert findings[f"champion of {world.dataset.name}"].level == "ok"
    assert findings["store of the champion"].level == "warning"
    for path in (tmp_path / "bundles", tmp_path / "mlflow"):
        for table in path.rglob("table.safetensors"):
            table.write_bytes(b"broken")
    broken = found(replace(settings, storage="float32", index="int8"))
    assert "index" not in broken
    assert broken[f"champion of {world.dataset.name}"].level == "fault"
    assert "rollback" in broken[f"champion of {world.dataset.name}"].remedy
    (tmp_path / "keys.json").write_text('[{"name": "a", "sha256": "b", "scopes": ["read"], "created": 1}]')
    os.chmod(tmp_path / "keys.json", 0o644)
    assert found(settings)["keys"].remedy == f"chmod 600 {tmp_path / 'keys.json'}"


def test_status_says_versions_lag_and_freshness(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.open_registry().publish(world.bundle, params={}, metrics={})
    before = standing(settings, None, experiments=True)
    assert before["releases"][0]["aliases"] == (CHAMPION,)
    assert before["newest_delta_s"] is None
    assert before["experiments"] == []
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        fill_store(store, world.bundle)
        log.append(settings.topics.events, [(None, message) for message in world.messages(50)])
        options = TrainerOptions(batch=64, lateness_s=1e9)
        with StreamService(
            world.bundle, StreamConnections.shared(log, store, topics=settings.topics), options
        ) as stream:
            stream.drain()
        log.append(settings.topics.events, [(None, message) for message in world.messages(7)])
        after = standing(settings, None, experiments=False)
    assert after["lag"] == {"items": 0, "events": 7, "deltas": 0}
    assert 0 <= after["newest_delta_s"] < 60


def test_on_a_real_broker_marks_of_transactions_are_no_lag_and_the_newest_change_has_an_age(
    world: World, tmp_path: Path, kafka_address: str
) -> None:
    settings = Settings(home=tmp_path, kafka=kafka_address, topics=Topics(f"test-{uuid.uuid4().hex[:8]}-"))
    settings.open_registry().publish(world.bundle, params={}, metrics={})
    topics = settings.topics
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        log.create_topics(topics.partitions())
        log.append(topics.events, [(None, message) for message in world.messages(50)])
        options = TrainerOptions(batch=16, lateness_s=1e9)
        with StreamService(world.bundle, StreamConnections.shared(log, store, topics=topics), options) as stream:
            stream.drain()
        after = standing(settings, None, experiments=False)
    assert after["lag"] == {topics.items: 0, topics.events: 0, topics.deltas: 0}
    assert 0 <= after["newest_delta_s"] < 60


def test_a_store_that_does_not_answer_is_not_taken_for_one_that_is_empty(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, redis=f"redis://127.0.0.1:{free_port()}/0")
    settings.open_registry().publish(world.bundle, params={}, metrics={})
    assert "does not answer" in found(settings)["store of the champion"].found
