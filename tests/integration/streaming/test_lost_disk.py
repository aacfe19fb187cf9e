"""A trainer that loses its machine goes on elsewhere from an object store, and ends with the same bits."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import moto.settings
import pytest
import s3fs

from features.errors import BundleError, StorageError, StreamError
from features.storage.file import write
from features.storage.folders import Folders, send_folder
from features.storage.location import Remote
from models.registry.fetch import fetch_bundle
from serving.leftover import leftovers
from streaming.forget.request import forget
from streaming.log.kafka import KafkaLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tests.integration.streaming.test_exactly_once import bits, drained, send
from tests.integration.world import World
from tests.object_store import object_store

RECORD = "manifest.json"
OPTIONS = TrainerOptions(batch=16, wait_s=0.0)
_MOST_S = 60.0


@pytest.fixture(scope="module")
def bucket() -> Iterator[Remote]:
    with object_store("lost") as address:
        yield address


@pytest.fixture
def store(bucket: Remote, topics: Topics) -> Iterator[Remote]:
    """A folder at the store of this test alone."""
    yield bucket / topics.prefix
    # A client keeps the address with which it was made.
    s3fs.S3FileSystem.clear_instance_cache()


def digest(home: Path, bundle: str) -> tuple[int, str]:
    """Returns the newest snapshot's number and the sha256 of its arrays: table, optimizer state, histories."""
    newest = max((home / "snapshots" / bundle).glob("[0-9]*"))
    with (newest / "arrays.safetensors").open("rb") as file:
        return int(newest.name), hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Yields the address of a server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class Place:
    """A machine: a home of its own, and the addresses of broker, store and topics."""

    def __init__(self, home: Path, kafka: str, topics: Topics, snapshots: str = "") -> None:
        self.home = home
        given = {"TESSERA_KAFKA": kafka, "TESSERA_TOPIC_PREFIX": topics.prefix, "TESSERA_SNAPSHOTS": snapshots}
        self._environment = os.environ | given | {"TESSERA_HOME": str(home)}

    def stream(self, bundle: str | Path, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tessera", "stream", "--role", "trainer", "--batch", "4", "--wait-ms", "300"]
        return subprocess.Popen(
            [*command, "--bundle", str(bundle), *arguments],
            env=self._environment,
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def once(self, bundle: str | Path) -> str:
        with self.stream(bundle, "--once") as done:
            assert done.stdout is not None
            said = done.stdout.read()
        assert done.returncode == 0, said
        return said


@pytest.mark.slow
def test_a_trainer_killed_with_its_disk_goes_on_elsewhere_to_the_same_bits(
    kafka_address: str, topics: Topics, world: World, store: Remote, tmp_path: Path
) -> None:
    calm = Topics(f"{topics.prefix}calm-")
    messages = world.messages(2_000)
    with contextlib.closing(KafkaLog(kafka_address)) as log:
        send(log, topics, messages)
        send(log, calm, messages)
    bundle = store / "run/publish/bundle"
    send_folder(world.bundle.directory, bundle, RECORD)
    copies = Folders(tmp_path / "none", store / "snapshots" / topics.prefix / world.bundle.id, record=RECORD)

    first = Place(tmp_path / "first", kafka_address, topics, f"{store}/snapshots")
    with first.stream(str(bundle), "--snapshot-s", "1") as running:
        give_up = time.monotonic() + 5 * _MOST_S
        while not copies.complete():
            assert running.poll() is None, running.stdout and running.stdout.read()
            assert time.monotonic() < give_up, "no snapshot came to the store"
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
    shutil.rmtree(first.home)
    sent = int(copies.complete()[-1])

    second = Place(tmp_path / "second", kafka_address, topics, f"{store}/snapshots")
    second.once(str(bundle))
    undisturbed = Place(tmp_path / "undisturbed", kafka_address, calm)
    undisturbed.once(world.bundle.directory)
    expected = digest(undisturbed.home, world.bundle.id)
    assert digest(second.home, world.bundle.id) == expected
    # It was killed before the end, and did not begin at the start of the log.
    assert sent < expected[0]
    assert (second.home / "snapshots" / world.bundle.id / f"{sent:015d}").is_dir()
    assert int(copies.complete()[-1]) == expected[0]


def test_a_half_sent_or_altered_snapshot_is_skipped(
    topics: Topics, world: World, store: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = store / "snapshots"
    snapshots = Snapshots(tmp_path / "one", address=address)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        send(log, topics, world.messages(64))
        with contextlib.closing(
            Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)
        ) as trainer:
            for _ in range(4):
                trainer.run_once()
                trainer.write_snapshot()
            expected = bits(trainer.step)
        copies = Folders(tmp_path / "none", address / world.bundle.id, record=RECORD)
        # The two newest are kept, here and at the store.
        assert [int(name) for name in copies.complete()] == [3, 4]
        (address / world.bundle.id / "000000000000004" / RECORD).read_bytes()
        write(address / world.bundle.id / "000000000000005/arrays.safetensors", b"half")
        write(address / world.bundle.id / "000000000000004/memory.msgpack", b"other")
        other = Snapshots(tmp_path / "two", address=address)
        found = other.newest(world.bundle)
        assert found is not None
        assert found.seq == 3
        assert "000000000000004/memory.msgpack: sha256 differs" in caplog.text
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=other)) as trainer:
            assert bits(trainer.step) == expected
            send(log, topics, world.messages(80)[64:])
            drained(trainer)
            trainer.write_snapshot()
        # The damaged one is replaced by newer ones, and the half one of the same number by a whole one.
        assert [int(name) for name in copies.complete()] == [4, 5]


