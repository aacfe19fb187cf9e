"""A run that goes on from an earlier one: its encoder stays, codes keep their names, rows are gone on from."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from features.dataset.descriptor import load_dataset
from features.errors import DatasetError
from features.jobs.shard import read_shards
from models.table.default_schema import TableOptions
from tessera.cli.main import app
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import World, quiet


@pytest.fixture(scope="module")
def grown(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's catalogue a tenth larger, run warm."""
    directory = tmp_path_factory.mktemp("grown")
    descriptor = write_synthetic(directory / "data", users=200, items=330, events=9_000)
    options = RunOptions(warm_start=world.directory)
    run(load_dataset(descriptor), directory / "run", options, console=quiet(), registry=None, until="evaluate")
    return directory


def losses(run_directory: Path) -> list[float]:
    found = json.loads((run_directory / "train" / "ranker" / "epochs.json").read_text())
    return list(found["validation_log_loss"])


def test_the_encoder_stays_and_most_items_keep_their_code(world: World, grown: Path) -> None:
    encoders = [
        json.loads((place / "encode" / "encoder" / "encoder.json").read_text())
        for place in (world.directory, grown / "run")
    ]
    assert encoders[0] == encoders[1]
    codes = [
        read_shards(place / "assign" / "codes").select("item_id", "codes") for place in (world.directory, grown / "run")
    ]
    both = codes[0].join(codes[1], on="item_id", suffix="_new")
    same = both["codes"].to_numpy() == both["codes_new"].to_numpy()
    assert both.height >= 300
    assert same[:, 0].mean() > 0.6


def test_the_ranker_starts_ahead_of_a_cold_one(world: World, grown: Path, tmp_path: Path) -> None:
    dataset = load_dataset(grown / "data" / "dataset.toml")
    run(dataset, tmp_path / "cold", RunOptions(), console=quiet(), registry=None, until="train")
    assert losses(grown / "run")[0] < losses(tmp_path / "cold")[0]
    assert np.isfinite(losses(grown / "run")).all()


def test_what_cannot_be_gone_on_from_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="encode is missing; give the --out of a finished"):
        run(
            world.dataset,
            tmp_path / "a",
            RunOptions(warm_start=tmp_path),
            console=quiet(),
            registry=None,
            until="train",
        )
    own = RunOptions(warm_start=world.directory)
    with pytest.raises(DatasetError, match="is this run's own --out"):
        run(world.dataset, world.directory, own, console=quiet(), registry=None, until="train")
    other = RunOptions(warm_start=world.directory, table=TableOptions(dim=8))
    with pytest.raises(DatasetError, match="reads other features, or the same in another shape"):
        run(world.dataset, tmp_path / "b", other, console=quiet(), registry=None, until="train")


def test_an_operator_reports_on_new_items_and_exports_with_a_stable_suffix(
    world: World, grown: Path, tmp_path: Path
) -> None:
    def invoke(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["ids", *arguments])
        if found.exception:
            raise found.exception
        return found.stdout

    new = str(grown / "data" / "dataset.toml")
    report = json.loads(invoke("report", str(world.directory), "--new", new, "--json"))
    assert report["codebook"]["drift"]["items"] == 30
    assert report["recommended"] == {"levels": 3, "codes": 16}
    assert {one["group"] for one in report["hits"]} == {"frequent", "rare"}
    assert all(0 <= rate <= 1 for one in report["hits"] for rate in one["rate"])
    assert "Hits by depth" in _page(invoke, world.directory, tmp_path)
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    invoke("export", str(world.directory), str(first), "--suffix")
    invoke("export", str(world.directory), str(second), "--suffix", "--after", str(first))
    assert pl.read_parquet(first).equals(pl.read_parquet(second))
    whole = pl.read_parquet(first).select(pl.struct("codes", "suffix").alias("id"))
    assert whole["id"].n_unique() == 300


def _page(invoke, directory: Path, tmp_path: Path) -> str:  # type: ignore[no-untyped-def]
    invoke("report", str(directory), "--html", str(tmp_path / "ids.html"))
    return (tmp_path / "ids.html").read_text()
