"""Send values that exist only at the request: a device with each request, and the price shown now with each candidate.

    python examples/request_fields.py out/request-fields

The shop is made up. Its customers buy what costs less now than it usually does, so the feature that decides is a
quotient of a candidate's field and a column of the item.
"""

import sys
from pathlib import Path

import numpy as np
import polars as pl

import tessera

DESCRIPTOR = """
name = "discounts"
[items]
path = "items.parquet"
id = "sku"
numeric = ["price"]
[events]
path = "events.parquet"
user = "customer"
item = "sku"
time = "at"
label = { column = "bought" }
[events.request]
device = { type = "category", default = "web" }
[events.candidate]
price_now = { type = "number" }
[features]
discount = "event.price_now / item.price"
[split]
by = "time"
[run]
aggregates = "off"
"""


def write_shop(place: Path, *, events: int = 6_000) -> Path:
    """Writes items, events and the descriptor; returns the descriptor's path."""
    rng = np.random.default_rng(0)
    price = rng.uniform(5, 50, 40).round(2)
    item, share = rng.integers(0, len(price), events), rng.choice([0.5, 0.75, 1.0, 1.25], events)
    place.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"sku": [f"S{n}" for n in range(len(price))], "price": price}).write_parquet(place / "items.parquet")
    pl.DataFrame(
        {
            "customer": pl.Series(rng.integers(0, 200, events)).cast(pl.String),
            "sku": pl.Series(item).cast(pl.String).str.replace("^", "S"),
            "at": 1_735_689_600 + 60 * np.arange(events),
            "bought": (rng.random(events) < 1.3 - share).astype(np.int64),
            "device": rng.choice(["phone", "web"], events),
            "price_now": (price[item] * share).round(2),
        }
    ).write_parquet(place / "events.parquet")
    (place / "shop.toml").write_text(DESCRIPTOR)
    return place / "shop.toml"


def main(out: str) -> tuple[float, float]:
    """Trains on the shop, and ranks one item at half its price and at its price; returns both scores."""
    place = Path(out).absolute()
    dataset = tessera.load_dataset(write_shop(place))
    bundle = tessera.run(dataset, place / "run", until="publish").bundle
    assert bundle is not None
    price = bundle.items["price"][0]
    candidates = [{"item_id": "S0", "price_now": share * price} for share in (0.5, 1.0)]
    cheap, usual = bundle.rank("7", candidates, context={"device": "phone"}).tolist()
    print(f"S0 at half its price {cheap:.3f}, at its price {usual:.3f}")
    return cheap, usual


if __name__ == "__main__":
    main(sys.argv[1])
