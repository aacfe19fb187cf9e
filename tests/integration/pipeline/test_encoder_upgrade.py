"""A new encoder under the index and codebook of a finished run, and a re-embedding that survives a kill."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from features.content import lsa
from features.content.chain import apply_steps, load_view
from features.content.kinds import load_encoder
from features.content.space_map import load_map
from features.errors import BundleError, DatasetError, TesseraError
from features.jobs.shard import read_shards, shard_paths
from models.encoder.axes import smaller
from tessera.cli.main import app
from tessera.encoders import reembed as reembedding
from tessera.encoders.cut import cut_view
from tessera.encoders.reembed import index_of, reembed, urgency
from tessera.encoders.upgrade import UpgradeOptions, upgrade
from tessera.pipeline.run import RunOptions
from tessera.pipeline.run import run as run_stages
from tests.integration.killed_reembedding import KILLED
from tests.integration.world import World, quiet

DIM = 24
LOW = {"first_codes": 0.0}


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world's run, and `new/`, an encoder fitted with fewer dimensions on nine tenths of the texts."""
    directory = tmp_path_factory.mktemp("upgrade")
    for stage in ("encode", "assign", "frame", "train"):
        shutil.copytree(world.directory / stage, directory / "run" / stage)
    texts = read_shards(directory / "run" / "encode" / "texts")["text"].to_list()
    (directory / "new").mkdir()
    lsa.fit(texts[: len(texts) * 9 // 10], dim=DIM, seed=3).save(directory / "new")
    return directory


@pytest.fixture(scope="module")
def upgraded(place: Path) -> Path:
    return upgrade(place / "run", place / "new", UpgradeOptions(name="up", least=LOW)).directory


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_an_upgrade_writes_the_best_map_and_an_encoder_of_the_old_space(place: Path, upgraded: Path) -> None:
    report = json.loads((upgraded / "report.json").read_text())
    tried = {row["kind"]: row for row in report["tried"]}
    # The widths differ, so neither a shift nor no map at all is possible.
    assert set(tried) == {"procrustes", "ridge", "mlp"}
    assert report["map"]["kind"] == max(tried, key=lambda kind: tried[kind]["whole_ids"])
    assert report["map"]["aim"] == "codes"
    assert report["seconds_an_item"] > 0
    texts = read_shards(place / "run" / "encode" / "texts")["text"].to_list()[:20]
    new, behind = load_encoder(place / "new"), load_encoder(upgraded / "encoder")
    found = load_map(upgraded)
    assert np.array_equal(behind.encode(texts), found.of(new.encode(texts), space=new.id))
    assert found.target == load_encoder(place / "run" / "encode" / "encoder").id


def test_an_upgrade_leaves_the_run_and_repeats_to_the_byte(place: Path, upgraded: Path) -> None:
    before = {name: data for name, data in files(place / "run").items() if not name.startswith("maps/")}
    again = upgrade(place / "run", place / "new", UpgradeOptions(name="again", least=LOW)).directory
    assert {name: data for name, data in files(place / "run").items() if not name.startswith("maps/")} == before
    one, other = ({n: d for n, d in files(where).items() if n != "report.json"} for where in (upgraded, again))
    # `upgraded` may hold a re-embedding by now.
    assert {name: one[name] for name in other} == other
    assert not list((place / "run" / "maps").glob(".*.partial"))


def test_an_upgrade_that_was_stopped_keeps_what_it_encoded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = UpgradeOptions(name="stopped", least=LOW)
    with monkeypatch.context() as patch:
        patch.setattr("tessera.encoders.upgrade.candidates", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upgrade(place / "run", place / "new", options)
    assert not (place / "run" / "maps" / "stopped").exists()
    (shard,) = (place / "run" / "maps").glob(".stopped.*.partial/vectors/part-*")
    stamp = shard.stat().st_mtime_ns
    kept: list[int] = []
    original = shutil.rmtree

    def noted(path: Path, **options: bool) -> None:
        kept.extend(one.stat().st_mtime_ns for one in Path(path).glob("vectors/part-*"))
        original(path, **options)

    monkeypatch.setattr("tessera.encoders.upgrade.shutil.rmtree", noted)
    assert upgrade(place / "run", place / "new", options).directory.is_dir()
    assert kept == [stamp]


def test_bad_input_is_refused_by_name(place: Path) -> None:
    run, new = place / "run", place / "new"
    refused = [
        (new, UpgradeOptions(least={"whole_ids": 1.01}), r"reaches whole ids .* expected 1\.01"),
        (new, UpgradeOptions(items=["nobody"]), "1 of 1 items are not in the catalogue, .*'nobody'"),
        (new, UpgradeOptions(sample=DIM), "pairs are fewer than"),
        (new, UpgradeOptions(name="../away"), "letters, digits"),
        (run, UpgradeOptions(), "uses already"),
        (place, UpgradeOptions(), "holds no encoder"),
    ]
    for to, options, message in refused:
        with pytest.raises(TesseraError, match=message):
            upgrade(run, to, options)
    with pytest.raises(DatasetError, match=r"encode is missing"):
        upgrade(place, new, UpgradeOptions())
    with pytest.raises(DatasetError, match=r"holds no upgrade; there are:.*up"):
        reembed(run, "none")


def test_urgent_items_come_first() -> None:
    order = urgency(np.array([0, 9, 9, 3]), np.array([0.5, 0.1, 0.4, 0.5]))
    assert order.tolist() == [2, 3, 1, 0]


def test_the_index_flips_when_every_item_is_done(place: Path, upgraded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembedding, "SHARD_ITEMS", 50)
    old, new = (load_encoder(where) for where in (place / "run" / "encode" / "encoder", place / "new"))
    state = reembed(place / "run", "up", most=2)
    assert (state.done, state.finished, state.space) == (100, False, old.id)
    space, frame = index_of(place / "run", "up")
    assert (space, frame["vector"].dtype.shape) == (old.id, (old.dim,))
    state = reembed(place / "run", "up")
    assert (state.finished, state.space) == (True, new.id)
    space, frame = index_of(place / "run", "up")
    assert (space, frame["vector"].dtype.shape) == (new.id, (new.dim,))
    texts = read_shards(place / "run" / "encode" / "texts")
    assert frame["item_id"].to_list() == texts["item_id"].to_list()
    assert np.array_equal(frame["vector"].to_numpy(), new.encode(texts["text"].to_list()))


@pytest.mark.slow
def test_another_engine_encodes_the_bytes_of_one_process(
    place: Path, upgraded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reembedding, "SHARD_ITEMS", 50)
    run, new = place / "run", str(place / "new")
    for name, engine in (("direct", "direct"), ("dask", "dask")):
        asked = ["encoder", "upgrade", str(run), "--to", new, "--name", name, "--least", "first_codes=0"]
        found = CliRunner().invoke(app, [*asked, "--runner", engine])
        assert found.exit_code == 0, found.output
        found = CliRunner().invoke(app, ["encoder", "reembed", str(run), "--map", name, "--runner", engine])
        assert found.exit_code == 0, found.output
    one, other = (files(run / "maps" / name / "reembedded") for name in ("direct", "dask"))
    assert one == other
    assert one
    maps = [(run / "maps" / name / "map.json").read_bytes() for name in ("direct", "dask")]
    assert maps[0] == maps[1]


def test_an_engine_refuses_an_endpoint_that_it_cannot_use(place: Path) -> None:
    for command in (["upgrade", "--to", str(place / "new")], ["reembed", "--map", "up"]):
        asked = ["encoder", command[0], str(place / "run"), *command[1:], "--endpoint", "127.0.0.1:8786"]
        found = CliRunner().invoke(app, asked)
        assert isinstance(found.exception, TesseraError)
        assert "of no use" in str(found.exception)


def test_a_reembedding_that_was_killed_and_resumed_equals_a_whole_one(
    place: Path, upgraded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reembedding, "SHARD_ITEMS", 50)
    run = place / "run"
    for name in ("whole", "killed"):
        shutil.copytree(upgraded, run / "maps" / name, ignore=shutil.ignore_patterns("reembed*"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run), "killed"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(shard_paths(run / "maps" / "killed" / "reembed" / "vectors")) == 2
    assert index_of(run, "killed")[0] == load_encoder(run / "encode" / "encoder").id
    for name in ("whole", "killed"):
        assert reembed(run, name).finished
    one, other = (
        {n: d for n, d in files(run / "maps" / name).items() if ".job" not in n} for name in ("whole", "killed")
    )
    assert one == other


def test_a_run_goes_on_under_the_new_encoder_and_keeps_rows_and_names(
    world: World, place: Path, upgraded: Path
) -> None:
    out = place / "warm"
    run_stages(world.dataset, out, RunOptions(warm_start=upgraded), console=quiet(), registry=None, until="train")
    assert load_encoder(out / "encode" / "encoder").id == load_encoder(upgraded / "encoder").id
    old, new = (read_shards(where / "assign" / "codes") for where in (place / "run", out))
    assert (old["codes"].to_numpy()[:, 0] == new["codes"].to_numpy()[:, 0]).mean() > 0.5
    first, last = (
        json.loads((where / "train" / "ranker" / "epochs.json").read_text())["validation_log_loss"]
        for where in (out, place / "run")
    )
    # The first epoch under the new encoder is about where the old training ended, not where it began.
    assert first[0] < last[0]
    made = json.loads((out / "encode" / "stage.json").read_text())["made_of"]["after"]
    plain = json.loads((place / "run" / "encode" / "stage.json").read_text())["key"]
    assert list(made.values()) != [plain]


def test_a_cut_view_is_the_rotated_prefix_and_a_view_can_be_cut_again(place: Path) -> None:
    run = place / "run"
    vectors = read_shards(run / "encode" / "vectors")["vector"].to_numpy()
    found = cut_view(run, "small", 32)
    assert load_view(found.directory).id == found.view.id
    assert [step.kind for step in found.view.steps] == ["centre", "rotate", "cut"]
    assert np.array_equal(found.view.of(vectors), apply_steps(smaller(vectors, 32), vectors))
    smallest = cut_view(run, "smallest", 8, of="small")
    assert (smallest.width, smallest.view.of(vectors).shape[1], len(smallest.view.steps)) == (32, 8, 6)
    assert 0 < cut_view(run, "small", 16).kept < found.kept < 1
    assert load_view(found.directory).steps[-1].dim == 16
    with pytest.raises(DatasetError, match="cannot keep 999"):
        cut_view(run, "other", 999)
    with pytest.raises(BundleError, match="holds no view"):
        cut_view(run, "other", 8, of="none")
    assert not (run / "views" / "other").exists()


def test_the_commands_print_what_they_found(place: Path) -> None:
    runner = CliRunner()
    run, new = str(place / "run"), str(place / "new")
    found = runner.invoke(app, ["encoder", "upgrade", run, "--to", new, "--name", "cli", "--least", "first_codes=0"])
    assert found.exit_code == 0, found.output
    for part in ("procrustes", "whole ids", "re-embedding 300 items"):
        assert part in found.output
    found = runner.invoke(app, ["encoder", "reembed", run, "--map", "cli", "--json"])
    assert json.loads(found.stdout)["finished"]
    found = runner.invoke(app, ["encoder", "advise", run, "--k", "3", "--items", "1000000"])
    assert "at 1,000,000 items" in found.output
