"""`encoders`: views that learn from the shop, several bases side by side, text search, static bases and long texts.

New items are those that `cold-start` holds out. Fits read the training part alone, and every table has its control.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from tessera.bench.encoder import layers, learning, reading
from tessera.bench.encoder.learning import BASE, PERMUTED, TUNED
from tessera.bench.encoder.shop import BOTH, LSA, TRANSFORMER, Shop
from tessera.bench.encoder.untouched import untouched
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows

Rows = list[dict[str, Any]]
_AUC_SEEDS = 5
_COLUMN = "people"


def encoders(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, parts: Sequence[str] | None = None
) -> BenchResult:
    """Measures the parts in every seed; finished measurements are kept in `out`.

    Args:
        dataset: Dataset with users, and items that have text.
        out: Directory of results and vectors.
        seeds: Number of seeds, from 0.
        console: Console of the progress bar.
        parts: Names in `PARTS`; all by default.

    Raises:
        TesseraError: A part is unknown, or the dataset has no item with text.
    """
    chosen = chosen_parts("encoders", parts, tuple(PARTS))
    rows = measured_rows()
    with progress_bar(console) as progress:
        task = progress.add_task("encoders", total=sum(PARTS[part].seeds(seeds) for part in chosen))
        for part in chosen:
            for seed in range(PARTS[part].seeds(seeds)):
                shop = Shop(dataset, seed, out / "vectors")
                work = partial(_measured, PARTS[part].rows, shop)
                described = dataset.model_dump(mode="json", exclude={"source"})
                found = remembered(out / f"{part}-{seed}.json", __name__, (described, part, seed), work)
                rows += [{"part": part, **row} for row in found["rows"]]
                progress.advance(task)
    return BenchResult("encoders", dataset.name, seeds, list(rows), claims(rows))


def _measured(rows: Callable[[Shop], Rows], shop: Shop) -> dict[str, Any]:
    return {"rows": rows(shop)}


class _Part:
    """Part of the benchmark: its rows of one shop, and the fewest and most seeds."""

    def __init__(self, rows: Callable[[Shop], Rows], least_seeds: int = 1, most_seeds: int | None = None) -> None:
        self.rows, self._least, self._most = rows, least_seeds, most_seeds

    def seeds(self, asked: int) -> int:
        """Number of seeds; a difference of thousandths needs more than the others, and a fit of hours has fewer."""
        seeds = max(asked, self._least) if asked > 1 else asked
        return seeds if self._most is None else min(seeds, self._most)


def _similar(shop: Shop) -> Rows:
    return [*learning.similar(shop, LSA), *learning.similar(shop, BOTH, [TUNED])]


def _bases(shop: Shop) -> Rows:
    return learning.side_by_side(shop, [LSA, TRANSFORMER, BOTH])


def _merge(shop: Shop) -> Rows:
    return learning.merged(shop, _column(shop))


def _column(shop: Shop) -> str:
    """Name of the item's column with the most different values: the second task of a merge."""
    declared = shop.dataset.items
    names = list(declared.categorical) if declared else []
    if not names:
        raise TesseraError(f"{shop.dataset.source}: bench encoders --part merge needs a categorical column of [items]")
    return max(names, key=lambda name: len({value for values in shop.column(name) for value in values}))


def _ranking(shop: Shop) -> Rows:
    return untouched(shop.out.parent / "ranking", shop.seed)


