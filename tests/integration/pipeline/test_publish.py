"""`tessera publish`: lineage in the registry, the champion on the same test set, and who may challenge it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features import frame_blocks
from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.split import PARTS
from features.frame import Frame
from features.frame_blocks import held_blocks
from models.ranker.train import TrainConfig
from models.registry.gate import Gates
from models.registry.release import CHALLENGER, CHAMPION, PREVIOUS
from tessera.code_version import code_version
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import predictions, storage_cost, verdict
from tessera.pipeline.run import RunOptions, RunResult, run
from tessera.settings import Settings
from tests.build import SMALL_NETWORK
from tests.integration.world import World, quiet

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
# Small data are noisy: what is tested is the gate, not the seed.
WIDE = Gates(auc=0.05, ne=0.2, calibration=0.1, slice_auc=0.2, latency=20.0, bytes=5.0, sure=0.5)


def publish(world: World, out: Path, settings: Settings, **options: Any) -> RunResult:
    chosen = RunOptions(**({"gates": WIDE} | options))
    return run(world.dataset, out, chosen, console=quiet(), registry=settings.open_registry(), until="publish")


@pytest.mark.slow
def test_who_may_challenge_the_champion(
    world: World, tmp_path: Path, subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path / "home")
    registry = settings.open_registry()
    first = publish(world, world.directory, settings)
    with subtests.test("the first is champion, without a verdict"):
        assert first.release is not None
        assert first.release.aliases == (CHAMPION,)
        assert first.verdict is None
    with subtests.test("the registry keeps parameters, metrics, the data's profile and the lineage"):
        client = registry._tracking
        version = client.version(first.release.model, first.release.version)
        kept = client.run(version.run_id).data
        assert kept.params["table.dim"] == "16"
        assert kept.params["seed"] == "0"
        assert kept.metrics["all.auc"] > 0.5
        lineage = registry.lineage(first.release)
        assert lineage.encoder == world.bundle.manifest.encoder
        assert lineage.codebook == world.bundle.manifest.codebook
        assert lineage.dataset
        assert lineage.parent is None
        assert lineage.engine == "torchrec"
        assert lineage.device == "cpu"
        assert lineage.code == code_version("tessera.pipeline.run")
        profile = json.loads((tmp_path / "home" / "mlflow" / world.dataset.name / version.run_id / "artifacts" /
                              "profile.json").read_text())  # fmt: skip
        assert profile["tables"]["items"]["rows"] == world.bundle.items["listed"].sum()
    second = publish(world, tmp_path / "second", settings, seed=1)
    with subtests.test("one that is as good becomes challenger"):
        assert second.release is not None
        assert second.verdict is not None
        assert second.verdict.passed
        assert second.release.aliases == (CHALLENGER,)
        assert {check.name for check in second.verdict.checks} >= {"all: AUC", "new items: AUC", "bytes"}
        assert second.verdict.champion == first.release.bundle
        assert second.verdict.storage.keys() == {"float32", "float16", "int8"}
    train = replace(RunOptions().training, max_epochs=1, network_rate=1e-9, table_rate=1e-9)
    third = publish(world, tmp_path / "third", settings, seed=2, training=train)
    with subtests.test("one that learnt nothing is registered and refused"):
        assert third.release is not None
        assert third.verdict is not None
        assert not third.verdict.passed
        assert third.release.aliases == ()
        assert next(check.name for check in third.verdict.checks if not check.passed) == "all: AUC"
        assert registry.resolve(None, CHALLENGER) == second.release
    with subtests.test("promotion moves the aliases, and back"):
        now = registry.promote(registry.release(None, CHALLENGER))
        assert now.aliases == (CHAMPION,)
        assert registry.resolve(None, PREVIOUS).bundle == first.release.bundle
        back = registry.promote(registry.release(None, PREVIOUS))
        assert back.bundle == first.release.bundle
        assert registry.resolve(None, PREVIOUS).bundle == now.bundle
        assert [one.version for one in registry.releases(world.dataset.name)] == ["1", "2", "3"]
    with subtests.test("a champion that cannot be read stands in nobody's way"):
        champion = next(
            path for path in (tmp_path / "home" / "mlflow").rglob("manifest.json")
            if json.loads(path.read_text())["id"] == first.release.bundle
        )  # fmt: skip
        sound = champion.read_text()
        champion.write_text(sound.replace('"format": ', '"format": 9'))
        other = publish(world, tmp_path / "fourth", settings, seed=3, training=train)
        assert other.release is not None
        assert (other.release.aliases, other.verdict) == ((), None)
        champion.write_text(sound)
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", 500)
    warm = publish(world, tmp_path / "warm", settings, warm_start=world.directory)
    with subtests.test("a run whose parts are of several blocks goes to its end, and takes the same from them"):
        assert len(read_frame(tmp_path / "warm" / "frame").blocks("train")) > 10
        assert warm.bundle is not None
        assert warm.verdict is not None
        assert warm.verdict.passed
        assert warm.bundle.history.equals(world.bundle.history)
        assert warm.bundle.items["train_positives"].equals(world.bundle.items["train_positives"])
    with subtests.test("a warm-started bundle names its parent"):
        assert warm.release is not None
        assert registry.lineage(warm.release).parent == world.bundle.id


def test_a_champion_is_measured_as_it_was_when_it_was_made(world: World) -> None:
    frame = read_frame(world.directory / "frame")
    labels = frame.part("test")["label"].to_numpy()
    found = predictions(world.bundle, frame)
    parts = {part: held_blocks(frame.part(part), 5) for part in PARTS}
    divided = Frame(frame.users, frame.items, parts, frame.aggregates)
    np.testing.assert_allclose(predictions(world.bundle, divided), found, rtol=0, atol=1e-6)
    quality = world.bundle.manifest.metrics["quality"]["ranker"]["all"]
    same = verdict(world.bundle, world.bundle, frame, Gates(latency=100.0))
    unseen = np.arange(len(labels)) % 2 == 0
    half = verdict(world.bundle, world.bundle, frame, Gates(latency=100.0), unseen=unseen)
    assert half.note == f"{unseen.sum():,} of {len(labels):,} test rows are judged: neither bundle was trained on them."
    none = verdict(world.bundle, world.bundle, frame, Gates(latency=100.0), unseen=unseen & False)
    assert none.answer == "cannot tell"
    auc = next(check for check in same.checks if check.name == "all: AUC")
    assert len(found) == len(labels)
    assert auc.champion == auc.challenger == pytest.approx(quality["auc"], abs=1e-9)
    assert same.passed


def test_a_champion_of_another_encoder_reads_vectors_of_its_own(world: World, tmp_path: Path) -> None:
    """Items that it does not know are encoded by its own encoder, coded by its own codebook."""
    frame = read_frame(world.directory / "frame")
    options = RunOptions(encoder_dim=32, levels=2)
    other = run(world.dataset, tmp_path / "o", options, console=quiet(), registry=None, until="publish").bundle
    assert other is not None
    theirs = read_frame(tmp_path / "o" / "frame")
    np.testing.assert_array_equal(predictions(other, frame), predictions(other, theirs))
    # The same when the bundle has never heard of some items, and must make their vectors from the text.
    known = other.items.filter(pl.int_range(pl.len()) % 3 != 0)
    forgetful = replace(other)
    forgetful.__dict__["items"] = known
    assert np.allclose(predictions(forgetful, frame), predictions(other, theirs), atol=1e-5)


def test_small_storage_costs_little_quality_and_says_how_much(world: World) -> None:
    found = storage_cost(world.bundle, read_frame(world.directory / "frame"))
    assert list(found) == ["float32", "float16", "int8"]
    assert abs(found["float16"] - found["float32"]) < 1e-4
    assert abs(found["int8"] - found["float32"]) < 5e-3


def coin_flips(directory: Path, *, rows: int = 4_000) -> Dataset:
    """Events whose labels nobody can know: a bundle is right about those that it was trained on, and no others."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.integers(0, size, rows) for name, size in (("user", 400), ("item", 200), ("label", 2))}
    pl.DataFrame(drawn | {"time": np.arange(rows)}).write_parquet(directory / "events.parquet")
    text = 'name = "coins"\n[events]\npath = "events.parquet"\nuser = "user"\nitem = "item"\ntime = "time"\n'
    (directory / "coins.toml").write_text(text + 'label = { column = "label" }\n[split]\nby = "random"\n')
    return load_dataset(directory / "coins.toml")


