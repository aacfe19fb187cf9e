"""`tessera export` on a run, on a bundle, and on a run without a bundle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from features.errors import BundleError, TesseraError
from features.frame_blocks import block_path
from models.export.write import write_export
from tessera.export_source import open_source
from tests.integration.world import World

ROOT = Path(__file__).parents[3]


def tessera(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TESSERA_REDIS"}
    command = [sys.executable, "-m", "tessera", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_is_exported_with_its_examples_and_the_ids_of_its_bundle(world: World, tmp_path: Path) -> None:
    out, repository = tmp_path / "export", tmp_path / "repository"
    done = tessera("export", world.directory, "--out", out, "--by", "date", "--feast", repository, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rows"]["examples"] == 8_000
    assert sorted(report["feast"]) == sorted(str(path) for path in repository.iterdir())
    schema = json.loads((out / "schema.json").read_text())
    assert (schema["id"], schema["name"]) == (report["id"], "synthetic")
    assert schema["source"]["bundle"] == world.bundle.id
    assert schema["source"]["encoder"] == world.bundle.manifest.encoder
    unexplained = [
        column for table in schema["tables"].values() for column in table["columns"] if not column["meaning"]
    ]
    assert unexplained == []
    # Every column of the frame is there, row numbers as ids and the time as a timestamp.
    frame = pl.read_parquet_schema(block_path(world.directory / "frame", "train", 0)).keys()
    exported = pl.read_parquet(out / "examples").columns
    assert set(frame) - {"user", "item", "time"} <= set(exported)
    assert {"user_id", "item_id", "event_timestamp", "event_date"} <= set(exported)


def test_a_bundle_is_exported_without_examples(world: World, tmp_path: Path) -> None:
    schema = write_export(open_source(world.bundle.directory), tmp_path / "export")
    assert set(schema.tables) == {"items", "users", "histories"}
    found = pl.read_parquet(tmp_path / "export" / "histories")
    visits = world.bundle.history.group_by("user_id").agg("item_id")
    joined = found.join(visits, on="user_id")
    length = world.bundle.schema.history_length
    assert joined.height == found.height == visits.height
    assert all(row["history"] == row["item_id"][-length:] for row in joined.to_dicts())


def test_a_run_up_to_the_frame_is_exported_under_its_own_name(world: World, tmp_path: Path) -> None:
    run = tmp_path / "tea shop"
    for stage in ("encode", "assign", "frame"):
        shutil.copytree(world.directory / stage, run / stage)
    source = open_source(run)
    manifest = world.bundle.manifest
    assert source.name == "tea-shop"
    assert {kind: source.ids[kind] for kind in ("encoder", "codebook", "tokens")} == {
        "encoder": manifest.encoder,
        "codebook": manifest.codebook,
        "tokens": manifest.tokens,
    }
    assert set(write_export(source, tmp_path / "export").tables) == {"examples", "items", "users"}
    file = block_path(run / "frame", "test", 0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TesseraError, match=r"test-00000\.parquet was altered .*run again"):
        open_source(run)


def test_what_is_neither_a_run_nor_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"neither a bundle nor the --out"):
        open_source(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--by", "week"), "--by week: expected split or date"),
        (("--online", "redis"), "name it by --feast DIRECTORY"),
        (("--redis",), "TESSERA_REDIS is not set"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = tessera("export", tmp_path, "--out", tmp_path / "export", *arguments)
    assert (done.returncode, words in done.stderr.replace("\n", " ")) == (2, True)
    assert list(tmp_path.iterdir()) == []
