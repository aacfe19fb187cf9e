"""Keeps the reports of encoders with the version of their run in the registry, where gates and console find them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from features.errors import BundleError
from models.registry.registry import Registry
from models.registry.release import Release
from tessera.settings import Settings

METRIC = "encoder."
"""Prefix of the names of the measures in the registry."""


@dataclass(frozen=True)
class RunDocuments:
    """Documents of a run to keep.

    Attributes:
        documents: JSON documents by name.
        pages: HTML pages by name.
        metrics: Measures to log by name; None is left out.
    """

    documents: Mapping[str, dict[str, Any]]
    pages: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)


def keep_documents(run: Path, kept: RunDocuments, settings: Settings | None = None) -> Release | None:
    """Keeps documents with the version that a run published.

    Args:
        run: Directory of the run.
        kept: Documents, pages and measures.
        settings: Address of the registry; by default from the environment.

    Returns:
        The version, or None if there is no registry or the run has not been published there.
    """
    settings = settings or Settings.from_environment()
    manifest = run / "publish" / "bundle" / "manifest.json"
    if not manifest.is_file() or not settings.has_registry:
        return None
    described = msgspec.json.decode(manifest.read_bytes())
    registry = settings.open_registry(create=False)
    release = _released(registry, described["dataset"]["name"], described["id"])
    if release is None:
        return None
    for name, content in kept.documents.items():
        registry.documents.put(release, name, content)
    for name, html in kept.pages.items():
        registry.documents.put_page(release, name, html)
    registry.documents.log(release, {f"{METRIC}{name}": one for name, one in kept.metrics.items() if one is not None})
    return release


def _released(registry: Registry, model: str, bundle: str) -> Release | None:
    if model not in registry.models():
        return None
    try:
        return registry.release(model, bundle)
    except BundleError:
        # The bundle was published to another registry, or never.
        return None
