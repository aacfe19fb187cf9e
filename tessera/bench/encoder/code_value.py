"""`code-value`: where a Semantic ID pays beside the item's id, and where it does not.

One condition is changed at a time: the catalogue's text, the number of items, the events, the bytes of the table, the
levels of the code. In each condition three rankers are trained that differ in nothing else: the id alone, the id with
the Semantic ID, and the id with Semantic IDs that were dealt out among the items. New items are held out as in
`cold-start`. Nothing is claimed of a single condition: the page of Semantic IDs is written from the rows.

A second part asks whether codes that know behaviour are better: a codebook on the view `similar`, and a term in the
codebook's loss that brings alike items together. Pairs come from the training part and from known items alone. Each has
the same with permuted pairs as its control.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.content.chain import apply_steps
from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.encoder.likes import Likes
from models.encoder.pairs import co_liked
from models.encoder.tune import tune
from models.encoder.tuning.options import TuneOptions
from models.encoder.tuning.rows import most_alike
from models.ranker.evaluate import Quality
from models.ranker.train import TrainConfig
from models.semantic_id.codebook.alike import AlikePairs
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.offline.cold_start import ColdWorld, Variant
from tessera.pipeline.made_of import key_of

_SHARE = 1 / 3
_TRAIN = TrainConfig(patience=1)
ID, CODE, PERMUTED = "id", "id + Semantic ID", "id + permuted Semantic ID"
VARIANTS = {ID: Variant(), CODE: Variant(tokens="prefix"), PERMUTED: Variant(tokens="prefix", permuted=True)}
_LEAST = 0.005
_ALIKE_WEIGHT = 5.0
_PAIRED = 20


@dataclass(frozen=True)
class Condition:
    """Difference from the dataset as it is.

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


class KnowsBehaviour(NamedTuple):
    """A codebook that learns from the training part.

    Attributes:
        how: `view` codes the vectors of a tuned head, `loss` has a term for alike items.
        permuted: True deals the pairs out among the items.
    """

    how: Literal["view", "loss"]
    permuted: bool = False


CODEBOOKS: dict[str, KnowsBehaviour | None] = {
    "content alone": None,
    "the view similar": KnowsBehaviour("view"),
    "the view similar, permuted pairs": KnowsBehaviour("view", permuted=True),
    "alike items in the loss": KnowsBehaviour("loss"),
    "alike items in the loss, permuted pairs": KnowsBehaviour("loss", permuted=True),
}


def code_value(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    parts: Sequence[str] | None = None,
    config: TrainConfig = _TRAIN,
) -> BenchResult:
    """Trains three rankers in each condition and seed; finished trainings are kept in `out`.

    Args:
        dataset: Dataset with users, and items that have text.
        seeds: Number of seeds, from 0.
        parts: Names in `CONDITIONS` and `CODEBOOKS`; all by default.
        config: Training of the rankers.

    Raises:
        TesseraError: A part is unknown.
    """
    chosen = chosen_parts("code-value", parts, (*CONDITIONS, *CODEBOOKS))
    conditions, codebooks = ([name for name in chosen if name in kind] for kind in (CONDITIONS, CODEBOOKS))
    with progress_bar(console) as progress:
        total = seeds * (len(conditions) * len(VARIANTS) + len(codebooks))
        advance = partial(progress.advance, progress.add_task("code-value", total=total))
        used = [replace(config, seed=seed) for seed in range(seeds)]
        rows = [{"condition": name} | _condition(dataset, out, name, used, advance) for name in conditions]
        rows += [{"codebook": name} | _codebook(dataset, out, name, used, advance) for name in codebooks]
    return BenchResult("code-value", dataset.name, seeds, rows, claims(rows))


def _condition(
    dataset: Dataset, out: Path, name: str, configs: Sequence[TrainConfig], advance: Callable[[], None]
) -> dict[str, Any]:
    """Returns the figures of one condition: three rankers in each seed."""
    condition = CONDITIONS[name]
    measured: dict[str, list[dict[str, Quality]]] = {variant: [] for variant in VARIANTS}
    for config in configs:
        world = world_of(dataset, config.seed, condition)
        for variant, reads in VARIANTS.items():
            chosen = replace(reads, budget=condition.budget)
            decided_by = (world.key, asdict(condition), asdict(chosen), asdict(config))
            path = out / f"{key_of(name)[:8]}-{key_of(variant)[:8]}-{config.seed}.json"
            found = remembered(path, __name__, decided_by, partial(world.measure, chosen, config))
            measured[variant].append({part: msgspec.convert(one, Quality) for part, one in found.items()})
            advance()
    return _row(measured)


def _codebook(
    dataset: Dataset, out: Path, name: str, configs: Sequence[TrainConfig], advance: Callable[[], None]
) -> dict[str, Any]:
    """Returns the figures of one way to fit a codebook: the id with the Semantic ID in each seed."""
    knows, found = CODEBOOKS[name], []
    for config in configs:
        behaviour = None if knows is None else partial(_learnt, knows, config.seed)
        world = ColdWorld(dataset, config.seed, behaviour=behaviour)
        path = out / f"codebook-{key_of(name)[:8]}-{config.seed}.json"
        decided_by = (world.key, knows, asdict(config))
        found.append(remembered(path, __name__, decided_by, partial(world.measure, VARIANTS[CODE], config)))
        advance()
    return {f"{part}_auc": float(np.mean([one[part]["auc"] for one in found])) for part in ("new", "known")}


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
        if row.get("condition") == "as it is":
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


def _learnt(
    knows: KnowsBehaviour, seed: int, vectors: NDArray[np.float32], new: NDArray[np.bool_], frame: Frame
) -> tuple[NDArray[np.float32], AlikePairs | None]:
    """Returns the vectors to code, and the pairs of alike items, by the likes of the training part."""
    train = frame.part("train").filter(pl.col("label") == 1)
    likes = Likes(train["user"].to_numpy(), train["item"].to_numpy(), frame.items.height)
    every = np.zeros(frame.items.height, dtype=np.bool_)
    every[: len(new)] = ~new
    padded = np.zeros((frame.items.height, vectors.shape[1]), dtype=np.float32)
    padded[: len(vectors)] = vectors
    task = co_liked(padded, likes, every)
    if knows.permuted:
        task = task.permuted(seed)
    if knows.how == "view":
        head = tune([task], TuneOptions(seed=seed)).steps
        return apply_steps(head, vectors), None
    strongest = most_alike(task.alike, _PAIRED)
    place = np.cumsum(every) - 1
    return vectors, AlikePairs(np.stack([place[strongest.of], place[strongest.item]], axis=1), _ALIKE_WEIGHT)


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