def test_another_seeds_test_rows_that_the_champion_was_trained_on_are_not_judged(tmp_path: Path) -> None:
    dataset = coin_flips(tmp_path)
    registry = Settings(home=tmp_path / "home").open_registry()
    config = TrainConfig(batch=128, max_epochs=1, network=SMALL_NETWORK)

    def published(seed: int, gates: Gates) -> RunResult:
        options = RunOptions(seed=seed, training=config, gates=gates)
        out = tmp_path / f"out{seed}"
        return run(dataset, out, options, console=quiet(), registry=registry, until="publish")

    wide = Gates(auc=1.0, ne=9.0, calibration=1.0, slice_auc=1.0, latency=99.0, bytes=9.0, sure=1.0)
    first, second = published(0, wide), published(1, wide)
    frames = [read_frame(tmp_path / f"out{seed}" / "frame") for seed in (0, 1)]
    learnt = set(frames[0].part("train")["event"]) | set(frames[0].part("validation")["event"])
    tested = frames[1].part("test")["event"].to_list()
    clean = sum(event not in learnt for event in tested)
    assert 0 < clean < len(tested) / 4
    assert first.verdict is None
    assert second.verdict is not None
    said = int(second.verdict.note.split(" of ")[0].replace(",", ""))
    # An event like another one, by user, item and time, is none of the unseen; times are all different here.
    assert said == clean
    # Fewer than it takes: no verdict, whatever the gates.
    assert (second.verdict.answer, second.release and second.release.aliases) == ("cannot tell", ())
    # One that an earlier release published says nothing of what it learnt: the same split of the same data is known.
    trained = registry.documents.trained(first.release) if first.release else None
    assert trained is not None
    assert len(trained) == len(learnt)
