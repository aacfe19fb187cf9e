"""Concepts and aspects of a run: fitted by a stage, kept in the bundle, answered by a server, live in a stream."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from features.content import lsa
from features.content.space_map import SpaceMap
from features.content.step import Linear
from features.dataset.descriptor import Dataset
from features.durable import write_directory
from features.errors import BundleError, DatasetError, StoreError
from features.jobs.encode import vector_column
from features.jobs.shard import read_shards
from models.bundle.bundle import load_bundle
from models.bundle.reembedded import NewSpace, reembedded
from models.encoder.meaning.concept_fit import fit_examples
from models.ranker.loading import content_vectors
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.service import RankService
from serving.retrieval.meaning import Meant
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.redis.store import RedisStore
from tessera.demo.synthetic import new_item
from tessera.pipeline.run import RunOptions, RunResult, run
from tests.integration.serving.test_retrieve import Place
from tests.integration.world import World
from tests.servers import free_port

MEANING = {"aspects": {"subject": ("topic",), "era": ("year",)}, "concepts": "topic"}


def _declared(world: World) -> Dataset:
    items = world.dataset.items
    assert items is not None
    return world.dataset.model_copy(update={"items": items.model_copy(update=MEANING)})


def _published(dataset: Dataset, out: Path) -> RunResult:
    said = Console(file=io.StringIO(), width=200)
    return run(dataset, out, RunOptions(), console=said, registry=None, until="publish")


@pytest.fixture(scope="module")
def meant(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("meant") / "run"
    shutil.copytree(world.directory, directory)
    encoder, vectors = world.bundle.encoder, content_vectors(world.bundle.items)
    assert encoder is not None
    head = fit_examples("own", vectors[:5], vectors, source=encoder.id)
    (directory / "concepts").mkdir()
    write_directory(directory / "concepts" / "own", head.save)
    dataset = _declared(world)
    result = _published(dataset, directory)
    assert result.bundle is not None
    return World(dataset, directory, result.bundle)


@pytest.fixture
def place(meant: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(meant, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def test_the_bundle_keeps_concepts_and_aspects_by_id_and_changes_nothing_else(world: World, meant: World) -> None:
    manifest = meant.bundle.manifest
    assert set(manifest.concepts) == {"declared", "own"}
    assert set(manifest.aspects) == {"subject", "era"}
    head = meant.bundle.concepts
    assert head is not None
    assert "own" in head.names
    assert {"cooking", "wildlife"} <= set(head.names)
    before = world.bundle.manifest.files
    assert {name: manifest.files[name] for name in before if name.endswith("safetensors")} == {
        name: sha for name, sha in before.items() if name.endswith("safetensors")
    }
    assert world.bundle.concepts is None
    assert world.bundle.aspects == {}


def test_an_item_is_near_in_an_aspect_to_items_that_share_its_value(place: Place) -> None:
    topics = dict(zip(place.items["item_id"].to_list(), place.items["topic"].to_list(), strict=True))
    asked = next(name for name, topic in topics.items() if topic and len(topic) == 1)
    found = place.post("/v1/retrieve", item=asked, k=10, aspect="subject").json()
    assert found["aspect"] == "subject"
    assert all(set(topics[one["item"]]) & set(topics[asked]) for one in found["items"])
    years = dict(zip(place.items["item_id"].to_list(), place.items["year"].to_list(), strict=True))
    near = place.post("/v1/retrieve", item=asked, k=5, aspect="era").json()["items"]
    assert all(abs(years[one["item"]] - years[asked]) <= 2 for one in near)


def test_without_excludes_by_the_declared_column_wholly(place: Place) -> None:
    topics = dict(zip(place.items["item_id"].to_list(), place.items["topic"].to_list(), strict=True))
    asked = next(name for name, topic in topics.items() if topic and "cooking" in topic)
    plain = place.post("/v1/retrieve", item=asked, k=20).json()["items"]
    assert any("cooking" in topics[one["item"]] for one in plain)
    left = place.post("/v1/retrieve", item=asked, k=20, without=["cooking"]).json()["items"]
    assert len(left) == 20
    assert not any("cooking" in topics[one["item"]] for one in left)
    both = {"column": "year", "gte": 2015}
    filtered = place.post("/v1/retrieve", item=asked, k=5, without=["cooking"], filter=both).json()["items"]
    assert not any("cooking" in topics[one["item"]] for one in filtered)
    ranked = place.post("/v1/rank", user="nobody", k=20, without=["cooking"]).json()["items"]
    assert ranked
    assert not any("cooking" in topics[one["item"]] for one in ranked)


def test_avoid_steers_away_and_explain_names_shared_concepts(place: Place) -> None:
    topics = dict(zip(place.items["item_id"].to_list(), place.items["topic"].to_list(), strict=True))
    asked = next(name for name, topic in topics.items() if topic == ["cooking"])
    plain = place.post("/v1/retrieve", item=asked, k=20, explain=True).json()["items"]
    steered = place.post("/v1/retrieve", item=asked, k=20, avoid=["cooking"]).json()["items"]

    def share(items: list[dict[str, str]]) -> float:
        return float(np.mean(["cooking" in (topics[one["item"]] or []) for one in items]))

    assert share(steered) < share(plain)
    top = plain[0]["concepts"][0]
    assert top["concept"] == "cooking"
    assert top["predicted"] is ("cooking" not in topics[plain[0]["item"]])
    assert 0 <= top["share"] <= 1
    assert all(one["predicted"] for row in plain for one in row["concepts"] if one["concept"] == "own")


def test_reasons_of_a_ranking_name_the_concepts_shared_with_liked_items(place: Place) -> None:
    user = place.bundle.history["user_id"][0]
    plain = place.post("/v1/rank", user=user, k=5).json()["items"]
    assert all("concepts" not in one for one in plain)
    ranked = place.post("/v1/rank", user=user, k=5, explain=True).json()["items"]
    found = place.post("/v1/retrieve", user=user, k=200, explain=True).json()["items"]
    by_retrieval = {one["item"]: one["concepts"] for one in found}
    assert [one["concepts"] for one in ranked] == [by_retrieval[one["item"]] for one in ranked]
    assert all(one["concepts"] for one in ranked)
    stranger = place.post("/v1/rank", user="nobody", k=2, explain=True).json()["items"]
    assert all("concepts" not in one for one in stranger)


@pytest.mark.parametrize(
    ("asked", "field", "fault"),
    [
        ({"item": "a00000", "aspect": "people"}, "aspect", "choose of era, subject"),
        ({"item": "a00000", "avoid": ["jazz"]}, "avoid", "no concept 'jazz'"),
        ({"item": "a00000", "without": ["jazz"]}, "without", "no concept 'jazz'"),
    ],
)
def test_unknown_names_are_refused_by_field(place: Place, asked: dict[str, object], field: str, fault: str) -> None:
    response = place.post("/v1/retrieve", k=3, **asked)
    assert response.status_code == 422
    assert response.json()["field"] == field
    assert fault in response.json()["detail"]


def test_an_item_of_the_stream_is_found_in_aspects_and_excluded_by_concepts(place: Place) -> None:
    item = new_item(3, "sourdough bread") | {"year": 2031}
    silent = new_item(4, "sourdough bread") | {"year": 2031, "topic": None}
    assert place.post("/v1/items", items=[item, silent]).status_code == 202
    place.drain()
    topics = dict(zip(place.items["item_id"].to_list(), place.items["topic"].to_list(), strict=True))
    baking = next(name for name, topic in topics.items() if topic and set(topic) == set(item["topic"]))
    recent = {"column": "year", "gt": 2030}

    def found(**asked: Any) -> list[str]:
        answer = place.post("/v1/retrieve", k=5, filter=recent, **asked).json()
        return [one["item"] for one in answer["items"]]

    assert set(found(item=baking, aspect="subject")) == {item["item_id"], silent["item_id"]}
    assert found(item=baking, without=item["topic"][:1]) == []
    # The item without a topic is excluded because its content predicts the topic.
    assert place.post("/v1/items", items=[silent | {"_deleted": True}]).status_code == 202
    place.drain()
    assert found(item=baking, aspect="subject") == [item["item_id"]]


def test_a_head_of_another_encoder_is_refused(meant: World, world: World, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(meant.directory, directory)
    shutil.rmtree(directory / "concepts" / "own")
    vectors = content_vectors(world.bundle.items)
    head = fit_examples("own", vectors[:5], vectors, source="lsa-other")
    write_directory(directory / "concepts" / "own", head.save)
    with pytest.raises((BundleError, DatasetError), match=r"fit the concepts again|different encoders"):
        _published(meant.dataset, directory)


def test_a_damaged_head_is_refused(meant: World, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(meant.bundle.directory, directory)
    file = directory / "concepts" / "declared" / "concepts.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BundleError, match="altered"):
        load_bundle(directory)


def test_a_mirror_explains_while_the_store_is_away(meant: World, tmp_path: Path) -> None:
    store, away = MemoryStore(), RedisStore(f"redis://127.0.0.1:{free_port()}/0")
    fill_store(store, meant.bundle)
    mirror = Mirror(store, meant.bundle.id, meant.bundle.schema.aggregates)
    item = meant.bundle.items["item_id"][0]
    asked: dict[str, Any] = {"item": item, "k": 5, "meant": Meant(explain=True)}
    service = RankService(meant.bundle, store, MirrorRows(mirror, StoreRows(store, meant.bundle.id)))
    expected = service.retrieve(**asked)
    assert expected.shared
    service._live._store = away
    assert service.retrieve(**asked).shared == expected.shared
    service._live._outlasts = False
    with pytest.raises(StoreError):
        service.retrieve(**asked)


def test_a_reembedded_bundle_has_its_declared_concepts_and_aspects_in_the_new_space(
    meant: World, tmp_path: Path
) -> None:
    texts = read_shards(meant.directory / "encode" / "texts")
    encoder = lsa.fit(texts["text"].to_list(), dim=32, seed=3)
    (tmp_path / "new").mkdir()
    encoder.save(tmp_path / "new")
    rng, old = np.random.default_rng(0), meant.bundle.manifest.encoder or ""
    leg = Linear(matrix=rng.normal(size=(32, content_vectors(meant.bundle.items).shape[1])))
    found = SpaceMap(encoder.id, old, "procrustes", 100, (leg,))
    vectors = texts.select("item_id").with_columns(vector_column(encoder.encode(texts["text"].to_list())))
    bundle = reembedded(meant.bundle, NewSpace(tmp_path / "new", found, vectors), tmp_path / "bundle")
    head, before = bundle.concepts, meant.bundle.concepts
    assert head is not None
    assert before is not None
    # The bundle does not hold the examples of the added concept.
    assert (head.source, head.names) == (encoder.id, tuple(name for name in before.names if name != "own"))
    assert {aspect.head.source for aspect in bundle.aspects.values()} == {encoder.id}
    store = MemoryStore()
    fill_store(store, bundle)
    service, item = RankService(bundle, store), meant.bundle.items["item_id"][0]
    for meaning in (Meant(avoid=head.names[:1], explain=True), Meant(aspect="subject")):
        answer = service.retrieve(item=item, k=5, meant=meaning, view="base")
        assert len(answer.items) == 5
        expected = encoder.id if meaning.aspect is None else bundle.aspects["subject"].id
        assert answer.space == expected
    with pytest.raises(BundleError, match=r"leads from .* fit the upgrade again"):
        reembedded(bundle, NewSpace(tmp_path / "new", replace(found, target="lsa-other"), vectors), tmp_path / "more")
    with pytest.raises(BundleError, match=r"1 items of bundle .* have no vector"):
        reembedded(meant.bundle, NewSpace(tmp_path / "new", found, vectors[1:]), tmp_path / "more")
