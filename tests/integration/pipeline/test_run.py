"""The offline job on data it was not written for, resumed after being killed, and beside its baselines."""

import csv
import datetime
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from features.dataset.descriptor import load_dataset
from features.jobs.shard import read_shards
from models.bundle.bundle import load_bundle
from models.ranker.loading import assembler, examples
from models.ranker.train import TrainConfig, predict
from models.registry.registry import Registry
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.run import STAGES, RunOptions, run
from tests.integration.world import World, quiet

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"


def test_a_run_beats_both_baselines_where_content_decides(world: World) -> None:
    quality = world.bundle.manifest.metrics["quality"]
    assert quality["ranker"]["all"]["auc"] > max(quality[name]["all"]["auc"] for name in ("popularity", "hashed-id"))
    assert quality["ranker"]["unseen"]["auc"] > 0.55


def test_a_finished_run_is_not_done_again_and_gives_the_same_bundle(world: World) -> None:
    again = run(world.dataset, world.directory, RunOptions(), console=quiet(), registry=None, until="publish")
    assert again.executed == {}
    assert again.bundle is not None
    assert again.bundle.id == world.bundle.id


def test_a_loaded_bundle_ranks_as_the_trained_ranker_did(world: World) -> None:
    frame = read_frame(world.directory / "frame")
    test = frame.part("test")
    found = predict(
        world.bundle.ranker(), assembler(world.bundle.schema, frame, test, world.bundle.admission()), examples(test)
    )
    from sklearn.metrics import roc_auc_score

    measured = roc_auc_score(test["label"].to_numpy(), found.astype(np.float64))
    assert measured == pytest.approx(world.bundle.manifest.metrics["quality"]["ranker"]["all"]["auc"], abs=1e-9)


def test_the_bundle_encodes_a_text_to_what_the_stages_made_of_it(world: World) -> None:
    texts = read_shards(world.directory / "encode" / "texts").select("item_id", "text")
    items = world.bundle.items.join(texts, on="item_id", how="inner", maintain_order="left")

    vectors, codes, tokens = world.bundle.encode_items(items["text"].to_list())

    np.testing.assert_array_equal(codes, items["semantic_codes"].to_numpy())
    assert tokens == items["semantic_id"].to_list()
    np.testing.assert_allclose(vectors, items["content_vector"].to_numpy(), atol=1e-6)


def _jsonl_with_iso_times(directory: Path) -> Path:
    """Events as JSON lines with ISO times and text ids, items as JSON lines: a shape nobody prepared the code for."""
    rng = np.random.default_rng(3)
    start = datetime.datetime(2024, 3, 1, tzinfo=datetime.UTC)
    with (directory / "plays.jsonl").open("w") as file:
        for place in range(3_000):
            track = int(rng.integers(60))
            row = {
                "listener": f"anna-{rng.integers(40)}",
                "track": f"tr_{track:03d}",
                "at": (start + datetime.timedelta(minutes=7 * place)).isoformat(),
                "action": "play" if (track % 3 == 0) ^ (rng.random() < 0.2) else "skip",
            }
            file.write(json.dumps(row) + "\n")
    with (directory / "tracks.jsonl").open("w") as file:
        for track in range(55):
            words = ["violin sonata slow", "drum bass club night", "guitar folk river song"][track % 3]
            file.write(json.dumps({"code": f"tr_{track:03d}", "words": f"{words} number {track % 7}"}) + "\n")
    path = directory / "plays.toml"
    path.write_text(
        'name = "plays"\n[items]\npath = "tracks.jsonl"\nid = "code"\ntext = ["words"]\n'
        '[events]\npath = "plays.jsonl"\nuser = "listener"\nitem = "track"\ntime = { column = "at", unit = "iso" }\n'
        'label = { column = "action", positive = "== play", negative = "== skip" }\n[split]\nby = "time"\n'
    )
    return path


