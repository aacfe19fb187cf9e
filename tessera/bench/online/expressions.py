"""`expressions`: the time of the stream's step with five expressions, beside the same five features sent as columns.

All arms declare the columns that the expressions read, so that every arm decodes, shapes and looks them up. The arms
take turns on each micro-batch, and a ratio is that of one batch. Times are processor time of all threads, so that other
work of the machine does not count. Shape letter: N micro-batches.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.tables import load_events, message_columns
from features.jobs.messages import encode_rows
from models.bundle.bundle import Bundle
from models.ranker.train import TrainConfig
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.run import RunOptions, run

MOST_LOSS = 1.10
"""Largest ratio of a step with expressions to a step with the same features as columns."""
_WARM_UP = 10
_COLUMNS = '\ncategorical = ["device", "page"{categorical}]\nnumeric = ["price", "weight"{numeric}]\n'
_ONE_TABLE = {
    "per_kg": ("event.price / NULLIF(event.weight, 0)", "numeric"),
    "scale": ("LN(1 + ABS(event.price)) * SQRT(event.weight)", "numeric"),
    "filled": ("COALESCE(event.price, 7)", "numeric"),
    "cross": ("event.device || '/' || event.page", "categorical"),
    "hour": ("EXTRACT(HOUR FROM event.time)", "categorical"),
}
_TWO_TABLES = {
    "per_year": ("event.price / NULLIF(item.year, 0)", "numeric"),
    "age": ("EXTRACT(YEAR FROM event.time) - item.year", "numeric"),
    "filled": ("COALESCE(event.price, item.year)", "numeric"),
    "cross": ("event.device || '/' || item.format", "categorical"),
    "reader": ("user.country || '/' || event.page", "categorical"),
}
ARMS = ("without", "columns", "one table", "two tables")


@dataclass(frozen=True)
class ExpressionSizes:
    """Sizes of the measurement.

    Attributes:
        events: Events of the synthetic data.
        batch: Messages of a micro-batch.
        batches: Timed micro-batches for each seed.
    """

    events: int = 40_000
    batch: int = 256
    batches: int = 100


def expressions(out: Path, *, seeds: int, console: Console, sizes: ExpressionSizes = ExpressionSizes()) -> BenchResult:
    """Measures all arms once for each seed."""
    arms = {arm: _arm(out / arm.replace(" ", "-"), arm, sizes, console) for arm in ARMS}
    rows = measured_rows()
    for seed in range(seeds):
        times = _times(arms, sizes, seed)
        for arm, taken in times.items():
            ratios = {f"to {other}": float(np.median(taken / times[other])) for other in ("without", "columns")}
            rows.append({"seed": seed, "arm": arm, "cpu ms": float(np.median(taken)), **ratios})
    return BenchResult("expressions", "synthetic", seeds, rows, claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims: the median ratio over seeds of each kind of expressions."""
    return [
        at_most(
            f"step with five expressions over {arm}, against the same features as columns",
            float(np.median([row["to columns"] for row in rows if row["arm"] == arm])),
            MOST_LOSS,
        )
        for arm in ("one table", "two tables")
    ]


def _arm(directory: Path, arm: str, sizes: ExpressionSizes, console: Console) -> tuple[Bundle, list[bytes]]:
    """Returns the bundle of an arm, and the messages that it reads."""
    path = write_synthetic(directory / "data", users=500, items=500, events=sizes.events)
    made = {"one table": _ONE_TABLE, "two tables": _TWO_TABLES}.get(arm, {})
    sent = _ONE_TABLE if arm == "columns" else {}
    names = {
        kind: "".join(f', "{name}"' for name, (_, own) in sent.items() if own == kind)
        for kind in ("categorical", "numeric")
    }
    text = path.read_text().replace("text = [", 'read = { year = "number" }\n# text = [')
    text = text.replace("\n[split]", _COLUMNS.format(**names) + "\n[split]")
    declared = "".join(f"{name} = {{ sql = \"{sql}\", kind = '{kind}' }}\n" for name, (sql, kind) in made.items())
    path.write_text(text + "\n[features]\n" + declared)
    events = pl.read_parquet(path.parent / "events.parquet")
    rng = np.random.default_rng(0)
    events = events.with_columns(
        pl.Series("device", np.array(["phone", "tablet", "web", None])[rng.integers(0, 4, events.height)].tolist()),
        pl.Series("page", rng.choice(["home", "search", "cart"], events.height)),
        pl.Series(
            "price", np.where(rng.random(events.height) < 0.1, np.nan, rng.normal(20, 9, events.height).round(2))
        ),
        pl.Series("weight", rng.integers(0, 9, events.height) / 2),
    )
    _with_sent(events, sent).write_parquet(path.parent / "events.parquet")
    dataset = load_dataset(path)
    options = RunOptions(aggregates="off", training=TrainConfig(max_epochs=1))
    bundle = run(dataset, directory / "run", options, console=console, registry=None, until="publish").bundle
    assert bundle is not None
    return bundle, _messages(dataset, sizes)


def _with_sent(events: pl.DataFrame, sent: Mapping[str, tuple[str, str]]) -> pl.DataFrame:
    """Returns events with the values of features as columns, as a team would compute them."""
    found = pl.SQLContext(event=events.with_columns(time=pl.from_epoch("time", time_unit="s")))
    columns = [
        found.execute(f"SELECT {sql} AS {name} FROM event", eager=True).to_series().alias(name)
        for name, (sql, _) in sent.items()
    ]
    return events.with_columns(columns)


def _messages(dataset: Dataset, sizes: ExpressionSizes) -> list[bytes]:
    rows = message_columns(load_events(dataset), dataset.events)
    return encode_rows(rows.tail((_WARM_UP + sizes.batches) * sizes.batch))


def _times(
    arms: Mapping[str, tuple[Bundle, list[bytes]]], sizes: ExpressionSizes, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Returns the processor milliseconds (N,) of each micro-batch, by arm. The seed decides who begins."""
    topics = Topics()
    steps = {
        arm: Step(bundle, topics, lateness_s=NEVER_LATE_S, trained_until=-(2**62)) for arm, (bundle, _) in arms.items()
    }
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    order, now = list(arms), time.time_ns() // 1_000_000
    for number in range(_WARM_UP + sizes.batches):
        turn = (number + seed) % len(order)
        for arm in order[turn:] + order[:turn]:
            first = number * sizes.batch
            lines = arms[arm][1][first : first + sizes.batch]
            batch = [Message(topics.events, 0, first + place, None, line, now) for place, line in enumerate(lines)]
            began = time.process_time()
            outcome = steps[arm].apply(batch)
            taken[arm].append(1_000 * (time.process_time() - began))
            assert outcome.events == len(batch), f"{arm}: {outcome.bad[:1]}"
    return {arm: np.array(found[_WARM_UP:]) for arm, found in taken.items()}
