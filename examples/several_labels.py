"""Several labels: one ranker of clicks and purchases, and a score by a formula over both.

    python examples/several_labels.py out/several-labels

The shop is made up. Its even items are clicked often and bought seldom, its odd items the reverse. Whether somebody
bought is unknown for a third of the events.
"""

import sys
from pathlib import Path

import numpy as np
import polars as pl

import tessera

DESCRIPTOR = """
name = "purchases"
[events]
path = "events.parquet"
user = "customer"
item = "sku"
time = "at"
judge = "click"
score = "click * buy ** 0.5"
[events.labels]
click = { column = "clicked" }
buy = { column = "bought", weight = 2.0 }
[split]
by = "time"
[run]
aggregates = "off"
"""


def write_shop(place: Path, *, events: int = 6_000) -> Path:
    """Writes events and the descriptor; returns the descriptor's path."""
    rng = np.random.default_rng(0)
    item = rng.integers(0, 40, events)
    clicked = rng.random(events) < np.where(item % 2, 0.4, 0.8)
    bought = clicked & (rng.random(events) < np.where(item % 2, 0.6, 0.05))
    known = rng.random(events) < 2 / 3
    place.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {
            "customer": pl.Series(rng.integers(0, 200, events)).cast(pl.String),
            "sku": pl.Series(item).cast(pl.String).str.replace("^", "S"),
            "at": 1_735_689_600 + 60 * np.arange(events),
            "clicked": clicked.astype(np.int64),
            "bought": pl.Series(bought.astype(np.int64)).set(pl.Series(~known), None),
        }
    ).write_parquet(place / "events.parquet")
    (place / "shop.toml").write_text(DESCRIPTOR)
    return place / "shop.toml"


def main(out: str) -> tuple[float, float]:
    """Trains one ranker of both tasks; returns the mean scores of even and of odd items."""
    place = Path(out).absolute()
    bundle = tessera.run(tessera.load_dataset(write_shop(place)), place / "run", until="publish").bundle
    assert bundle is not None
    for task, quality in bundle.manifest.metrics["tasks"].items():
        print(f"{task}: test AUC {quality['all']['auc']:.3f}, {quality['all']['rows']:,} rows")
    even, odd = (bundle.rank("7", [f"S{n}" for n in range(start, 40, 2)]).mean() for start in (0, 1))
    print(f"score of even items {even:.3f}, of odd items {odd:.3f}")
    return float(even), float(odd)


if __name__ == "__main__":
    main(sys.argv[1])
