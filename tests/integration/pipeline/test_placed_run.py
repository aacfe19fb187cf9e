"""A run on clicks that the position decides in part, and a gate between bundles with and without a position path."""

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from features.dataset.descriptor import load_dataset
from features.shown.message import Impression, Outcome, encode
from models.bundle.bundle import Bundle, load_bundle, write_manifest
from models.ranker.train import predict_part
from models.registry.gate import Check, Gates
from models.table.placement import PlacementColumn
from tessera.cli.main import app
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import verdict
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.pipeline.warm_start import as_chosen
from tests.integration.world import quiet

START = 1_700_000_000_000
EXAMINED = (0.9, 0.5, 0.2, 0.1)
TEXT = """
name = "shown"
[events]
from = "impressions"
path = "shown.jsonl"
outcomes_path = "done.jsonl"
window = "1m"
{placement}
[split]
by = "time"
[run.training]
batch = 64
max_epochs = 3
"""
PLACEMENT = 'placement = { position = "position" }'


@dataclass(frozen=True)
class Trained:
    """A run with a placement, and a bundle of the same logs without."""

    directory: Path
    placed: Bundle
    blind: Bundle


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place, draw = tmp_path_factory.mktemp("placed"), random.Random(2)
    shown, done = [], []
    for number in range(3_500):
        # The older ranker has odd items at the top, whose clicks therefore say less.
        items = sorted(draw.sample(range(20), 4), key=lambda item: item % 2 + draw.random())
        at = START + 1_000 * number
        one = Impression(f"r{number}", f"u{draw.randrange(30)}", at, "b", "shown", items=[f"i{item}" for item in items])
        shown.append(encode(one))
        done += [
            encode(Outcome(one.id, f"i{item}", at + 5_000))
            for item, look in zip(items, EXAMINED, strict=True)
            if draw.random() < look * (0.7 if item < 10 else 0.3)
        ]
    (place / "shown.jsonl").write_bytes(b"\n".join(shown))
    (place / "done.jsonl").write_bytes(b"\n".join(done))
    bundles = {}
    for name, placement in (("placed", PLACEMENT), ("blind", "")):
        (place / f"{name}.toml").write_text(TEXT.format(placement=placement))
        dataset = load_dataset(place / f"{name}.toml")
        made = run(dataset, place / name, load_options(dataset), console=quiet(), registry=None, until="publish")
        assert made.bundle is not None
        bundles[name] = made.bundle
    return Trained(place, bundles["placed"], bundles["blind"])


def checks(champion: Bundle, challenger: Bundle, directory: Path) -> dict[str, Check]:
    """Returns the checks of quality by name."""
    found = verdict(champion, challenger, read_frame(directory / "placed" / "frame"), Gates(latency=100.0, bytes=100.0))
    return {check.name: check for check in found.checks if "latency" not in check.name and check.name != "bytes"}


def with_path(bundle: Bundle, destination: Path, factor: float) -> Bundle:
    """Returns the same bundle with another path and another constant."""
    shutil.copytree(bundle.directory, destination)
    network = load_file(destination / "network.safetensors")
    network["placement.weight"] = network["placement.weight"] * factor + 0.01
    network["placement.reference"] = torch.tensor(-1.5)
    save_file(network, destination / "network.safetensors")
    write_manifest(destination, bundle.manifest)
    return load_bundle(destination)


def test_the_path_stays_and_the_metrics_say_why(trained: Trained) -> None:
    metrics = trained.placed.manifest.metrics
    assert metrics["placement"]["kept"]
    assert metrics["placement"]["gain"] > metrics["placement"]["error"]
    assert trained.placed.schema.placement[0].column == "position"
    assert metrics["served"]["all"]["auc"] < metrics["quality"]["ranker"]["all"]["auc"]
    assert "served" not in trained.blind.manifest.metrics


def test_a_gate_tells_both_bundles_the_places(trained: Trained, tmp_path: Path) -> None:
    """No bundle passes because it knows positions: one with another path has the same checks."""
    found = checks(trained.blind, trained.placed, trained.directory)
    auc = found["all: AUC"]
    assert auc.challenger == pytest.approx(trained.placed.manifest.metrics["quality"]["ranker"]["all"]["auc"], abs=1e-9)
    # Logged positions would have given the challenger a lead that says nothing about the order of items.
    frame = read_frame(trained.directory / "placed" / "frame")
    logged = [
        predict_part(bundle.ranker(), bundle.schema, frame, frame.blocks("test"), bundle.admission())
        for bundle in (trained.blind, trained.placed)
    ]
    labels = frame.part("test")["label"].to_numpy()
    lead = [float(one[labels == 1].mean() - one[labels == 0].mean()) for one in logged]
    assert lead[1] > lead[0] + 0.05
    assert auc.champion is not None
    assert auc.challenger is not None
    assert abs(auc.challenger - auc.champion) < 0.03
    assert found["all: NE"].passed
    other = checks(trained.blind, with_path(trained.placed, tmp_path / "other", -3.0), trained.directory)
    assert other.keys() == found.keys()
    for name, check in found.items():
        assert other[name].passed == check.passed, name
        # Float32 rounds the probabilities, since the other constant moves all of them.
        assert other[name].challenger == pytest.approx(check.challenger, abs=1e-3), name


def test_propensities_say_that_the_path_was_left_out(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.blind.directory, tmp_path / "b")
    dataset = trained.blind.manifest.dataset | {"events": trained.placed.manifest.dataset["events"]}
    write_manifest(tmp_path / "b", msgspec.structs.replace(trained.blind.manifest, dataset=dataset))
    asked = ["propensities", str(trained.directory / "placed.toml"), "--bundle", str(tmp_path / "b")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    assert "its run found that the path does not pay" in str(done.exception)


def test_a_warm_start_has_the_path_of_the_earlier_run(trained: Trained) -> None:
    blind, placed = trained.blind.schema, trained.placed.schema
    assert as_chosen(placed, blind).placement == ()
    longer = replace(placed, placement=(PlacementColumn("position", positions=9),))
    assert as_chosen(longer, placed).placement == placed.placement
    # A path of columns that the new run does not declare stays a difference, which the warm start refuses.
    assert as_chosen(blind, placed).placement == ()
