"""Data and texts of `tessera ids report`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich.table import Table

from features.errors import TesseraError
from features.frame_blocks import example_files
from tessera.pages.coded_items import Coded, counted
from tessera.pipeline.stage import finished_key

if TYPE_CHECKING:
    from models.semantic_id.report.hits import HitRate


def hits_of(run: Path) -> "list[HitRate]":
    """Returns how often the codes of histories match the next item; nothing if the run has no frame."""
    from models.semantic_id.report.hits import hit_rates

    if not (run / "frame").is_dir():
        return []
    finished_key(run / "frame")
    items = pl.read_parquet(run / "frame" / "items.parquet", columns=["semantic_codes"])["semantic_codes"]
    known = items.is_not_null().to_numpy()
    codes = np.zeros((len(items), len(items.drop_nulls()[0])), dtype=np.uint16)
    codes[known] = items.drop_nulls().to_numpy()
    columns = ["item", "history", "label", "split"]
    examples = pl.scan_parquet(example_files(run / "frame"), glob=False).select(columns)
    return hit_rates(codes, known, examples.collect())


def new_items_drift(run: Path, descriptor: Path, coded: Coded, seed: int) -> dict[str, Any]:
    """Codes the items of a descriptor that the run does not know, and compares them with those it held out.

    If a run held out too few items, all its items are compared.

    Raises:
        TesseraError: There are too few new items.
    """
    from features.content.content import contents, fields_of
    from features.content.kinds import load_encoder
    from features.dataset.descriptor import load_dataset
    from features.dataset.tables import read_items
    from features.jobs.sample import sample_rows
    from models.semantic_id.codebook.kinds import load
    from models.semantic_id.content_path import ContentPath
    from models.semantic_id.report.drift import drift
    from models.semantic_id.report.health import held_out_items

    dataset = load_dataset(descriptor)
    encoder = load_encoder(run / "encode" / "encoder")
    items = read_items(dataset, fields=fields_of(encoder)) if dataset.has_content else None
    if items is None:
        raise TesseraError(f"{descriptor}: --new needs [items] with text")
    new = items.filter(~pl.col("item_id").is_in(coded.ids))
    texts = contents(new.with_columns(pl.col("text").fill_null("")))
    book = load(run / "assign" / "codebook")
    path = ContentPath(encoder, book)
    vectors = path.encode(texts).vectors if texts else coded.vectors[:0]
    sample = sample_rows(pl.Series(coded.ids))
    unseen = coded.vectors[sample][held_out_items(len(sample), seed)]
    difference = drift(book, unseen, vectors) or drift(book, coded.vectors, vectors)
    if difference is None:
        raise TesseraError(f"{descriptor}: {counted(len(texts))} are new to {run}; drift shows in 20 and more")
    return asdict(difference)


def advise(health: dict[str, Any], quality: dict[str, Any], shape: tuple[int, int]) -> list[str]:
    """Returns advice in sentences.

    Args:
        shape: Levels and codes recommended for the catalogue's size.
    """
    levels, codes = shape
    advice = []
    if health["codes"] > 2 * codes:
        advice.append(
            f"{health['codes']:,} codes a level are many for {quality['items']:,} items: {levels} x {codes} "
            f"(levels = {levels}, codes = {codes} in [run]) fill their codes more evenly"
        )
    for level, share in enumerate(health["perplexity"], 1):
        if share < 0.5:
            advice.append(
                f"level {level} spreads as if over {share:.0%} of its {health['codes']:,} codes: choose fewer codes "
                f"(codes = {codes} in [run]), or balanced-kmeans"
            )
    advice += [
        f"level {level} collapsed: it uses under half of the codes it could; refit with fewer codes"
        for level in health.get("collapsed") or ()
    ]
    if quality["sharing"] > 0.2 * quality["items"]:
        share = quality["sharing"] / quality["items"]
        advice.append(f"{share:.0%} of the items share their Semantic ID: more levels or codes would tell them apart")
    advice += (health.get("drift") or {}).get("flags", ())
    errors = health["error"]
    if not health.get("drift") and errors.get("held_out", 0) > 1.15 * errors.get("fitted", 1):
        advice.append(
            f"items that were held out are coded worse ({errors['held_out']:.3f} of their spread is lost, "
            f"{errors['fitted']:.3f} of the others'): new items fit the codebook less well, refit when many came"
        )
    return advice or ["no advice"]


def hits_table(hits: list[dict[str, Any]]) -> Table:
    """Returns a row for each group of items, a column for each depth."""
    table = Table(title="Share of next liked items that share codes with the history", title_justify="left")
    table.add_column("items")
    table.add_column("events", justify="right")
    for depth in range(1, len(hits[0]["rate"]) + 1):
        table.add_column(f"1–{depth} (by chance)", justify="right")
    for group in hits:
        cells = [f"{own:.1%} ({chance:.1%})" for own, chance in zip(group["rate"], group["by_chance"], strict=True)]
        table.add_row(group["group"], f"{group['events']:,}", *cells)
    table.caption = "frequent: the fifth of the items with most training events; chance: other users' histories"
    return table


def depth_table(name: str, quality: dict[str, Any]) -> Table:
    """Returns a row for each depth of a coding."""
    distinct, crowd = f"{quality['unique']:.1%} distinct IDs", f"largest group {quality['largest_group']:,}"
    title = f"{name}: {quality['items']:,} items, {distinct}, {crowd}"
    table = Table(title=title, title_justify="left")
    for column in ("depth", "used", "perplexity", "branching", "nodes", "node size", "shared", "purity"):
        table.add_column(column, justify="right")
    for depth in quality["depths"]:
        low, middle, high = depth["sizes"]
        purity = "–" if depth["purity"] is None else f"{depth['purity']:.3f}"
        table.add_row(
            f"1–{depth['depth']}",
            f"{depth['used']:,}",
            f"{depth['perplexity']:.1f}",
            f"{depth['branching']:.1f}",
            f"{depth['nodes']:,}",
            f"{low:.0f}·{middle:.0f}·{high:.0f}",
            f"{depth['shared']:.1%}",
            purity,
        )
    table.caption = f"purity: mean cosine of items that share the codes; of all pairs {quality['cosine']:.3f}"
    return table
