"""Tables, batch jobs and exports at an object store give the bytes that they give on disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from features.content import lsa
from features.dataset.descriptor import load_dataset
from features.dataset.files import file_slices, load
from features.dataset.input_files import InputFiles
from features.dataset.source import TableSource
from features.durable import write_directory
from features.errors import DatasetError, StorageError, TesseraError
from features.framing.choices import is_large
from features.jobs.beam import map_shards
from features.jobs.encode import encode_catalogue
from features.jobs.engine import Engine
from features.jobs.messages import event_messages
from features.jobs.shard import Sifted, read_shards, write_shards
from features.storage import folders
from features.storage.copy import files_below, local_directory, upload
from features.storage.file import names, remove, size_bytes, stamp, write
from features.storage.location import Remote
from models.export.write import write_export
from streaming.log.sqlite import LocalLog
from tessera.cli.main import app
from tessera.export_source import open_source
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import run
from tests.integration.world import quiet
from tests.object_store import object_store

BASE = Path(__file__).parents[2] / "realfiles" / "base"
THREADS = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
TEXTS = [f"{'red' if number % 2 else 'blue'} {('ocean', 'robot', 'tale')[number % 3]}" for number in range(40)]
ITEMS = pl.DataFrame({"item_id": [f"i{number}" for number in range(40)], "text": TEXTS})


@pytest.fixture(scope="module")
def store() -> Iterator[Remote]:
    with object_store() as found:
        yield found


@pytest.fixture(scope="module")
def shops(store: Remote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Descriptors of the same tables on disk and at the store; the events lie in two files."""
    data = tmp_path_factory.mktemp("data")
    head, *rows = (BASE / "events.csv").read_text().splitlines(keepends=True)
    for number, part in enumerate((rows[:30], rows[30:])):
        (data / f"events-{number}.csv").write_text(head + "".join(part))
    shutil.copy(BASE / "items.csv", data)
    upload(data, store / "data")
    text = (BASE / "base.toml").read_text().replace("events.csv", "events-*.csv")
    addressed = text.replace('path = "', f'path = "{store}/data/')
    for name, content in (("disk", text), ("store", addressed)):
        (data / f"{name}.toml").write_text(content)
    return {name: data / f"{name}.toml" for name in ("disk", "store")}


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths if path.name != "stage.json"}


def test_slices_of_a_table_at_a_store_are_those_of_its_files(store: Remote, tmp_path: Path) -> None:
    frame = pl.DataFrame({"id": range(50), "text": [f"t{number}" for number in range(50)]})
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=10)
    write(store / "t.parquet", (tmp_path / "t.parquet").read_bytes())
    slices = [
        file_slices(TableSource(path=path), tmp_path, table="items", rows=20)
        for path in ("t.parquet", f"{store}/t.parquet")
    ]
    assert [(one.start, one.rows) for one in slices[0]] == [(one.start, one.rows) for one in slices[1]]
    found = [load(TableSource(path="t.parquet"), tmp_path, table="items", only=one) for one in slices[1]]
    assert pl.concat(part.frame for part in found).equals(frame)
    assert found[1].place(0) == (store / "t.parquet", 21)
    assert size_bytes(store / "t.parquet") == (tmp_path / "t.parquet").stat().st_size


def test_a_frame_of_tables_at_a_store_has_the_bytes_of_one_of_files(shops: dict[str, Path], tmp_path: Path) -> None:
    assert not is_large(load_dataset(shops["store"]))
    options = RunOptions(quantizer="residual-kmeans", encoder_dim=4, levels=2, codes=4)
    for name, descriptor in shops.items():
        run(load_dataset(descriptor), tmp_path / name, options, console=quiet(), registry=None, until="frame")
        (tmp_path / name / ".run.lock").unlink()
    assert contents(tmp_path / "disk") == contents(tmp_path / "store")


def test_check_reads_addresses_and_names_them_in_its_errors(shops: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(shops["store"])])
    assert done.exit_code == 0, done.output
    wrong = shops["store"].with_name("wrong.toml")
    wrong.write_text(shops["store"].read_text().replace('user = "user"', 'user = "usr"'))
    with pytest.raises(DatasetError, match=r"s3://shop/data/events-0.csv.*: \[events\] column 'usr': does not exist"):
        event_messages(load_dataset(wrong), tmp_path)
    missing = shops["store"].read_text().replace("events-*.csv", "none-*.csv")
    wrong.write_text(missing)
    with pytest.raises(DatasetError, match=r"s3://shop/data/none-\*.csv: \[events\] no file matches; fix path"):
        InputFiles(load_dataset(wrong))


