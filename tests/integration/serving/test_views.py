"""Views of the items' vectors: in the bundle of a run, in answers, and for items that the stream adds."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from features.content.chain import BASE, SIMILAR, View
from features.content.step import Linear
from features.durable import write_directory
from features.errors import BundleError
from models.bundle.bundle import load_bundle
from tessera.demo.synthetic import new_item
from tessera.pipeline.run import RunOptions, RunResult, run
from tests.integration.serving.test_retrieve import Place
from tests.integration.world import World


def _view(world: World, *, source: str | None = None) -> View:
    """A view that orders neighbours by other axes than the base space does."""
    encoder = world.bundle.encoder
    assert encoder is not None
    matrix = np.random.default_rng(0).normal(size=(encoder.dim, 24)) * np.linspace(1, 5, 24)
    return View(SIMILAR, source or encoder.id, (Linear(matrix=matrix),))


def _published(world: World, out: Path, view: View) -> tuple[RunResult, str]:
    """Publishes a copy of the world's run again with a view."""
    shutil.copytree(world.directory, out)
    write_directory(out / "views" / view.name, view.save)
    said = io.StringIO()
    result = run(
        world.dataset, out, RunOptions(), console=Console(file=said, width=200), registry=None, until="publish"
    )
    return result, said.getvalue()


@pytest.fixture(scope="module")
def viewed(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("viewed") / "run"
    result, _ = _published(world, directory, _view(world))
    assert result.bundle is not None
    assert set(result.executed) == {"publish"}
    return World(world.dataset, directory, result.bundle)


@pytest.fixture
def place(viewed: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(viewed, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def _expected(place: Place, number: int, count: int) -> list[str]:
    vectors = np.array(place.items["content_vector"].to_list(), dtype=np.float32)
    seen = place.bundle.views[SIMILAR].of(vectors)
    scores = seen @ seen[number]
    scores[number] = -np.inf
    return [place.items["item_id"][int(n)] for n in np.argsort(-scores)[:count]]


def test_a_view_changes_no_byte_that_codebook_and_ranker_read(world: World, viewed: World) -> None:
    before, after = world.bundle.manifest, viewed.bundle.manifest
    assert after.views == {SIMILAR: _view(world).id}
    assert {name: sha for name, sha in after.files.items() if not name.startswith("views/")} == before.files
    assert before.views == {}


def test_an_item_is_asked_in_the_similar_view_and_a_text_in_the_base(place: Place) -> None:
    ids = place.items["item_id"].to_list()
    found = place.post("/v1/retrieve", item=ids[5], k=8).json()
    assert found["view"] == SIMILAR
    assert [one["item"] for one in found["items"]] == _expected(place, 5, 8)
    base = place.post("/v1/retrieve", item=ids[5], k=8, view=BASE).json()
    assert base["view"] == BASE
    assert [one["item"] for one in base["items"]] != [one["item"] for one in found["items"]]
    assert place.post("/v1/retrieve", text="sourdough bread", k=3).json()["view"] == BASE
    assert place.post("/v1/retrieve", text="sourdough bread", k=3, view=SIMILAR).json()["view"] == SIMILAR
    assert [name for name, _ in place.service.similar(ids[5], 8)] == _expected(place, 5, 8)


def test_an_unknown_view_is_refused_by_name(place: Place) -> None:
    answer = place.post("/v1/retrieve", item=place.items["item_id"][0], view="people")
    assert (answer.status_code, answer.json()["field"]) == (422, "view")
    assert "choose of base, similar" in answer.json()["detail"]


def test_an_item_of_the_stream_is_found_in_every_view(place: Place) -> None:
    item = new_item(3, "sourdough bread") | {"year": 2031}
    assert place.post("/v1/items", items=[item]).status_code == 202
    place.drain()
    recent = {"column": "year", "gt": 2030}
    encoder = place.bundle.encoder
    assert encoder is not None
    for view in (BASE, SIMILAR):
        found = place.post("/v1/retrieve", text=item["title"], filter=recent, view=view, channels=["content"]).json()
        assert [one["item"] for one in found["items"]] == [item["item_id"]], view
    vector = np.array([place.client.get(f"/v1/items/{item['item_id']}").json()["vector"]], dtype=np.float32)
    query = encoder.encode([item["title"]])
    view = place.bundle.views[SIMILAR]
    assert found["items"][0]["score"] == pytest.approx(float(view.of(query)[0] @ view.of(vector)[0]), abs=1e-5)


def test_a_view_of_another_encoder_is_named_and_left_out(world: World, tmp_path: Path) -> None:
    result, said = _published(world, tmp_path / "run", _view(world, source="lsa-000000000000"))
    assert result.bundle is not None
    assert result.bundle.views == {}
    assert "reads vectors of lsa-000000000000" in said


def test_a_damaged_view_is_refused(viewed: World, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(viewed.bundle.directory, copy)
    (copy / "views" / SIMILAR / "step-0" / "step.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(copy)
    assert pl.read_parquet(copy / "items.parquet").height
