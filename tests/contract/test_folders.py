"""Folders appear whole, on disk and at every object store: complete or not there, and with the bytes that were sent."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from features.durable import write_directory
from features.errors import StorageError
from features.storage import copy, folders
from features.storage.copy import files_below
from features.storage.file import remove, stamps, write
from features.storage.folders import Folders, damage, fetch_folder, send_folder
from features.storage.location import Location, Remote, locate
from tests.object_store import google_store, object_store

RECORD = "manifest.json"
FILES = {"a": b"first", "inner/b": bytes(range(256)) * 40, "inner/deep/c": b""}


@pytest.fixture(scope="module")
def s3() -> Iterator[Remote]:
    with object_store("folders") as address:
        yield address


@pytest.fixture(scope="module")
def gs() -> Iterator[Remote]:
    with google_store("folders") as address:
        yield address


@pytest.fixture(params=["disk", "file", "memory", "renaming memory", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A shared folder of each kind: a directory by its path and its address, and addresses of stores."""
    if request.param in ("s3", "gs"):
        found: Location = request.getfixturevalue(request.param) / tmp_path.name
        return found
    if request.param in ("disk", "file"):
        return locate(f"{'file://' if request.param == 'file' else ''}{tmp_path}/shared")
    if request.param == "renaming memory":
        monkeypatch.setattr("features.storage.file._WHOLE", set())
    return locate(f"memory://{tmp_path.name}/{os.getpid()}")


@pytest.fixture
def store(place: Location) -> Remote:
    """The places that are object stores."""
    if not isinstance(place, Remote):
        pytest.skip("a directory has no copies")
    return place


def machine(place: Location, directory: Path) -> Folders:
    """The folders as a machine of its own sees them. A directory is shared by all machines."""
    return Folders(place, record=RECORD) if isinstance(place, Path) else Folders(directory, place, record=RECORD)