def test_an_object_that_changes_during_a_run_ends_it_by_name(shops: dict[str, Path], store: Remote) -> None:
    inputs = InputFiles(load_dataset(shops["store"]))
    assert inputs.hashes == InputFiles(load_dataset(shops["disk"])).hashes
    inputs.check()
    before = (store / "data/events-1.csv").read_bytes()
    # As many bytes as before, and probably within a second.
    write(store / "data/events-1.csv", before.swapcase())
    with pytest.raises(DatasetError, match=r"^s3://shop/data/events-1.csv: changed while the run read it"):
        inputs.check()
    assert InputFiles(load_dataset(shops["store"])).hashes != inputs.hashes
    write(store / "data/events-1.csv", before)
    inputs.check()


def test_history_at_a_store_gives_the_same_messages(shops: dict[str, Path], tmp_path: Path) -> None:
    found = [
        pl.concat(map(pl.read_parquet, event_messages(load_dataset(path), tmp_path / name)))
        for name, path in shops.items()
    ]
    assert found[0].height > 50
    assert found[0].equals(found[1])


def test_messages_are_sent_from_an_address(store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    write(store / "new.jsonl", b'{"item": "i1"}\n{"item": "i2"}\n')
    done = CliRunner().invoke(app, ["send", "items", f"{store}/new.jsonl"])
    assert done.output == "2 messages appended to items\n"
    log = LocalLog(tmp_path / "log.db")
    assert log.end_offsets("items") == {0: 2}
    log.close()
    with pytest.raises(TesseraError, match=r"s3://shop/none\.jsonl: no such file"):
        CliRunner().invoke(app, ["send", "items", f"{store}/none.jsonl"], catch_exceptions=False)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in five shards, an encoder, and the vectors that one worker made of them."""
    directory = tmp_path_factory.mktemp("job")
    shards = write_shards(ITEMS, directory / "texts", rows=8)
    write_directory(directory / "encoder", lsa.fit(TEXTS, dim=4, seed=0).save)
    encode_catalogue(shards, directory / "encoder", directory / "vectors")
    return directory


def test_a_job_at_a_store_has_the_bytes_of_one_on_disk_and_does_no_shard_twice(job: Path, store: Remote) -> None:
    upload(job, store / "job")
    expected = contents(job / "vectors")
    shards = [store / "job/texts" / name for name in names(job / "texts") if name != "cut"]
    out = store / "job/made"
    write(out / shards[2].name, expected[shards[2].name])
    before = stamp(out / shards[2].name)
    found = encode_catalogue(shards, store / "job/encoder", out, engine=Engine(options=THREADS))
    assert (found.shards, found.rows_in, found.rows_out) == (5, 40, 40)
    assert stamp(out / shards[2].name) == before
    assert contents(local_directory(out)) == expected
    assert read_shards(out).equals(read_shards(job / "vectors"))


_AT = "s3://shop/exchange/"


def _seen_remote(shard: pl.DataFrame, *, table: str) -> Sifted:
    """Drops items that a directory names; fails for an item of its name."""
    assert table.startswith(_AT)
    names_of = (local_directory(Remote(table)) / "inner" / "names").read_text().split()
    if "fail" in names_of and "i30" in shard["item_id"]:
        raise ValueError("not now")
    dropped = pl.col("item_id").is_in(names_of)
    return Sifted(shard.filter(~dropped), shard.filter(dropped).select("item_id", reason=pl.lit("named")))


def test_a_job_goes_through_an_exchange_to_workers_that_share_no_disk(job: Path, store: Remote, tmp_path: Path) -> None:
    engine = Engine(options=THREADS, exchange=f"{store}/exchange/")
    shards = [job / "texts" / name for name in names(job / "texts") if name != "cut"]
    encode_catalogue(shards, job / "encoder", tmp_path / "vectors", engine=engine)
    assert contents(tmp_path / "vectors") == contents(job / "vectors")
    assert files_below(store / "exchange") == []

    (tmp_path / "table/inner").mkdir(parents=True)
    (tmp_path / "table/inner/names").write_text("i3 fail")
    reads = {"table": tmp_path / "table"}
    with pytest.raises(RuntimeError, match="not now"):
        map_shards(_seen_remote, shards, tmp_path / "out", label="x", engine=engine, reads=reads)
    # What was finished is at the store, and the next job goes on there.
    assert not [name for name in names(tmp_path / "out") if name.startswith("part-")]
    done = {file: stamp(file) for file in files_below(store / "exchange") if "/out/part-" in file.address}
    assert done
    (tmp_path / "table/inner/names").write_text("i3 i9")
    for _ in range(2):
        found = map_shards(_seen_remote, shards, tmp_path / "out", label="x", engine=engine, reads=reads)
        assert (found.rows_in, found.rows_out) == (40, 40 - found.rejected)
    assert read_shards(tmp_path / "out").height == 40 - found.rejected
    assert read_shards(tmp_path / "out" / "rejected")["item_id"].to_list()[0] == "i3"
    assert files_below(store / "exchange") == []
    with pytest.raises(TesseraError, match="exchange /tmp/x: expected the address of an object store"):
        encode_catalogue(shards, job / "encoder", tmp_path / "new", engine=Engine(exchange="/tmp/x"))


def test_an_export_at_a_store_has_the_bytes_of_one_on_disk(
    shops: dict[str, Path], store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(quantizer="residual-kmeans", encoder_dim=4, levels=2, codes=4)
    run(load_dataset(shops["disk"]), tmp_path / "run", options, console=quiet(), registry=None, until="frame")
    write_export(open_source(tmp_path / "run"), tmp_path / "export", buckets=2)
    out = store / "export"
    command = ["export", str(tmp_path / "run"), "--out", str(out)]
    for buckets in ("3", "2"):
        done = CliRunner().invoke(app, [*command, "--buckets", buckets])
        assert done.exit_code == 0, done.output
    assert f"in {out}" in done.output
    assert contents(local_directory(out)) == contents(tmp_path / "export")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("models.export.write.upload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_export(open_source(tmp_path / "run"), out)
    # Without a schema no reader takes the export for whole, and the next export replaces it.
    assert not (out / "schema.json").exists()
    write_export(open_source(tmp_path / "run"), out, buckets=2)
    assert contents(local_directory(out)) == contents(tmp_path / "export")

    remove(out / "schema.json")
    with pytest.raises(TesseraError, match=f"{out} is no export"):
        write_export(open_source(tmp_path / "run"), out)
    with pytest.raises(TesseraError, match="--feast and --redis read an export on this disk"):
        CliRunner().invoke(app, [*command, "--feast", str(tmp_path / "feast")], catch_exceptions=False)


def test_a_run_at_an_address_goes_on_on_another_machine(
    shops: dict[str, Path], store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["quantizer=residual-kmeans", "encoder_dim=4", "levels=2", "codes=4"]
    given = [word for option in options for word in ("--set", option)]

    def run_at(home: str, last: str, *more: str) -> str:
        monkeypatch.setenv("TESSERA_HOME", str(tmp_path / home))
        command = ["run", str(shops["disk"]), "--out", f"{store}/run", "--until", last, *given, *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return done.output

    assert f"stages   {store}/run" in run_at("one", "assign")
    assert [file.name for file in files_below(store / "run") if file.name == "stage.json"] == ["stage.json"] * 2
    said = run_at("two", "frame")
    assert f"assign: fetched from {store}/run/assign" in said
    (first,), (second,) = ((tmp_path / name / "runs").glob("[!.]*") for name in ("one", "two"))
    for stage in ("encode", "assign"):
        assert contents(first / stage) == contents(second / stage)
        assert (first / stage / "stage.json").read_bytes() == (second / stage / "stage.json").read_bytes()
    # The first machine lacks the frame alone, and takes it.
    said = run_at("one", "frame")
    assert "fetched" in said
    assert "encode: in place" in said
    assert "encode: fetched" not in said
    assert contents(first / "frame") == contents(second / "frame")
    # Another choice replaces the copies of the stages that it decides, and no machine takes a stage of the other key.
    said = run_at("two", "frame", "--set", "seed=1")
    assert "fetched" not in said
    assert "fetched" in run_at("one", "frame", "--set", "seed=1")
    assert contents(first / "frame") == contents(second / "frame")


def test_a_stage_that_the_store_does_not_take_is_kept_and_sent_later(
    shops: dict[str, Path], store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(quantizer="residual-kmeans", encoder_dim=4, levels=2, codes=4)

    def run_it() -> list[str]:
        done = run(load_dataset(shops["disk"]), tmp_path, options, console=quiet(), registry=None, until="encode",
                   copies=store / "later")  # fmt: skip
        return list(done.executed)

    def refused(*_: object) -> None:
        raise StorageError("s3://shop/later/encode/a: the store failed")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "transfer", refused)
        with pytest.raises(StorageError, match="the store failed"):
            run_it()
    assert names(store / "later/encode") == []
    assert run_it() == []
    assert contents(local_directory(store / "later/encode")) == contents(tmp_path / "encode")
    # A copy that was altered is named, and is not taken.
    file = next(one for one in files_below(store / "later/encode") if one.name.endswith(".parquet"))
    write(file, b"other")
    shutil.rmtree(tmp_path / "encode")
    with pytest.raises(StorageError, match=f"{file}: sha256 differs from stage.json; remove {store}/later/encode"):
        run_it()
    remove(store / "later/encode")
    assert run_it() == ["encode"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "s3://shop/data/store.toml"], "copy the descriptor to this disk; the path of a table"),
        (["export", "s3://shop/out"], "s3://shop/out: .* copy the run or the bundle to this disk"),
    ],
)
def test_an_address_where_only_a_directory_will_do_is_refused_by_name(
    shops: dict[str, Path], arguments: list[str], message: str
) -> None:
    given = [argument.format(disk=shops["disk"]) for argument in arguments]
    with pytest.raises(TesseraError, match=message):
        CliRunner().invoke(app, given, catch_exceptions=False)
