"""Writes the files of a small tea shop, so that a guide can be followed by somebody who has no data at hand.

Everything here is synthetic: what customers came for says which categories they love, each loves one more of their own,
and they click on what they love. The files look as a shop's own do: a catalogue as csv, customers as parquet, clicks as
JSON lines by month; and what comes in on the day after.

    python make_shop.py data
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

SEED, PRODUCTS, CUSTOMERS, CLICKS, LATER = 7, 400, 300, 16_000, 300
START_S, DAY_S, DAYS = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp()), 86_400, 59
LOVED, OTHER = 0.75, 0.12  # how often something of a loved category is clicked, and something of another
SEGMENTS: dict[str, tuple[str, ...]] = {
    "home": ("green tea", "herbal tea", "sweets"),
    "office": ("coffee", "grinders"),
    "gifts": ("cups", "sweets", "black tea"),
    "kitchen": ("kettles", "grinders", "cups"),
}
COUNTRIES = ("DE", "FR", "IT", "NL", "PL")
ORIGINS = ("china", "japan", "india", "local")
CATEGORIES: dict[str, tuple[str, str]] = {
    "green tea": ("sencha gyokuro bancha longjing matcha genmaicha", "grassy steamed umami fresh spring leaf"),
    "black tea": ("assam darjeeling ceylon keemun lapsang breakfast", "malty robust amber brisk smoky morning"),
    "herbal tea": (
        "chamomile rooibos peppermint hibiscus verbena ginger",
        "soothing caffeine-free floral evening calm",
    ),
    "coffee": ("espresso arabica robusta filter mocha ristretto", "roasted beans crema bitter chocolate aroma"),
    "cups": ("mug cup tumbler bowl saucer beaker", "glazed porcelain handle stoneware handmade saucer"),
    "kettles": ("kettle gooseneck samovar boiler cauldron pot", "steel electric temperature litre pour whistle"),
    "grinders": ("grinder mill burr mortar hand-mill crusher", "ceramic burrs dial coarse fine crank"),
    "sweets": ("biscuit shortbread nougat caramel truffle fudge", "butter almond sugar crunchy honey vanilla"),
}
NAMES = tuple(CATEGORIES)


def main(directory: Path) -> None:
    """Writes all files; the same bytes each time."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    products, category, segment, loved = shop(rng)
    pl.DataFrame(products).write_csv(directory / "products.csv")
    customers = {
        "customer": [f"c{row:03}" for row in range(CUSTOMERS)],
        "country": [COUNTRIES[number] for number in rng.integers(len(COUNTRIES), size=CUSTOMERS)],
        "segment": segment,
    }
    pl.DataFrame(customers).write_parquet(directory / "customers.parquet")
    seconds = np.sort(rng.integers(DAYS * DAY_S, size=CLICKS))
    # A tenth of the products came in the last ten days.
    fresh = rng.random(PRODUCTS) < 0.1
    clicks = shown(seconds, category, loved, fresh, rng)
    for month in ("2025-01", "2025-02"):
        write_lines(directory / f"clicks-{month}.jsonl", [row for row in clicks if row["at"].startswith(month)])
    for hour, name in ((8, "morning"), (12, "noon"), (18, "evening")):
        begin = DAYS * DAY_S + hour * 3_600
        later = shown(np.sort(rng.integers(begin, begin + 1_800, size=LATER)), category, loved, fresh, rng)
        write_lines(directory / f"{name}.jsonl", [row | {"_event_id": f"{name}-{n}"} for n, row in enumerate(later)])
    new = [product(f"SKU-{PRODUCTS + row:03}", row, rng) for row in range(len(NAMES))]
    write_lines(directory / "new-products.jsonl", new)
    print(f"{PRODUCTS} products, {CUSTOMERS} customers, {CLICKS:,} clicks or passes (synthetic) in {directory}")


def shop(rng: np.random.Generator) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray, np.ndarray]:
    """The catalogue, its categories (P,), the customers' segments (C,), and which categories they love (C, 8)."""
    category = rng.integers(len(NAMES), size=PRODUCTS)
    products = [product(f"SKU-{row:03}", int(category[row]), rng) for row in range(PRODUCTS)]
    segment = rng.choice(list(SEGMENTS), CUSTOMERS)
    loved = np.array([[name in SEGMENTS[found] for name in NAMES] for found in segment])
    loved[np.arange(CUSTOMERS), rng.integers(len(NAMES), size=CUSTOMERS)] = True
    return products, category, segment, loved


def product(sku: str, category: int, rng: np.random.Generator) -> dict[str, Any]:
    """One row of the catalogue."""
    kinds, words = (found.split() for found in CATEGORIES[NAMES[category]])
    kind, (one, two, three) = rng.choice(kinds), rng.choice(words, 3, replace=False)
    origin = ORIGINS[int(rng.integers(len(ORIGINS)))]
    return {
        "sku": sku,
        "title": f"{one.capitalize()} {kind}",
        "description": f"A {two} {kind} from {origin}, {three}. For those who like {NAMES[category]}.",
        "category": NAMES[category],
        "tags": "|".join(sorted({origin, str(one)})),
        "price": round(float(rng.lognormal(2.5, 0.6)), 2),
    }


def shown(
    seconds: np.ndarray, category: np.ndarray, loved: np.ndarray, fresh: np.ndarray, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Returns the shown items: user, item, time, and a click or none."""
    rows = []
    for second in seconds.tolist():
        customer, sku = int(rng.integers(CUSTOMERS)), int(rng.integers(PRODUCTS))
        while fresh[sku] and second < (DAYS - 10) * DAY_S:
            sku = int(rng.integers(PRODUCTS))
        clicked = rng.random() < (LOVED if loved[customer, category[sku]] else OTHER)
        at = datetime.fromtimestamp(START_S + second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        rows.append({"customer": f"c{customer:03}", "sku": f"SKU-{sku:03}", "at": at, "clicked": int(clicked)})
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