def _csv_without_tables(directory: Path) -> Path:
    """Labelled impressions in one csv with semicolons: no items' table and no users' table."""
    rng = np.random.default_rng(4)
    with (directory / "ads.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["who", "ad", "device", "price", "bought"])
        for _ in range(3_000):
            ad = int(rng.integers(50))
            bought = int(rng.random() < (0.6 if ad % 2 else 0.2))
            writer.writerow(
                [rng.integers(100), ad, rng.choice(["phone", "desk", ""]), f"{rng.random() * 9:.2f}", bought]
            )
    path = directory / "ads.toml"
    path.write_text(
        'name = "ads"\n[events]\npath = "ads.csv"\nseparator = ";"\nuser = "who"\nitem = "ad"\n'
        'categorical = ["device"]\nnumeric = ["price"]\nlabel = { column = "bought" }\n[split]\nby = "order"\n'
    )
    return path


# MLflow asks SQLAlchemy for a loader strategy that the next SQLAlchemy drops.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
@pytest.mark.parametrize("make", [_jsonl_with_iso_times, _csv_without_tables])
def test_a_dataset_nobody_prepared_for_runs_to_a_registered_bundle(make: object, tmp_path: Path) -> None:
    dataset = load_dataset(make(tmp_path))  # type: ignore[operator]
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts=tmp_path / "mlflow")
    result = run(dataset, tmp_path / "out", RunOptions(), console=quiet(), registry=registry, until="publish")
    assert result.bundle is not None
    assert result.release is not None
    assert result.release.aliases == ("champion",)
    assert registry.open(registry.resolve(None), tmp_path / "cache").id == result.bundle.id
    quality = result.metrics["quality"]
    assert quality["ranker"]["all"]["auc"] > 0.55


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data, which is not the project's to ship")
def test_a_dataset_without_items_runs_to_a_bundle_without_semantic_ids(tmp_path: Path) -> None:
    dataset = load_dataset(SHARED / "criteo.toml")
    result = run(dataset, tmp_path, RunOptions(), console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    assert set(result.executed) == {"frame", "train", "evaluate", "publish"}
    assert result.bundle.manifest.codebook is None


@pytest.mark.slow
def test_killed_in_any_stage_the_next_run_gives_the_bundle_of_an_undisturbed_one(tmp_path: Path) -> None:
    descriptor = write_synthetic(tmp_path / "data", users=200, items=300, events=8_000)
    environment = os.environ | {"TESSERA_HOME": str(tmp_path / "home")}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tessera", "publish", str(descriptor), "--out", str(out), "--json"]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    killed = tmp_path / "killed"
    for stage in STAGES:
        process = start(killed)
        while process.poll() is None and not (killed / f".{stage}.partial").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run was over before its stage {stage} could be killed"
        assert (killed / f".{stage}.partial").exists() or (killed / stage).exists()
    found = []
    for out in (killed, tmp_path / "undisturbed"):
        process = start(out)
        answer, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        found.append(json.loads(answer)["bundle"])
    assert found[0] == found[1]
    assert load_bundle(killed / "publish" / "bundle").id == found[0]


def test_a_run_in_auto_says_which_precision_it_took(tmp_path: Path) -> None:
    visits = {"user": ["a", "b"] * 50, "item": ["1", "2", "3", "4"] * 25, "label": [0, 1] * 50}
    pl.DataFrame(visits).write_parquet(tmp_path / "e.parquet")
    (tmp_path / "s.toml").write_text(
        'name = "s"\n[events]\npath = "e.parquet"\nuser = "user"\nitem = "item"\nlabel = {column = "label"}\n'
        '[split]\nby = "random"\n'
    )
    console, options = Console(file=io.StringIO()), RunOptions(training=TrainConfig(precision="auto", max_epochs=1))
    run(load_dataset(tmp_path / "s.toml"), tmp_path / "out", options, console=console, registry=None, until="train")
    taken = json.loads((tmp_path / "out" / "train" / "ranker" / "epochs.json").read_bytes())["precision"]
    assert taken in ("float32", "bfloat16")
    assert f"ranker multiplied in {taken}" in console.file.getvalue()  # type: ignore[attr-defined]
