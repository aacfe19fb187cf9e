"""A file means the same on disk and at a store, and an address that cannot be used is refused by name."""

import os
import sys
import time
from pathlib import Path

import pytest
from fsspec.registry import _registry

from features.errors import StorageError, TesseraError
from features.storage.copy import files_below, local_directory, local_file, transfer, upload
from features.storage.file import make_directory, matching, names, read_part, remove, size_bytes, stamp, stamps, write
from features.storage.location import Location, Remote, absolute, locate, refuse_address


@pytest.fixture(params=["disk", "store", "renaming store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "disk":
        return tmp_path / "folder"
    if request.param == "renaming store":
        monkeypatch.setattr("features.storage.file._WHOLE", set())
    found = locate(f"memory://{tmp_path.name}/{os.getpid()}")
    assert isinstance(found, Remote)
    return found


def test_files_are_written_listed_read_and_removed(folder: Location) -> None:
    assert names(folder) == []
    assert not folder.exists()
    make_directory(folder)
    for name, content in (("b", b"0123456789"), ("a", b"first"), ("a", b"second")):
        write(folder / name, content)
    write(folder / "c", lambda path: path.write_bytes(b"filled"))  # type: ignore[arg-type,return-value]
    assert names(folder) == ["a", "b", "c"]
    assert [(folder / name).read_bytes() for name in "ac"] == [b"second", b"filled"]
    assert read_part(folder / "b", 3, 4) == b"3456"
    assert size_bytes(folder / "b") == 10
    assert (folder / "a").is_file()
    assert folder.is_dir()
    assert not folder.is_file()
    assert (folder / "a").name == "a"
    assert (folder / "a").parent == folder
    remove(folder / "a")
    remove(folder / "a")
    assert names(folder) == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        (folder / "a").read_bytes()
    remove(folder)
    assert not folder.exists()


def test_a_glob_names_files_in_order(folder: Location) -> None:
    for name in ("x-2.csv", "x-10.csv", "y-1.csv", "deep/x-3.csv", "deep/other/x-4.csv"):
        make_directory((folder / name).parent)
        write(folder / name, b"1")
    base = Path("/")
    assert matching(f"{folder}/x-*.csv", base) == [folder / "x-10.csv", folder / "x-2.csv"]
    assert matching(f"{folder}/**/x-[34].csv", base) == [folder / "deep/other/x-4.csv", folder / "deep/x-3.csv"]
    assert matching(f"{folder}/none-*", base) == []


def test_a_stamp_changes_with_the_file_and_with_nothing_else(folder: Location) -> None:
    make_directory(folder)
    for name in "ab":
        write(folder / name, b"content")
    both = stamps([folder / "a", folder / "b"])
    assert both == [stamp(folder / "a"), stamp(folder / "b")]
    time.sleep(0.002)
    write(folder / "a", b"another")
    assert stamp(folder / "a") != both[0]
    assert stamp(folder / "b") == both[1]


def test_a_copy_on_disk_is_that_of_the_file_as_it_is_now(folder: Location) -> None:
    make_directory(folder / "inner")
    write(folder / "a", b"1")
    write(folder / "inner/b", b"2")
    copy = local_file(folder / "a")
    assert copy.read_bytes() == b"1"
    assert local_file(folder / "a") == copy
    whole = local_directory(folder)
    assert [(whole / name).read_bytes() for name in ("a", "inner/b")] == [b"1", b"2"]
    time.sleep(0.002)
    write(folder / "a", b"3")
    remove(folder / "inner")
    assert local_file(folder / "a").read_bytes() == b"3"
    assert [path.name for path in local_directory(folder).iterdir()] == ["a"]


def test_a_directory_is_uploaded_with_the_file_that_completes_it_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("done.json", "z/part", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = Remote(f"memory://{tmp_path.name}/upload")
    seen: list[list[str]] = []

    def noted(pairs: list[tuple[Path, Remote]]) -> None:
        transfer(pairs)
        seen.append([file.address.removeprefix(folder.address) for file in files_below(folder)])

    monkeypatch.setattr("features.storage.copy.transfer", noted)
    upload(tmp_path, folder, last="done.json")
    assert seen == [["/z/part"]]
    assert [file.name for file in files_below(folder)] == ["done.json", "part"]


def test_addresses_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("events.csv", tmp_path) == tmp_path / "events.csv"
    assert locate(f"file://{tmp_path}/a") == tmp_path / "a"
    assert matching(f"file://{tmp_path}/*", Path("/nowhere")) == []
    assert absolute(locate("a")) == tmp_path / "a"
    assert absolute(locate("memory://b/a/")) == Remote("memory://b/a")
    refuse_address(tmp_path, "")
    refuse_address(Path("a:/b"), "")
    with pytest.raises(TesseraError, match="s3://bucket/out: expected a directory of a file system; copy it"):
        refuse_address(Path("s3://bucket/out"), "copy it")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("foo://bucket/a", r"foo://bucket/a: protocol 'foo' is unknown; use a path, or an address such as s3://"),
        ("gs://bucket/a", r"gs://bucket/a: the package for gs:// is not installed; pip install gcsfs"),
        ("ftp://me:secret@host/a", r"ftp://…@host/a: an address must not hold a password"),
        ("zip://a.csv::memory://b.zip", r"expected one protocol; unpack the archive"),
    ],
)
def test_an_address_of_no_use_is_refused_by_name(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(TesseraError, match=message) as refused:
        locate(address)
    assert "secret" not in str(refused.value)


def test_an_error_of_the_store_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    def fails(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", fails)
    with pytest.raises(StorageError, match=r"memory://b/a: the store failed \(Unable to locate credentials\); check"):
        Remote("memory://b/a").read_bytes()


@pytest.mark.parametrize("asked", ["exists", "is_file", "is_dir"])
def test_a_store_that_does_not_answer_has_no_answer_to_whether_a_file_is_there(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("no answer within 30 s")

    assert getattr(Remote("memory://b/a"), asked)() is False
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", silent)
    with pytest.raises(StorageError, match=r"memory://b/a: the store failed \(no answer within 30 s\)"):
        getattr(Remote("memory://b/a"), asked)()