def test_forgotten_users_leave_the_copies_too(topics: Topics, world: World, store: Remote, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "one", address=store / "snapshots")
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        new = json.loads(world.messages(1)[0]) | {"user_id": "user-of-the-stream"}
        send(log, topics, [json.dumps(new).encode()])
        with contextlib.closing(
            Trainer(log, world.bundle, topics=topics, options=OPTIONS, snapshots=snapshots)
        ) as trainer:
            drained(trainer)
            trainer.write_snapshot()
            forget(log, topics, ["user-of-the-stream"], by="test")
            elsewhere = Snapshots(tmp_path / "two", address=store / "snapshots")
            places = [one.name for one in leftovers(log, world.bundle, topics, tmp_path / "home", elsewhere)]
            assert f"{store}/snapshots/{world.bundle.id}/000000000000001" in places
            drained(trainer)
            trainer.write_snapshot()
        assert elsewhere.prune(world.bundle, 2) == 1
        places = [one.name for one in leftovers(log, world.bundle, topics, tmp_path / "home", elsewhere)]
        assert not [name for name in places if name.startswith("s3://")]


def test_a_slow_store_does_not_delay_the_stream_and_is_named(
    topics: Topics,
    world: World,
    store: Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = threading.Event()
    snapshots = Snapshots(tmp_path / "one", address=store / "snapshots")
    answer = s3fs.S3FileSystem._put_file

    async def slow(*given: object, **more: object) -> object:
        while not held.is_set():
            time.sleep(0.01)
        return await answer(*given, **more)

    with monkeypatch.context() as patch, contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        patch.setattr(s3fs.S3FileSystem, "_put_file", slow)
        send(log, topics, world.messages(96))
        options = replace(OPTIONS, snapshot_every_s=1e-9)
        with contextlib.closing(
            Trainer(log, world.bundle, topics=topics, options=options, snapshots=snapshots)
        ) as trainer:
            drained(trainer)
            assert trainer.step.seq == 6
            held.set()
            snapshots.await_sent(world.bundle.id)
    copies = Folders(tmp_path / "none", store / "snapshots" / world.bundle.id, record=RECORD)
    # The first was sent although newer ones had replaced it on disk, and of those that waited the newest.
    assert "was not sent" not in caplog.text
    assert int(copies.complete()[-1]) == 6
    assert len(copies.complete()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "refuses", "no bucket", "no server"])
def test_a_store_that_fails_is_named_within_a_minute_and_nothing_is_lost(
    fault: str, topics: Topics, world: World, store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "silent": "answers too slowly; check the network and the store, or allow more time by FSSPEC_S3",
        "refuses": r"the store failed \((The AWS Access Key Id|Forbidden).*\); check the address, and the credentials",
        "no bucket": "the store has no bucket 'none'; make it, or fix the address",
        "no server": "check the address, the network, and AWS_ENDPOINT_URL",
    }[fault]
    address = store / "snapshots" if fault != "no bucket" else Remote("s3://none/snapshots")
    own = {"TESSERA_HOME": str(tmp_path / "home"), "TESSERA_SNAPSHOTS": str(address)}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(LocalLog(tmp_path / "log.db")))
        send(log, topics, world.messages(64))
        snapshots = Snapshots(tmp_path / "one", address=address)
        trainer = stack.enter_context(contextlib.closing(Trainer(log, world.bundle, topics=topics, options=OPTIONS)))
        trainer._snapshots = snapshots
        if fault == "silent":
            monkeypatch.setenv("AWS_ENDPOINT_URL", stack.enter_context(silent_server()))
        elif fault == "refuses":
            monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        elif fault == "no server":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        s3fs.S3FileSystem.clear_instance_cache()
        trainer.run_once()
        began = time.monotonic()
        with pytest.raises(StreamError, match=rf"^snapshot {world.bundle.id}/0+1 was not sent \({address}.*{expected}"):
            trainer.write_snapshot()
        assert time.monotonic() - began < _MOST_S
        # The stream goes on, the snapshot is on this machine, and a later start finds it.
        drained(trainer)
        assert trainer.step.seq == 4
        found = snapshots.newest(world.bundle)
        assert found is not None
        assert found.seq == 1
    # On a machine without a snapshot the start ends, and names the store.
    command = [sys.executable, "-m", "tessera", "stream", "--role", "trainer", "--once"]
    done = subprocess.run(
        [*command, "--bundle", str(world.bundle.directory)],
        env=os.environ | own,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    if fault != "refuses":
        # The server asks for valid credentials in this process alone.
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert address.address in done.stderr.replace("\n", "")


def test_a_bundle_at_an_address_is_fetched_once_and_its_damage_is_named(
    world: World, store: Remote, tmp_path: Path
) -> None:
    address = store / "bundle"
    with pytest.raises(BundleError, match=f"{address}/{RECORD} is missing: no bundle is there, or its upload"):
        fetch_bundle(address, tmp_path / "bundles")
    send_folder(world.bundle.directory, address, RECORD)
    bundle = fetch_bundle(address, tmp_path / "bundles")
    assert (bundle.id, bundle.directory) == (world.bundle.id, tmp_path / "bundles" / world.bundle.id)
    before = (bundle.directory / RECORD).stat()
    assert (fetch_bundle(address, tmp_path / "bundles").directory / RECORD).stat() == before
    write(address / "items.parquet", b"other")
    fetch_bundle(address, tmp_path / "bundles")
    with pytest.raises(StorageError, match=f"{address}/items.parquet: sha256 differs from {RECORD}; remove {address}"):
        fetch_bundle(address, tmp_path / "others")
    write(address / RECORD, b"{}")
    with pytest.raises(BundleError, match=f"{address}/{RECORD}: "):
        fetch_bundle(address, tmp_path / "others")
