"""Files of a small shop, of the shape that the README's descriptor names."""

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

PRODUCTS, CUSTOMERS, CLICKS = 60, 50, 3_000
_KINDS = ("bicycle", "kettle", "lamp", "scarf")
_COLOURS = ("red", "blue", "green")
_START = datetime(2026, 1, 1, tzinfo=UTC)


def write_shop(folder: Path, descriptor: str, *, seed: int = 0) -> Path:
    """Writes products, clicks and the descriptor into a folder; returns the descriptor's path.

    A customer likes one kind of product, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, len(_KINDS), PRODUCTS)
    rows = [_product(number, _KINDS[kind], rng) for number, kind in enumerate(kinds.tolist())]
    pl.DataFrame(rows).write_parquet(folder / "products.parquet")
    with gzip.open(folder / "clicks-2026-01.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(CLICKS):
            customer, product = int(rng.integers(CUSTOMERS)), int(rng.integers(PRODUCTS))
            liked = rng.random() < (0.8 if customer % len(_KINDS) == kinds[product] else 0.2)
            click = {
                "customer": f"customer-{customer}",
                "sku": f"SKU-{product}",
                "at": (_START + timedelta(minutes=10 * number)).isoformat(),
                "stars": int(rng.integers(4, 6) if liked else rng.integers(1, 3)),
            }
            file.write(json.dumps(click) + "\n")
    path = folder / "shop.toml"
    path.write_text(descriptor, encoding="utf-8")
    return path


def _product(number: int, kind: str, rng: np.random.Generator) -> dict[str, object]:
    colour = _COLOURS[int(rng.integers(len(_COLOURS)))]
    words = " ".join(rng.choice(["light", "new", "large", "small", "warm", "sturdy", "cheap"], size=3, replace=False))
    return {
        "sku": f"SKU-{number}",
        "title": f"a {colour} {kind}",
        "description": f"{words} {kind} in {colour}",
        "price": round(float(rng.uniform(20, 500)), 2),
    }
