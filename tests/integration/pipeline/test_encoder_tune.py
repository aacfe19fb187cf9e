"""A view tuned on a finished run: its files, its place in a bundle, and fits that were stopped or cannot be made."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from features.content.chain import load_view
from features.content.kinds import load_encoder
from features.errors import DatasetError, TesseraError
from features.jobs.shard import read_shards
from features.lock import locked
from models.encoder.tuning.options import TuneOptions
from tessera.cli.main import app
from tessera.encoders.tune import ViewOptions, tune_view
from tests.integration.world import World

SHORT = TuneOptions(rounds=2, patience=2, batch=64)


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tune") / "run"
    for stage in ("encode", "frame"):
        shutil.copytree(world.directory / stage, directory / stage)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_tune_writes_a_view_of_the_runs_own_vectors_and_changes_nothing_else(run: Path) -> None:
    before = files(run / "encode") | files(run / "frame")
    tuned = tune_view(run, ViewOptions(tune=SHORT))
    assert files(run / "encode") | files(run / "frame") == before
    view = load_view(run / "views" / "similar")
    assert view.id == tuned.view.id
    assert view.source == load_encoder(run / "encode" / "encoder").id
    vectors = read_shards(run / "encode" / "vectors")["vector"].to_numpy()
    found = view.of(vectors)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    report = json.loads((run / "views" / "similar" / "tune.json").read_text())
    assert report["after"] >= report["before"]
    assert report["pairs"] == tuned.pairs
    # The same tune gives the same view.
    assert tune_view(run, ViewOptions(name="again", tune=SHORT)).view.id == view.id


def test_only_likes_of_the_training_part_are_read(run: Path, tmp_path: Path) -> None:
    for stage in ("encode", "frame"):
        shutil.copytree(run / stage, tmp_path / stage)
    for part in ("validation", "test"):
        shutil.rmtree(tmp_path / "frame" / "examples" / part, ignore_errors=True)
        for block in (tmp_path / "frame" / "examples").glob(f"{part}*"):
            block.unlink()
    (tmp_path / "frame" / "stage.json").write_text('{"key": "k"}')
    options = ViewOptions(name="train", tune=replace(SHORT, rounds=1))
    assert tune_view(tmp_path, options).view.id == tune_view(run, options).view.id


@pytest.mark.parametrize("source", ["column:topic", "ict", "bfs", "title", "scores.parquet"])
def test_every_source_of_pairs_makes_a_view(run: Path, tmp_path: Path, source: str) -> None:
    if source == "scores.parquet":
        ids = read_shards(run / "encode" / "vectors", ["item_id"])["item_id"]
        source = str(tmp_path / source)
        pl.DataFrame({"first": ids[:-1], "second": ids[1:], "score": np.linspace(0.1, 1, len(ids) - 1)}).write_parquet(
            source
        )
    tuned = tune_view(run, ViewOptions(name="other", pairs=(source,), tune=replace(SHORT, rounds=1)))
    assert tuned.pairs[source] > 50


def test_a_tune_that_fails_leaves_the_earlier_view_and_goes_on_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    for stage in ("encode", "frame"):
        shutil.copytree(run / stage, tmp_path / stage)
    first = tune_view(tmp_path, ViewOptions(tune=replace(SHORT, rounds=1)))
    earlier = files(first.directory)

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_view(tmp_path, ViewOptions(tune=SHORT), progress=stopped)
    assert files(first.directory) == earlier
    assert (tmp_path / "views" / ".similar.state").exists()
    rounds: list[int] = []
    tuned = tune_view(tmp_path, ViewOptions(tune=SHORT), progress=lambda done, total: rounds.append(done))
    # The first round is not done again.
    assert rounds[0] == 2
    assert tuned.view.id == tune_view(run, ViewOptions(tune=SHORT)).view.id
    assert not (tmp_path / "views" / ".similar.state").exists()


def test_two_views_are_merged(run: Path) -> None:
    tune_view(run, ViewOptions(name="a", tune=SHORT))
    tune_view(run, ViewOptions(name="b", pairs=("column:topic",), tune=SHORT))
    merged = tune_view(run, ViewOptions(name="both", merge=("a", "b"), tune=SHORT))
    assert merged.weights is not None
    assert min(merged.weights) >= 0
    assert 1 <= sum(merged.weights) <= 1.6
    assert load_view(merged.directory).id == merged.view.id


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ViewOptions(pairs=("colliked",)), "unknown source"),
        (ViewOptions(pairs=("column:colour",)), "no column 'colour'"),
        (ViewOptions(pairs=("none.parquet",)), "none.parquet"),
        (ViewOptions(name="base"), "'base'"),
        (ViewOptions(name="a.b"), "'a.b'"),
        (ViewOptions(merge=("similar",)), "two views"),
        (ViewOptions(merge=("none", "nothing")), "none"),
    ],
)
def test_a_choice_that_cannot_be_used_is_refused_by_name(run: Path, options: ViewOptions, named: str) -> None:
    with pytest.raises(TesseraError, match=named):
        tune_view(run, options)


def test_a_second_tune_of_a_view_and_a_run_without_a_frame_are_refused(run: Path, tmp_path: Path) -> None:
    with locked(run / "views" / "held", wait_s=0), pytest.raises(TesseraError, match="held"):
        tune_view(run, ViewOptions(name="held", tune=SHORT))
    with pytest.raises(DatasetError, match="encode"):
        tune_view(tmp_path, ViewOptions())


def test_the_command_prints_pairs_recall_and_view(run: Path) -> None:
    result = CliRunner().invoke(app, ["encoder", "tune", str(run), "--name", "cli", "--set", "rounds=1"])
    assert result.exit_code == 0, result.output
    assert "co-liked" in result.output
    described = json.loads(CliRunner().invoke(app, ["encoder", "tune", str(run), "--set", "rounds=1", "--json"]).stdout)
    assert described["view"]["name"] == "similar"