PARTS: dict[str, _Part] = {
    "similar": _Part(_similar),
    "bases": _Part(_bases, _AUC_SEEDS),
    "merge": _Part(_merge),
    "layers": _Part(layers.top_layers),
    "ladder": _Part(layers.ladder, most_seeds=1),
    "ranking": _Part(_ranking),
    "search": _Part(reading.text_search),
    "static": _Part(reading.static_tables),
    "passages": _Part(reading.long_texts),
}
"""Parts of the benchmark, by the name that `--part` takes."""


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Returns what the parts must show, in the mean over the seeds."""
    mean = _Means(rows)
    judged: list[Claim] = []
    for base, target in ((LSA, 1.2), (BOTH, 1.5)):
        plain = mean("similar", base, BASE, "recall@50")
        tuned = mean("similar", base, TUNED, "recall@50")
        control = mean("similar", base, PERMUTED, "recall@50")
        if plain and tuned is not None and control is not None:
            judged.append(at_least(f"{base}: recall@50 of the similar view over the base's", tuned / plain, target))
            judged.append(at_most(f"{base}: recall@50 of permuted pairs less the base's", control - plain, 0.005))
    frozen, tuned, control = (mean("layers", TRANSFORMER, variant, "recall@50") for variant in (BASE, TUNED, PERMUTED))
    if frozen and tuned is not None and control is not None:
        judged.append(at_least("top two layers tuned over the frozen transformer: recall@50", tuned / frozen, 1.8))
        judged.append(at_most("top two layers, permuted pairs less frozen: recall@50", control - frozen, 0.005))
    carried = [
        mean("layers", TRANSFORMER, variant, "of_old")
        for variant in {row["variant"] for row in rows if row["part"] == "layers" and "of_old" in row}
    ]
    if carried:
        best = max(value for value in carried if value is not None)
        judged.append(at_least("top two layers tuned, best map or none into the frozen index: of old", best, 1.3))
    judged += _ladder_claims(rows)
    equal = [row["equal_share"] for row in rows if row["part"] == "ranking"]
    if equal:
        judged.append(at_least("share of a bundle's scores that a view leaves to the bit", min(equal), 1.0))
    both, alone = (mean("bases", base, BASE, "content_auc") for base in (BOTH, LSA))
    if both is not None and alone is not None:
        judged.append(at_least("new-item AUC of the content ranker: both bases less LSA alone", both - alone, 0.003))
    three, plain = (mean("search", base, "search", "hit@10") for base in (reading.THREE, LSA))
    if three is not None and plain is not None:
        judged.append(at_least("hit@10 of a text search: three channels less LSA alone", three - plain, 0.05))
    served, words = (mean("search", base, "search", "hit@10") for base in (reading.SERVED, reading.WORDS))
    if served is not None and words is not None:
        judged.append(at_least("hit@10 of a text search: as served less BM25 alone", served - words, -0.005))
    for measure, target in (("items_per_s", 30.0), ("recall@50", 0.75)):
        table, teacher = (mean("static", base, BASE, measure) for base in (reading.STATIC, TRANSFORMER))
        if table is not None and teacher:
            judged.append(at_least(f"static table over its transformer: {measure}", table / teacher, target))
    for way, target in ((reading.MEAN_OF_CHUNKS, 2.0), (reading.BEST_CHUNK, 2.4)):
        chunked, cut = (mean("passages", TRANSFORMER, variant, "mrr") for variant in (way, reading.TRUNCATED))
        if chunked is not None and cut:
            judged.append(at_least(f"MRR of passages beyond the cut: {way} over truncation", chunked / cut, target))
    for measure in ("recall@50", "shares_value@10"):
        joint, merged = (mean("merge", LSA, variant, measure) for variant in ("joint", "merged"))
        if joint and merged is not None:
            judged.append(at_least(f"merged over joint training: {measure}", merged / joint, 0.97))
    return judged


def _ladder_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Claims of the ladder: each exit against a fit of that exit alone, and permuted pairs against frozen layers."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["part"] == "ladder" and row["dims"] == layers.WIDTHS[0]:
            found[row["variant"], row["layers_below_top"]].append(row["recall@50"])
    judged = []
    for below in sorted({below for _, below in found}):
        trained, alone, control, frozen = (
            float(np.mean(found[variant, below]))
            for variant in (layers.LADDER, layers.ALONE, layers.LADDER_PERMUTED, layers.FROZEN)
        )
        name = f"ladder, {below} layers below the top" if below else "ladder, top layer"
        judged.append(at_least(f"{name}: recall@50 over a fit of that exit alone", trained / max(alone, 1e-9), 0.95))
        judged.append(at_most(f"{name}: recall@50 of permuted pairs less frozen layers", control - frozen, 0.005))
    return judged


class _Means:
    """Means of a measure over the seeds, by part, base and variant."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._values: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for row in rows:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._values[row["part"], row["base"], row["variant"], name].append(value)

    def __call__(self, part: str, base: str, variant: str, measure: str) -> float | None:
        values = self._values.get((part, base, variant, measure))
        return float(np.mean(values)) if values else None
