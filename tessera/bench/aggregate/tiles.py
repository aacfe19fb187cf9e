"""The frame's aggregates beside tiles as Chronon keeps them, computed by polars on the same events and one thread.

Polars sums each key's tiles, sums windows of tiles by `rolling`, and joins the newest tile before an event's own tile.
So an answer lacks the events of its own tile, and the window of a quiet key ends at its newest tile. The frame is exact
in both. Polars has no exact decay to compare with.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl

from features.aggregate.plan import AggregatePlan, Aggregation, horizon_us, with_base_rate
from features.aggregate.state import TILES
from features.aggregate_frame import with_aggregates
from features.frame import Frame
from tessera.bench.aggregate.events import generate, in_order
from tessera.bench.harness.result import Claim, at_least

_WINDOWS = ("1h", "1d", "7d")
_BASE_RATE = 0.3
_ROUNDS = 3
_WINDOWED, _DECAYED = "tessera: windows", "tessera: decay"
_TILED = "polars: tiles"
_LEAST = {_WINDOWED: 0.4, _DECAYED: 0.8}


def frame_rates(events: int, *, seed: int) -> list[dict[str, Any]]:
    """Returns a row of events a CPU second for windows and decay by the frame, and for tiles by polars.

    A process of its own gives polars one thread, since the frame has one too. Each way runs once before it is timed.
    """
    command = [sys.executable, "-m", __name__, str(events), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"POLARS_MAX_THREADS": "1"}
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def frame_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims of the frame's windows and of its decay against polars' tiles, by the medians of the seeds."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row["part"] == "frame":
            rates.setdefault(row["way"], []).append(row["events_per_s"])
    if not rates:
        return []
    tiled = float(np.median(rates[_TILED]))
    return [
        at_least(f"frame, events a second of {way} over {_TILED}", float(np.median(rates[way])) / tiled, least)
        for way, least in _LEAST.items()
    ]


def measured(events: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of `frame_rates` in this process; the ways take turns."""
    frame = in_order(generate(events, seed=seed)).frame()
    ways: dict[str, Callable[[], Any]] = {
        _WINDOWED: lambda: with_aggregates(frame, _plan(windows=_WINDOWS), base_rate=_BASE_RATE),
        _DECAYED: lambda: with_aggregates(frame, _plan(half_lives=_WINDOWS), base_rate=_BASE_RATE),
        _TILED: lambda: tiled(frame),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS + 1):
        for name, work in ways.items():
            began = time.process_time()
            work()
            spent[name].append(time.process_time() - began)
    for name, seconds in spent.items():
        yield {
            "part": "frame",
            "seed": seed,
            "way": name,
            "events": events,
            "events_per_s": events / float(np.median(seconds[1:])),
        }


def tiled(frame: Frame) -> pl.DataFrame:
    """Returns the counts and positives of users and items in each window of tiles, with the examples' columns."""
    examples = frame.examples
    known = examples.filter(pl.col("event").is_first_distinct())
    for key in ("user", "item"):
        for window in _WINDOWS:
            length = horizon_us(window)
            tile = length // TILES
            names = [f"{key}.{window}.{name}" for name in ("count", "positive")]
            tiles = (
                known.group_by(key, (pl.col("time") // tile).alias("tile"))
                .agg(pl.len().cast(pl.Int64).alias(names[0]), pl.col("label").cast(pl.Int64).sum().alias(names[1]))
                .sort(key, "tile")
                .rolling("tile", period=f"{TILES}i", group_by=key)
                .agg(pl.col(names).sum())
                .sort("tile")
            )
            # Tiles before the event's own, as a tile that is not over is not kept yet.
            asked = examples.with_columns((pl.col("time") // tile - 1).alias("tile")).sort("tile", maintain_order=True)
            joined = asked.join_asof(tiles, on="tile", by=key, tolerance=TILES, check_sortedness=False)
            examples = joined.sort("time", maintain_order=True).drop("tile")
    return examples


def _plan(*, windows: tuple[str, ...] = (), half_lives: tuple[str, ...] = ()) -> AggregatePlan:
    both = [
        Aggregation(f"{key}_{kind}", (key,), kind, windows=windows, half_lives=half_lives)
        for key in ("user", "item")
        for kind in ("count", "positive")
    ]
    return with_base_rate(AggregatePlan(tuple(both)), _BASE_RATE)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(measured(int(sys.argv[1]), int(sys.argv[2])))) + "\n")