def filled(files: dict[str, bytes]) -> Callable[[Path], None]:
    def fill(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        (directory / RECORD).write_text(json.dumps({"files": hashes, "more": len(files)}))

    return fill


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_another_machine_gets_the_bytes_that_were_sent(place: Location, tmp_path: Path) -> None:
    first, second = machine(place, tmp_path / "one"), machine(place, tmp_path / "two")
    assert first.names() == second.names() == []
    for name in ("x", "y"):
        write_directory(first.directory / name, filled(FILES | {"name": name.encode()}))
        first.send(name)
    assert second.names() == ["x", "y"]
    for name in ("x", "y"):
        assert contents(second.fetch(name)) == contents(first.directory / name)
        assert second.read(name, "name") == name.encode()
    second.remove("x")
    assert second.names() == ["y"]
    assert machine(place, tmp_path / "three").names() == ["y"]


def test_a_damaged_folder_is_named_or_fetched_again(place: Location, tmp_path: Path) -> None:
    first, second = machine(place, tmp_path / "one"), machine(place, tmp_path / "two")
    write_directory(first.directory / "x", filled(FILES))
    first.send("x")
    directory = second.fetch("x")
    (directory / "inner/b").write_bytes(b"other")
    if isinstance(place, Path):
        with pytest.raises(StorageError, match=f"{place}/x/inner/b: a file was altered"):
            second.fetch("x")
        return
    assert contents(second.fetch("x")) == contents(first.directory / "x")
    write(place / "x/inner/b", b"other")
    assert second.fetch("x") == directory
    with pytest.raises(StorageError, match=f"{place}/x/inner/b: sha256 differs from {RECORD}; remove {place}/x"):
        machine(place, tmp_path / "three").fetch("x")
    assert not (tmp_path / "three/x").exists()
    remove(place / "x/inner/b")
    with pytest.raises(StorageError, match=f"{place}/x/inner/b is missing; remove {place}/x"):
        machine(place, tmp_path / "three").fetch("x")
    assert contents(tmp_path / "three") == {}


@pytest.mark.parametrize("count", range(4))
def test_an_interrupted_upload_is_not_there_and_the_next_completes_it(
    store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The upload ends after `count` files."""
    here = Folders(tmp_path / "one", store, record=RECORD)
    for name in ("x", "y"):
        write_directory(here.directory / name, filled(FILES))
    here.send("x")
    left = [count]

    def interrupted(pairs: list[tuple[Path, Remote]]) -> None:
        copy.transfer(pairs[: left[0]])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "transfer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.send("y")
    other = Folders(tmp_path / "two", store, record=RECORD)
    assert other.names() == ["x"]
    assert other.unfinished() == (["y"] if count else [])
    with pytest.raises(StorageError, match=f"y has no {RECORD}"):
        other.fetch("y")
    here.send("y")
    assert contents(other.fetch("y")) == contents(here.directory / "y")
    assert other.unfinished() == []


def test_a_folder_is_sent_once_and_replaced_whole(
    store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "old", filled(FILES))
    write_directory(tmp_path / "new", filled({"a": b"second", "d": b"more"}))
    send_folder(tmp_path / "old", store / "x", RECORD)
    before = stamps(files_below(store / "x"))
    send_folder(tmp_path / "old", store / "x", RECORD)
    assert stamps(files_below(store / "x")) == before
    seen: list[bool] = []

    def noted(pairs: list[tuple[Path, Remote]]) -> None:
        seen.append((store / "x" / RECORD).exists())
        copy.transfer(pairs)
        seen.append((store / "x" / RECORD).exists())

    with monkeypatch.context() as patch:
        patch.setattr(folders, "transfer", noted)
        send_folder(tmp_path / "new", store / "x", RECORD)
    assert seen == [False, False]
    assert contents(fetch_folder(store / "x", tmp_path / "copy", RECORD)) == contents(tmp_path / "new")
    assert [file.name for file in files_below(store / "x")] == ["a", "d", RECORD]
    # A copy of another content at the same place is replaced.
    send_folder(tmp_path / "old", store / "x", RECORD)
    assert contents(fetch_folder(store / "x", tmp_path / "copy", RECORD)) == contents(tmp_path / "old")


def test_machines_that_fetch_into_one_directory_do_not_disturb_each_other(store: Remote, tmp_path: Path) -> None:
    write_directory(tmp_path / "one", filled(FILES))
    send_folder(tmp_path / "one", store / "x", RECORD)
    faults: list[BaseException] = []

    def fetch() -> None:
        try:
            assert damage(fetch_folder(store / "x", tmp_path / "two", RECORD), RECORD) is None
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_record_names_no_file_outside_its_folder(store: Remote, tmp_path: Path, name: str) -> None:
    write(store / "x" / RECORD, json.dumps({"files": {name: "0" * 64}}).encode())
    with pytest.raises(StorageError, match=f"{store}/x/{RECORD}: names '{name}', which is outside its folder"):
        fetch_folder(store / "x", tmp_path / "copy", RECORD)


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_missing_bucket_is_named(protocol: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(protocol)
    address = Remote(f"{protocol}://none/x")
    write_directory(tmp_path / "y", filled(FILES))
    for work in (
        lambda: Folders(tmp_path / "one", address, record=RECORD).names(),
        lambda: send_folder(tmp_path / "y", address / "y", RECORD),
        lambda: write(address / "y", b""),
    ):
        with pytest.raises(StorageError, match=f"{protocol}://none/.*: the store has no bucket 'none'; make it"):
            work()


def test_without_the_store_the_folders_of_this_machine_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    s3fs.S3FileSystem.clear_instance_cache()
    here = Folders(tmp_path, Remote("s3://none/x"), record=RECORD)
    refused = r"^s3://none/x: the store failed \(.*127.0.0.1:1.*\); check the address, the network, and AWS_ENDPOINT"
    with pytest.raises(StorageError, match=refused):
        here.names()
    write_directory(tmp_path / "x", filled(FILES))
    assert here.names() == ["x"]
    assert here.fetch("x") == tmp_path / "x"
    assert "s3://none/x: the store failed" in caplog.text
    s3fs.S3FileSystem.clear_instance_cache()
