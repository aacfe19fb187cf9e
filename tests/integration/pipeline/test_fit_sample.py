"""Encoder and codebook are fitted on the whole of a small catalogue, and on a fixed sample of a large one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.content import lsa
from features.content.kinds import load_encoder
from features.dataset.descriptor import load_dataset
from features.errors import DatasetError
from features.jobs import sample
from features.jobs.sample import sample_rows
from features.jobs.shard import read_shards
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.report.health import codebook_health, held_out_items
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import run
from tests.integration.world import quiet

ITEMS, MOST = 240, 90
OPTIONS = RunOptions(quantizer="residual-kmeans", encoder_dim=4, levels=2, codes=8, seed=3)
WORDS = ("amber", "bronze", "copper", "denim", "ebony", "flax", "granite")
DESCRIPTOR = """
name = "shop"
[items]
path = "items.parquet"
id = "sku"
text = ["title"]
[events]
path = "events.parquet"
user = "user"
item = "sku"
label = { implicit = true }
[split]
by = "order"
"""


def write_shop(directory: Path, items: int = ITEMS) -> Path:
    rng = np.random.default_rng(1)
    titles = [" ".join(WORDS[index] for index in rng.integers(0, len(WORDS), 4)) for _ in range(items)]
    # Every eighth item has no text, and so a zero vector.
    titles = ["" if number % 8 == 5 else title for number, title in enumerate(titles)]
    directory.mkdir()
    ids = [f"SKU-{number}" for number in range(items)]
    pl.DataFrame({"sku": ids, "title": titles}).write_parquet(directory / "items.parquet", row_group_size=50)
    pl.DataFrame({"user": ["u1", "u2"], "sku": ["SKU-1", "SKU-2"]}).write_parquet(directory / "events.parquet")
    (directory / "shop.toml").write_text(DESCRIPTOR)
    return directory / "shop.toml"


def made(descriptor: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Runs encode and assign, and checks each fit against a fit on the rows it must have read."""
    chosen = RunOptions(**(vars(OPTIONS) | options))
    run(load_dataset(descriptor), out, chosen, console=quiet(), registry=None, until="assign")
    texts, vectors = read_shards(out / "encode" / "texts"), read_shards(out / "encode" / "vectors")
    codes = read_shards(out / "assign" / "codes")
    items = pl.read_parquet(descriptor.with_name("items.parquet"))
    assert texts["item_id"].equals(items["sku"].alias("item_id"))
    assert texts["text"].equals(items["title"].alias("text"))
    assert texts["item_id"].equals(vectors["item_id"])
    assert codes["item_id"].equals(texts["item_id"])
    rows = sample_rows(texts["item_id"])
    book = codebooks.load(out / "assign" / "codebook")
    held_out = held_out_items(len(rows), OPTIONS.seed)
    own = vectors["vector"].to_numpy()[rows]
    if not options:
        fitted = lsa.fit(texts["text"][rows].to_list(), dim=4, seed=OPTIONS.seed)
        assert load_encoder(out / "encode" / "encoder").id == fitted.id
        fit = codebooks.fit(OPTIONS.quantizer, own[~held_out], levels=2, codes=8, seed=OPTIONS.seed)
        assert book.id == fit.id
    report: dict[str, Any] = json.loads((out / "assign" / "report.json").read_text())
    parts = {"fitted": own[~held_out], "held_out": own[held_out]}
    health = codebook_health(book, codes["codes"].to_numpy()[rows], parts)
    assert report["health_items"] == len(rows)
    assert (report["items"], report["zero_vectors"]) == (texts.height, texts.height // 8)
    assert report["error"] == health.error
    assert report["perplexity"] == list(health.perplexity)
    return report


def test_a_small_catalogue_is_fitted_whole_and_in_its_order(tmp_path: Path) -> None:
    report = made(write_shop(tmp_path / "data"), tmp_path / "out")
    assert report["health_items"] == ITEMS


def test_a_large_catalogue_is_fitted_on_its_sample_and_coded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "MOST_ITEMS", MOST)
    monkeypatch.setattr("features.framing.texts._SLICE_ROWS", 70)
    # A catalogue of this size is never read whole.
    monkeypatch.setattr("features.dataset.tables.DatasetTables.items", None)
    report = made(write_shop(tmp_path / "data"), tmp_path / "out")
    assert report["health_items"] == MOST
    # A warm start names the codes after those of the items that both runs have.
    grown = write_shop(tmp_path / "grown", items=ITEMS + 40)
    for stage in ("frame", "train"):
        (tmp_path / "out" / stage).mkdir()
        (tmp_path / "out" / stage / "stage.json").write_text('{"key": "done"}')
    assert made(grown, tmp_path / "warm", warm_start=tmp_path / "out")["health_items"] == MOST
    both = read_shards(tmp_path / "out" / "assign" / "codes").join(
        read_shards(tmp_path / "warm" / "assign" / "codes"), on="item_id", suffix="_new"
    )
    assert both.height == ITEMS
    assert (both["codes"].to_numpy()[:, 0] == both["codes_new"].to_numpy()[:, 0]).mean() > 0.6


def test_an_id_that_is_twice_in_a_large_catalogue_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_ITEMS", MOST)
    monkeypatch.setattr("features.framing.texts._SLICE_ROWS", 70)
    descriptor = write_shop(tmp_path / "data")
    path = descriptor.with_name("items.parquet")
    items = pl.read_parquet(path)
    pl.concat([items, items[7]]).write_parquet(path, row_group_size=50)
    message = (
        r"items.parquet: \[items\] column 'sku': id 'SKU-7' is in the rows 8 and 241 of the table; keep one of them"
    )
    with pytest.raises(DatasetError, match=message):
        run(load_dataset(descriptor), tmp_path / "out", OPTIONS, console=quiet(), registry=None, until="encode")
