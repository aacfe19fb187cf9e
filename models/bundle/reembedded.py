"""Makes the bundle of a re-embedded catalogue: the items' vectors change space, table, network and codes stay.

The bundle holds the map back to the old space. Codebook and ranker read through the map, so items that the stream adds
get codes and scores, and retrieval compares vectors of the new space alone. Published items keep the vectors that
the ranker reads, so that their scores keep their bits.

Shape letters: N items, D dim of the new space.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import polars as pl

from features.content.chain import View
from features.content.encoder import Encoder
from features.content.kinds import load_encoder
from features.content.space_map import SpaceMap
from features.content.step import Unit, VectorStep
from features.durable import write_directory
from features.errors import BundleError
from features.jobs.shard import write_parquet
from models.bundle.bundle import Bundle, load_bundle, write_manifest
from models.bundle.contents import ASPECTS, CONCEPTS, DECLARED, MAP, RANKER_VECTOR, VIEWS
from models.encoder.meaning.aspects import Aspect
from models.encoder.meaning.concepts import ConceptHead
from models.encoder.meaning.declared import fit_aspects, fit_concepts
from models.ranker.loading import content_vectors


@dataclass(frozen=True)
class NewSpace:
    """Parts of a re-embedded catalogue.

    Attributes:
        encoder: Directory of the new encoder.
        map: Map from the new encoder's space to the old encoder's.
        vectors: `item_id` and `vector`, (D,) float32 of the new space, of all items with content.
    """

    encoder: Path
    map: SpaceMap
    vectors: pl.DataFrame


def reembedded(bundle: Bundle, new: NewSpace, destination: Path) -> Bundle:
    """Writes the bundle of a re-embedded catalogue durably. The same parts give the same bytes.

    Args:
        bundle: Bundle with the old vectors.
        new: Vectors, encoder and heads of the new space.
        destination: Directory to create.

    Raises:
        BundleError: The map does not lead from the new encoder to the bundle's, or the vectors lack an item.
    """
    encoder = load_encoder(new.encoder)
    if (new.map.source, new.map.target) != (encoder.id, _read_space(bundle)):
        raise BundleError(
            f"map {new.map.id} leads from {new.map.source} to {new.map.target}, expected {encoder.id} to "
            f"{_read_space(bundle)}, which bundle {bundle.id} reads; fit the upgrade again on this run"
        )
    items = _with_vectors(bundle, new.vectors)
    views = {name: through(new.map, view) for name, view in bundle.views.items()}
    concepts, aspects = _heads(bundle, items, encoder)

    def fill(directory: Path) -> None:
        changed = ("encoder", VIEWS, CONCEPTS, ASPECTS, MAP)
        shutil.copytree(
            bundle.directory, directory, dirs_exist_ok=True, ignore=lambda at, names: _ignored(bundle, at, changed)
        )
        shutil.copytree(new.encoder, directory / "encoder")
        (directory / MAP).mkdir()
        new.map.save(directory / MAP)
        write_parquet(items, directory / "items.parquet")
        for folder, parts in ((VIEWS, views), (CONCEPTS, concepts), (ASPECTS, aspects)):
            for name, part in parts.items():
                (directory / folder / name).mkdir(parents=True)
                part.save(directory / folder / name)
        manifest = msgspec.structs.replace(
            bundle.manifest,
            encoder=encoder.id,
            map=new.map.id,
            parent=bundle.id,
            views={name: view.id for name, view in views.items()},
            concepts={name: head.id for name, head in concepts.items()},
            aspects={name: aspect.id for name, aspect in aspects.items()},
        )
        write_manifest(directory, manifest)

    write_directory(destination, fill)
    return load_bundle(destination)


def through(found: SpaceMap, view: View) -> View:
    """Returns a view of the map's target as a view of its source: the map's legs, then the steps of the view.

    Each leg's result is scaled to unit length, as the map does.
    """
    if not view.steps:
        return View(view.name, found.source)
    legs: list[VectorStep] = []
    for leg in found.legs:
        legs += [leg, Unit.of_width(leg.dim)]
    return View(view.name, found.source, (*legs, *view.steps))


def _heads(bundle: Bundle, items: pl.DataFrame, encoder: Encoder) -> tuple[dict[str, ConceptHead], dict[str, Aspect]]:
    """Fits the declared concepts and aspects of a bundle again, on vectors of the new space.

    A concept of a glossary or of examples is left out: a bundle holds neither the glossary nor the examples.
    """
    declared, seed = bundle.dataset.items, int(bundle.manifest.choices.get("seed", 0))
    if declared is None:
        return {}, {}
    by_column = declared.model_copy(update={"glossary": None, "aspects": declared.aspects if bundle.aspects else {}})
    vectors = content_vectors(items)
    head = None
    if bundle.concepts is not None:
        head = fit_concepts(by_column, items, vectors, encoder, directory=bundle.directory, seed=seed)
    aspects = fit_aspects(by_column, items, vectors, source=encoder.id, seed=seed)
    return ({} if head is None else {DECLARED: head}), aspects


def _read_space(bundle: Bundle) -> str:
    """Returns the id of the space that codebook and ranker of a bundle read."""
    return (bundle.map.target if bundle.map is not None else bundle.manifest.encoder) or ""


def _ignored(bundle: Bundle, place: str, names: tuple[str, ...]) -> set[str]:
    """Returns the names directly in the bundle's directory that the new bundle writes itself."""
    return {*names, "items.parquet", "manifest.json"} if Path(place) == bundle.directory else set()


def _with_vectors(bundle: Bundle, vectors: pl.DataFrame) -> pl.DataFrame:
    """Returns the bundle's items with vectors of the new space, and the old vectors under `RANKER_VECTOR`."""
    items = bundle.items
    if RANKER_VECTOR not in items.columns:
        items = items.rename({"content_vector": RANKER_VECTOR})
    joined = items.drop("content_vector", strict=False).join(
        vectors.select("item_id", content_vector="vector"), on="item_id", how="left", maintain_order="left"
    )
    # An item without content has no vector in any space.
    lost = joined.filter(pl.col("content_vector").is_null() & pl.col(RANKER_VECTOR).is_not_null())
    if lost.height:
        raise BundleError(
            f"{lost.height} items of bundle {bundle.id} have no vector in the new space, e.g. {lost['item_id'][0]!r}; "
            "publish the run, fit the upgrade and re-embed again"
        )
    return joined
