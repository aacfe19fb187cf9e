"""Makes and registers the bundle of a re-embedded run, with which a server changes the space of its index at once."""

import shutil
from dataclasses import replace
from pathlib import Path

from features.content.space_map import ENCODER, load_map
from features.jobs.shard import read_shards
from features.training_events import TRAINED
from models.bundle.bundle import Bundle, load_bundle
from models.bundle.reembedded import NewSpace, reembedded
from models.registry.release import Release
from tessera.encoders.upgrade import map_directory
from tessera.pipeline.publish import quality_metrics
from tessera.settings import Settings

BUNDLE = "bundle"
"""Directory, in that of a map, of the bundle of the re-embedded catalogue."""


def write_reembedded(run: Path, name: str, vectors: Path) -> Bundle | None:
    """Writes the bundle of a re-embedded run into the directory of the map; returns None if the run has no bundle.

    A bundle of the run as it is published now is kept as it is.

    Args:
        run: Directory of the run.
        name: Name of the map.
        vectors: Shards of the re-embedded catalogue.
    """
    published = run / "publish" / "bundle"
    if not published.is_dir():
        return None
    parent, place = load_bundle(published), map_directory(run, name) / BUNDLE
    if place.is_dir():
        found = load_bundle(place)
        if found.manifest.parent == parent.id:
            return found
        shutil.rmtree(place)
    directory = map_directory(run, name)
    new = NewSpace(directory / ENCODER / "base-0", load_map(directory), read_shards(vectors))
    return reembedded(parent, new, place)


def register_reembedded(run: Path, bundle: Bundle, settings: Settings) -> Release:
    """Registers the bundle of a re-embedded run as a version without an alias. A registered bundle keeps its version.

    Raises:
        BundleError: The registry does not have the run's bundle, or is unavailable.
    """
    registry = settings.open_registry(create=False)
    before = registry.release(bundle.dataset.name, bundle.manifest.parent)
    lineage = replace(registry.lineage(before), encoder=bundle.manifest.encoder, parent=bundle.manifest.parent)
    trained = run / "publish" / TRAINED
    return registry.publish(
        bundle,
        params={"map": bundle.manifest.map},
        metrics=quality_metrics(bundle),
        lineage=lineage,
        trained=trained if trained.is_file() else None,
    )
