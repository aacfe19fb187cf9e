"""A run with `retrieval = "towers"`: the stage, its rows in the one table, the bundle, and a run without it."""

import io
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import BundleError, DatasetError, TesseraError
from models.bundle.bundle import FORMAT, Bundle, load_bundle
from models.ranker.train import TrainConfig
from models.towers.config import TowerConfig
from models.towers.mixture import WEIGHTS
from models.towers.stored import load_towers, save_towers, towers_id
from models.towers.towers import Visits
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import RunResult, run
from tests.build import SMALL_NETWORK, coloured_tables
from tests.integration.world import quiet

SMALL = TowerConfig(width=8, blocks=1, batch=16, max_epochs=3, rate=0.01)
OFF = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=4,
    history_length=5,
    table=replace(RunOptions().table, dim=4),
    reads=("id", "code"),
    training=TrainConfig(batch=64, max_epochs=1, network=SMALL_NETWORK),
)
ON = replace(OFF, retrieval="towers", towers=SMALL)
DESCRIPTOR = """
name = "coloured"
[items]
path = "items.parquet"
id = "item_id"
text = ["text"]
categorical = ["colour"]
[users]
path = "users.parquet"
id = "user_id"
numeric = ["age"]
[events]
path = "events.parquet"
user = "user_id"
item = "item_id"
time = "time"
label = { column = "label" }
[split]
by = "time"
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    directory = tmp_path_factory.mktemp("coloured")
    for name, table in coloured_tables().items():
        table.drop("event", strict=False).write_parquet(directory / f"{name}.parquet")
    (directory / "coloured.toml").write_text(DESCRIPTOR)
    return load_dataset(directory / "coloured.toml")


@pytest.fixture(scope="module")
def off(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(dataset, tmp_path_factory.mktemp("off"), OFF, console=quiet(), registry=None, until="publish")


@pytest.fixture(scope="module")
def on(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(dataset, tmp_path_factory.mktemp("on"), ON, console=quiet(), registry=None, until="publish")


def bundle_of(result: RunResult) -> Bundle:
    assert result.bundle is not None
    return result.bundle


def test_the_ranker_has_the_bits_of_a_run_without_towers(off: RunResult, on: RunResult) -> None:
    plain, towered = bundle_of(off), bundle_of(on)
    reserved = towered.schema.reserved
    assert reserved > 0
    assert towered.schema.rows == plain.schema.rows + reserved
    assert np.array_equal(towered.rows()[:-reserved], plain.rows())
    for name in ("network.safetensors", "admission.safetensors", "items.parquet", "history.parquet"):
        assert towered.manifest.files[name] == plain.manifest.files[name]
    items = [f"i{number}" for number in range(40)]
    assert np.array_equal(towered.rank("u1", items), plain.rank("u1", items))
    assert towered.manifest.metrics["quality"] == plain.manifest.metrics["quality"]


def test_a_run_without_towers_is_as_before(off: RunResult) -> None:
    bundle = bundle_of(off)
    assert "retrieve" not in off.executed
    assert bundle.towers is None
    assert bundle.manifest.format == 4
    assert "reserved" not in bundle.manifest.schema
    assert "retrieval" not in bundle.manifest.choices
    assert "retrieval" not in bundle.manifest.metrics
    assert not (bundle.directory / "towers").exists()


def test_the_bundle_holds_the_towers_and_their_rows(on: RunResult) -> None:
    bundle = bundle_of(on)
    towers = bundle.towers
    assert towers is not None
    assert bundle.manifest.format == FORMAT
    assert bundle.manifest.towers == towers.id
    assert bundle.manifest.choices["retrieval"] == "towers"
    assert towers.config.content_weight in WEIGHTS
    rows = bundle.rows()
    trained = load_file(on.directory / "retrieve" / "towers" / "rows.safetensors")["rows"].numpy()
    assert np.array_equal(rows[-len(trained) :], trained)
    vectors = towers.item_vectors(rows.__getitem__, bundle.items)
    assert vectors.shape == (40, towers.width)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    read, _ = towers.item_rows(bundle.items)
    assert read.min() >= bundle.schema.rows - bundle.schema.reserved
    assert read.max() < bundle.schema.rows
    visits = Visits(vectors[:3], np.arange(3), np.array([3]), np.array([9]))
    assert np.linalg.norm(towers.user_vectors(rows.__getitem__, bundle.users[:1], visits)) == pytest.approx(1, abs=1e-5)


def test_the_metrics_have_towers_beside_popularity_and_content(on: RunResult) -> None:
    found = on.metrics["retrieval"]
    assert set(found) == {"towers", "popularity", "content"}
    assert found["towers"]["all"]["users"] > 0
    assert 0 < found["towers"]["all"]["ndcg_10"] < 1
    assert found == bundle_of(on).manifest.metrics["retrieval"]


def test_the_stage_is_not_done_twice_and_repeats_its_bits(dataset: Dataset, on: RunResult, tmp_path: Path) -> None:
    again = run(dataset, on.directory, ON, console=quiet(), registry=None, until="publish")
    assert again.executed == {}
    other = replace(ON, towers=replace(SMALL, max_epochs=2))
    said = io.StringIO()
    run(dataset, tmp_path / "twin", ON, console=Console(file=said, width=200), registry=None, until="train")
    one, two = (place / "retrieve" / "towers" / "rows.safetensors" for place in (on.directory, tmp_path / "twin"))
    assert one.read_bytes() == two.read_bytes()
    assert "retrieve: epoch " in said.getvalue()
    changed = run(dataset, tmp_path / "twin", other, console=quiet(), registry=None, until="train")
    assert set(changed.executed) == {"retrieve", "train"}


def test_a_warm_start_trains_towers_of_its_own(dataset: Dataset, on: RunResult, tmp_path: Path) -> None:
    warm = replace(ON, warm_start=on.directory, reads=None)
    result = bundle_of(run(dataset, tmp_path / "warm", warm, console=quiet(), registry=None, until="publish"))
    assert result.towers is not None
    assert result.schema.reserved == bundle_of(on).schema.reserved
    less = replace(warm, retrieval="off")
    without = bundle_of(run(dataset, tmp_path / "less", less, console=quiet(), registry=None, until="publish"))
    assert without.towers is None
    assert without.schema.reserved == 0
    assert np.array_equal(without.rows(), result.rows()[: -result.schema.reserved])


def test_towers_of_another_place_are_refused(on: RunResult, tmp_path: Path) -> None:
    bundle = bundle_of(on)
    wrong = load_towers(bundle.directory / "towers").at(3)
    save_towers(tmp_path, wrong)
    with pytest.raises(BundleError, match=r"towers: the files give towers-.*, the manifest names towers-"):
        assert replace(bundle, directory=_beside(tmp_path)).towers
    manifest = msgspec.structs.replace(bundle.manifest, towers=towers_id(tmp_path))
    with pytest.raises(BundleError, match=r"reads [0-9,]+ rows from row 3, the table reserves its last"):
        assert replace(bundle, directory=_beside(tmp_path), manifest=manifest).towers


def _beside(directory: Path) -> Path:
    """Returns a directory in which the towers of another lie as a bundle has them."""
    place = directory / "bundle"
    if not place.exists():
        place.mkdir()
        (place / "towers").symlink_to(directory)
    return place


def test_choices_that_do_not_fit_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match=r"retrieval=tower: expected one of off, towers, got 'tower'"):
        load_options(dataset, ["retrieval=tower"])
    with pytest.raises(TesseraError, match=r"towers.width: expected a multiple of table.dim = 16, got 24"):
        load_options(dataset, ["retrieval=towers", "towers.width=24"])
    with pytest.raises(TesseraError, match=r"towers.batch=0: expected at least 1, got 0"):
        load_options(dataset, ["towers.batch=0"])
    assert load_options(dataset, ["towers.budget=1MB"]).towers.budget == 1_000_000
    text = DESCRIPTOR.replace('user = "user_id"\n', "")
    text = text.replace('[users]\npath = "users.parquet"\nid = "user_id"\nnumeric = ["age"]\n', "")
    nobody = dataset.source.with_name("nobody.toml")
    nobody.write_text(text)
    with pytest.raises(DatasetError, match=r"nobody.toml: retrieval = .towers. .* \[events\] names no user"):
        run(load_dataset(nobody), tmp_path / "nobody", ON, console=quiet(), registry=None, until="encode")


def test_the_bundle_opens_again_from_its_directory(on: RunResult) -> None:
    bundle = bundle_of(on)
    assert load_bundle(bundle.directory).id == bundle.id
