"""A bundle alone gives the numbers that a server of it gives: scores, embeddings and Semantic IDs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.errors import BundleError, EventError
from models.bundle.bundle import load_bundle, write_bundle
from serving.ranking.service import RankService
from tests.build import coloured_parts
from tests.integration.world import World


def test_a_bundle_scores_as_its_server_does(world: World, service: RankService) -> None:
    with_history = world.bundle.history["user_id"].unique(maintain_order=True).to_list()[:5]
    items = [*world.bundle.items["item_id"].to_list()[:20], "nobody knows this item"]
    for user in (*with_history, "nobody knows this user"):
        ranking = service.rank(user, items, len(items))
        served = dict(ranking.items)
        own = world.bundle.rank(user, items)
        assert own.dtype == np.float32
        assert own.tolist() == [np.float32(served[item]) for item in items]
    assert len({tuple(world.bundle.rank(user, items).tolist()) for user in with_history}) > 1


def test_scores_follow_the_order_of_the_items_and_none_gives_none(world: World) -> None:
    items = world.bundle.items["item_id"].to_list()[:9]
    user = world.bundle.history["user_id"][0]
    forth, back = world.bundle.rank(user, items), world.bundle.rank(user, items[::-1])
    np.testing.assert_allclose(forth, back[::-1], atol=1e-6)
    assert world.bundle.rank(user, []).shape == (0,)


def test_a_bundle_embeds_as_its_server_does(world: World, service: RankService) -> None:
    for feature in world.bundle.schema.features:
        values = ["nobody knows this value", *world.bundle.items["item_id"].to_list()[:5]]
        own = world.bundle.embed(feature.name, values)
        np.testing.assert_array_equal(own, service.embeddings.lookup(feature.name, values))
        assert own.shape == (6, service.embeddings.width(feature.name))
    with pytest.raises(EventError, match="feature 'colours' is unknown; the bundle has "):
        world.bundle.embed("colours", ["red"])


def test_semantic_ids_of_the_catalogues_texts_are_the_published_ones(world: World) -> None:
    texts = pl.read_parquet(world.directory / "encode" / "texts" / "part-00000.parquet")
    published = texts.join(world.bundle.items, on="item_id", how="left", maintain_order="left")["semantic_codes"]
    codes = world.bundle.semantic_ids(texts["text"].to_list())
    assert codes.dtype == np.uint16
    assert codes.tolist() == published.to_list()


def test_a_bundle_without_content_has_no_semantic_ids_and_says_so(tmp_path: Path) -> None:
    parts = coloured_parts(tmp_path, epochs=0)
    bare = replace(parts, encoder=None, codebook=None, tokens=None)
    bundle = write_bundle(bare, tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"has no Semantic IDs: its items have no text; name \[items\] text"):
        bundle.semantic_ids(["a red thing"])


def test_a_context_column_that_the_dataset_lacks_is_refused(world: World) -> None:
    with pytest.raises(EventError, match="context: unknown column 'weather'"):
        load_bundle(str(world.bundle.directory)).rank("u1", ["i1"], context={"weather": "rain"})
