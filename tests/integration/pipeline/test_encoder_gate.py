"""Gates on measures of the encoder: a worse encoder is refused by name, and too few queries leave the answer open."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.frame import Frame
from models.bundle.bundle import Bundle, load_bundle
from models.encoder.judging.measures import LEAST_QUERIES, MEASURES
from models.registry.documents import ENCODER_REPORT
from models.registry.encoder_gate import compare_encoders
from models.registry.gate import BundleQuality, Gates, judge
from tessera.encoders.registered import RunDocuments, keep_documents
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import verdict
from tessera.settings import Settings
from tests.integration.world import World

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
LOOSE = Gates(auc=1, ne=9, calibration=1, slice_auc=1, latency=99, bytes=9, sure=0.2)
NOTHING = BundleQuality("", {}, 1.0, 1)


@pytest.fixture(scope="module")
def frame(world: World) -> Frame:
    return read_frame(world.directory / "frame")


def scrambled(items: pl.DataFrame) -> pl.DataFrame:
    """Items whose vectors were dealt out among them, as by an encoder that reads nothing of a text."""
    order = np.random.default_rng(3).permutation(items.height)
    return items.with_columns(items["content_vector"].gather(order))


def test_an_equal_encoder_passes_and_a_worse_encoder_is_refused_by_name(world: World, frame: Frame) -> None:
    gates = replace(LOOSE, encoder={"recall_later": 0.02, "aspects": 0.02})
    same = verdict(world.bundle, world.bundle, frame, gates)
    named = {check.name: check for check in same.checks}
    assert named["encoder.recall_later"].champion == named["encoder.recall_later"].challenger
    assert same.passed
    champion = world.bundle, frame.items
    worse = compare_encoders(champion, (world.bundle, scrambled(frame.items)), frame, gates.encoder)
    checks = judge(NOTHING, NOTHING, gates, {}, worse)
    assert [check.name for check in checks if not check.passed] == ["encoder.recall_later", "encoder.aspects"]
    better = compare_encoders((world.bundle, scrambled(frame.items)), champion, frame, gates.encoder)
    assert all(check.passed and check.told for check in judge(NOTHING, NOTHING, gates, {}, better))


def test_too_few_queries_cannot_tell(world: World, frame: Frame) -> None:
    few = Frame(frame.users, frame.items, frame.examples.filter(pl.col("split") == "train"))
    gates = replace(LOOSE, encoder={"recall_later": 0.02})
    found = compare_encoders((world.bundle, few.items), (world.bundle, few.items), few, gates.encoder)
    assert found["recall_later"].queries < LEAST_QUERIES
    (check,) = (check for check in judge(NOTHING, NOTHING, gates, {}, found) if check.name == "encoder.recall_later")
    assert check.passed
    assert not check.told


def test_every_measure_is_told_of_a_catalogue_with_text(world: World, frame: Frame) -> None:
    both = world.bundle, frame.items
    found = compare_encoders(both, both, frame, MEASURES)
    assert list(found) == list(MEASURES)
    for name in ("recall_later", "search", "aspects", "concepts", "conditional"):
        measure = found[name]
        assert measure.champion is not None, name
        assert measure.challenger == measure.champion
        assert 0 < measure.champion <= 1
        assert measure.drop is not None
        assert measure.drop.worse == 0


def test_measures_and_reports_are_kept_with_the_version(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    kept = RunDocuments(
        {ENCODER_REPORT: {"measures": {"recall_new": 0.25}}}, {}, {"recall_new": 0.25, "passages": None}
    )
    assert keep_documents(world.directory, kept, settings) is None
    registry = settings.open_registry()
    published: Bundle = load_bundle(world.directory / "publish" / "bundle")
    release = registry.publish(published, params={}, metrics={})
    assert keep_documents(world.directory, kept, settings) == release
    run = registry._tracking.run(registry._tracking.version(release.model, release.version).run_id)
    assert run.data.metrics == {"encoder.recall_new": 0.25}
    assert registry.documents.get(release, ENCODER_REPORT) == {"measures": {"recall_new": 0.25}}
    other = tmp_path / "other"
    shutil.copytree(world.directory / "publish" / "bundle", other / "publish" / "bundle")
    manifest = other / "publish" / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(published.id, "0" * len(published.id)))
    assert keep_documents(other, kept, settings) is None
