"""`code-value`: where a Semantic ID pays beside the item's id, and where it does not.

One condition is changed at a time: the catalogue's text, the number of items, the events, the bytes of the table, the
levels of the code. In each condition three rankers are trained that differ in nothing else: the id alone, the id with
the Semantic ID, and the id with Semantic IDs that were dealt out among the items. New items are held out as in
`cold-start`. Nothing is claimed of a single condition: the page of Semantic IDs is written from the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.ranker.evaluate import Quality
from models.ranker.train import TrainConfig
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.offline.cold_start import ColdWorld, Variant
from tessera.pipeline.made_of import key_of

_SHARE = 1 / 3
_TRAIN = TrainConfig(patience=1)
ID, CODE, PERMUTED = "id", "id + Semantic ID", "id + permuted Semantic ID"
VARIANTS = {ID: Variant(), CODE: Variant(tokens="prefix"), PERMUTED: Variant(tokens="prefix", permuted=True)}
_LEAST = 0.005


@dataclass(frozen=True)
class Condition:
    """What differs from the dataset as it is.

    Attributes:
        words: Share of a text's words that are kept, from its beginning.
        items: Share of the items whose events are kept.
        events: Share of the training events that are kept.
        budget: Share of the table's usual rows.
        levels: Levels of a Semantic ID.
    """

    words: float = 1.0
    items: float = 1.0
    events: float = 1.0
    budget: float = 1.0
    levels: int = 3


CONDITIONS = {
    "as it is": Condition(),
    "a tenth of each text": Condition(words=0.1),
    "a third of the items": Condition(items=_SHARE),
    "a third of the training events": Condition(events=_SHARE),
    "a thirtieth of the training events": Condition(events=_SHARE / 10),
    "a tenth of the table": Condition(budget=0.1),
    "two levels": Condition(levels=2),
    "four levels": Condition(levels=4),
}


def code_value(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    conditions: Sequence[str] = tuple(CONDITIONS),
    config: TrainConfig = _TRAIN,
) -> BenchResult:
    """Trains three rankers in each condition and seed; finished trainings are kept in `out`.

    Args:
        dataset: Dataset with users, and items that have text.
        seeds: Number of seeds, from 0.
        conditions: Names in `CONDITIONS`.
        config: Training of the rankers.
    """
    rows: list[dict[str, Any]] = []
    with progress_bar(console) as progress:
        task = progress.add_task("code-value", total=len(conditions) * seeds * len(VARIANTS))
        for name in conditions:
            measured: dict[str, list[dict[str, Quality]]] = {variant: [] for variant in VARIANTS}
            for seed in range(seeds):
                condition, used = CONDITIONS[name], replace(config, seed=seed)
                world = world_of(dataset, seed, condition)
                for variant, reads in VARIANTS.items():
                    chosen = replace(reads, budget=condition.budget)
                    decided_by = (world.key, asdict(condition), asdict(chosen), asdict(used))
                    path = out / f"{key_of(name)[:8]}-{key_of(variant)[:8]}-{seed}.json"
                    found = remembered(path, __name__, decided_by, partial(world.measure, chosen, used))
                    measured[variant].append({part: msgspec.convert(one, Quality) for part, one in found.items()})
                    progress.advance(task)
            rows.append({"condition": name} | _row(measured))
    return BenchResult("code-value", dataset.name, seeds, rows, claims(rows))


def world_of(dataset: Dataset, seed: int, condition: Condition) -> ColdWorld:
    """Returns the frames of one seed under a condition."""
    return ColdWorld(
        dataset,
        seed,
        levels=condition.levels,
        texts=partial(_shortened, share=condition.words) if condition.words < 1 else None,
        thinned=_thinned(condition, seed),
    )


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges the dataset as it is: the code against the id, and against a code that says nothing."""
    judged = []
    for row in rows:
        if row["condition"] == "as it is":
            gain = "new items: AUC of id + Semantic ID less that of"
            judged.append(at_least(f"{gain} id", row["new_gain"], _LEAST))
            judged.append(at_least(f"{gain} the permuted", row["new_gain_over_permuted"], _LEAST))
    return judged


def _row(measured: dict[str, list[dict[str, Quality]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for part in ("new", "known"):
        auc = {name: np.array([one[part].auc for one in found], dtype=np.float64) for name, found in measured.items()}
        gain, over = auc[CODE] - auc[ID], auc[CODE] - auc[PERMUTED]
        row |= {
            f"{part}_id_auc": float(auc[ID].mean()),
            f"{part}_gain": float(gain.mean()),
            f"{part}_gain_std": float(gain.std(ddof=1)) if len(gain) > 1 else 0.0,
            f"{part}_gain_over_permuted": float(over.mean()),
        }
    return row


def _shortened(items: pl.DataFrame, *, share: float) -> pl.Series:
    words = items["text"].fill_null("").str.split(" ")
    kept = (words.list.len() * share).ceil().cast(pl.Int64)
    return pl.DataFrame({"words": words, "kept": kept}).select(pl.col("words").list.head("kept").list.join(" "))[
        "words"
    ]


def _thinned(condition: Condition, seed: int) -> Callable[[Frame], Frame] | None:
    if condition.items == 1 and condition.events == 1:
        return None

    def change(frame: Frame) -> Frame:
        rng = np.random.default_rng([seed, 3])
        examples = frame.examples
        if condition.items < 1:
            kept = rng.random(frame.items.height) < condition.items
            numbers = pl.Series(np.flatnonzero(~kept), dtype=pl.UInt32).implode()
            history = pl.col("history").list.eval(pl.element().filter(~pl.element().is_in(numbers)))
            examples = examples.with_columns(history).filter(pl.Series(kept[examples["item"].to_numpy()]))
        if condition.events < 1:
            lost = pl.Series(rng.random(examples.height) >= condition.events)
            examples = examples.filter(~((pl.col("split") == "train") & lost))
        return frame.replace(examples=examples)

    return change
