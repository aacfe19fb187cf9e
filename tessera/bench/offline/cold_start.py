"""`cold-start`: what a ranker knows of items that it has never seen, by what it reads of an item.

A share of the items, or the items that a condition names, are held out: their events are the part `new`, and they are
in no history. Encoder, codebook and tokens are fitted on the others; everything else is `tessera run`'s. Every
variant has the same users, histories, network, table, admission and item dropout. The exception is the hashed-id
ranker of ADR 9: without admission a new item reads other items' rows, so nothing is claimed against it. What Semantic
IDs add is claimed against `id`, which differs in nothing else. Two controls stand beside: a ranker that reads nothing
of items, and one whose Semantic IDs were dealt out among the items, so that they name an item and say nothing of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from features.content import lsa
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import DatasetError
from features.frame import Frame
from features.frame_blocks import without_visits
from features.history import DEFAULT_LENGTH
from models.encoder.measure import new_items
from models.ranker.evaluate import Quality, quality
from models.ranker.loading import assembler, examples
from models.ranker.reads import choose_reads
from models.ranker.train import TrainConfig, predict, train
from models.semantic_id.codebook import rqvae, rqvae_fit
from models.semantic_id.codebook.alike import AlikePairs
from models.semantic_id.codebook.quantizer import default_codes
from models.semantic_id.tokens import SCHEMES, Scheme
from models.table.admission import Admission
from models.table.default_schema import TableOptions, default_schema, hashed_id_schema
from models.table.item_parts import reading
from models.table.schema import SEMANTIC_ID, Schema
from tessera.bench.harness.data import dataset_frame, progress_bar, remembered
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.pipeline.artifact import with_tokens
from tessera.pipeline.made_of import key_of

_DIM, _LEVELS = 128, 3
_SMALL_TABLE = 0.1
# One epoch of patience for `tessera run`'s two: the same order, in fewer epochs.
_TRAIN = TrainConfig(patience=1)
_USER_ONLY, _HASHED_ID, _ID = "user only", "hashed id", "id"
_ALL, _DEFAULT = "all", "chosen of all (default)"
_SEMANTIC, _PERMUTED, _DENSE = "id + Semantic ID", "id + permuted Semantic ID", "id + Semantic ID + dense"


@dataclass(frozen=True)
class Variant:
    """Inputs of a ranker about an item.

    Attributes:
        item_id, metadata, content: True if the ranker reads its id, its declared columns, its content vector.
        tokens: Scheme of its Semantic ID, or None.
        permuted: True if the Semantic IDs are dealt out among the items.
        chosen: True if `models.ranker.reads` chooses the parts, of all there are, as `tessera run` does.
        baseline: the hashed-id ranker of ADR 9, without admission; the rest is not used then.
        budget: Share of the table's usual rows.
    """

    item_id: bool = True
    tokens: Scheme | None = None
    content: bool = False
    metadata: bool = False
    permuted: bool = False
    chosen: bool = False
    baseline: bool = False
    budget: float = 1.0


VARIANTS: dict[str, Variant] = {
    _USER_ONLY: Variant(item_id=False),
    _HASHED_ID: Variant(baseline=True),
    **{f"Semantic ID, {scheme}": Variant(item_id=False, tokens=scheme) for scheme in SCHEMES},  # type: ignore[arg-type]
    "dense": Variant(item_id=False, content=True),
    _ID: Variant(),
    "id + metadata": Variant(metadata=True),
    "id + dense": Variant(content=True),
    _SEMANTIC: Variant(tokens="prefix"),
    _PERMUTED: Variant(tokens="prefix", permuted=True),
    _DENSE: Variant(tokens="prefix", content=True),
    _ALL: Variant(tokens="prefix", content=True, metadata=True),
    _DEFAULT: Variant(tokens="prefix", content=True, metadata=True, chosen=True),
    f"{_HASHED_ID}, table x {_SMALL_TABLE:g}": Variant(baseline=True, budget=_SMALL_TABLE),
    f"{_ID}, table x {_SMALL_TABLE:g}": Variant(budget=_SMALL_TABLE),
    f"{_SEMANTIC}, table x {_SMALL_TABLE:g}": Variant(tokens="prefix", budget=_SMALL_TABLE),
}


def cold_start(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    held_out: str | None = None,
    parts: Sequence[str] | None = None,
    config: TrainConfig | None = None,
) -> BenchResult:
    """Trains every variant in every seed; finished ones are kept in `out`.

    Args:
        dataset: Dataset with users, and items that have text.
        seeds: Number of seeds, from 0; each decides the held-out items, the split, the codebook and the ranker.
        held_out: condition over the items' columns, in SQL, that names the items to hold out: `year >= 2000`.
        parts: names in `VARIANTS`; all by default. A claim needs the variants that it compares.

    Raises:
        TesseraError: a variant is unknown.
        DatasetError: the dataset has no items with text, or the condition names no column, no item or all of them.
    """
    variants = chosen_parts("cold-start", parts, tuple(VARIANTS))
    qualities: dict[str, list[dict[str, Quality]]] = {name: [] for name in variants}
    with progress_bar(console) as progress:
        task = progress.add_task("cold-start", total=len(variants) * seeds)
        for seed in range(seeds):
            # Only made where a measurement is missing.
            world = ColdWorld(dataset, seed, held_out)
            for name in variants:
                used = replace(config or _TRAIN, seed=seed)
                decided_by = (world.key, asdict(VARIANTS[name]), asdict(used))
                path = out / f"{key_of(name)[:8]}-{key_of(held_out or '')[:6]}-{seed}.json"
                data = remembered(path, __name__, decided_by, partial(world.measure, VARIANTS[name], used))
                qualities[name].append({part: msgspec.convert(one, Quality) for part, one in data.items()})
                progress.advance(task)
    rows = [_row(name, measured, qualities.get(_ID)) for name, measured in qualities.items()]
    return BenchResult("cold-start", dataset.name, seeds, rows, claims(qualities))


def _auc(measured: Sequence[dict[str, Quality]], part: str) -> NDArray[np.float64]:
    return np.array([qualities[part].auc for qualities in measured], dtype=np.float64)


def _row(name: str, measured: list[dict[str, Quality]], base: list[dict[str, Quality]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name}
    for part in ("known", "new"):
        auc = _auc(measured, part)
        row |= {
            f"{part}_auc": float(auc.mean()),
            f"{part}_std": float(auc.std(ddof=1)) if len(auc) > 1 else 0.0,
            f"{part}_log_loss": float(np.mean([qualities[part].log_loss for qualities in measured])),
            f"{part}_ne": float(np.mean([qualities[part].normalized_entropy for qualities in measured])),
            f"{part}_welch_p": None,
        }
        if base is not None and name != _ID and len(auc) > 1:
            row[f"{part}_welch_p"] = float(stats.ttest_ind(auc, _auc(base, part), equal_var=False).pvalue)
    return row


def claims(qualities: dict[str, list[dict[str, Quality]]]) -> list[Claim]:
    """Returns the gains that Semantic IDs must show, in the mean over the seeds, each with a paired t-test."""
    small = f"table x {_SMALL_TABLE:g}"
    wanted = [
        (_SEMANTIC, _USER_ONLY, "new", 0.025),
        (_DENSE, _USER_ONLY, "new", 0.06),
        (_SEMANTIC, _PERMUTED, "new", 0.03),
        (_SEMANTIC, _ID, "new", 0.01),
        (_SEMANTIC, _ID, "known", 0.006),
        (f"{_SEMANTIC}, {small}", f"{_ID}, {small}", "known", 0.006),
    ]
    judged: list[Claim] = []
    for ours, theirs, part, target in wanted:
        if ours in qualities and theirs in qualities:
            gains = _auc(qualities[ours], part) - _auc(qualities[theirs], part)
            claim = f"{part} items: AUC of {ours} less that of {theirs}"
            judged.append(at_least(claim, float(gains.mean()), target))
            if len(gains) > 1:
                p = float(stats.ttest_1samp(gains, 0.0).pvalue)
                judged.append(Claim(f"{claim}: p of the paired t-test", p, 0.05, p < 0.05))
    parts = [name for name in (_ID, "id + metadata", "id + dense", _SEMANTIC) if name in qualities]
    if _DEFAULT in qualities and parts:
        for part in ("new", "known"):
            best = max(float(_auc(qualities[name], part).mean()) for name in parts)
            gain = float(_auc(qualities[_DEFAULT], part).mean()) - best
            judged.append(
                at_least(f"{part} items: AUC of the default less that of the best of its parts", gain, -0.001)
            )
    return judged


Behaviour = Callable[[NDArray[np.float32], NDArray[np.bool_], Frame], tuple[NDArray[np.float32], AlikePairs | None]]


class ColdWorld:
    """Frames of one seed, made when the first is asked for.

    Args:
        dataset: Dataset with items that have text.
        seed: Decides the held-out items, the split, the codebook and the ranker.
        held_out: Condition that names the held-out items; None for a tenth.
        levels: Levels of a Semantic ID.
        texts: Changes the items' texts before they are encoded; None leaves them.
        thinned: Changes the frame without the held-out items' events; None leaves it.
        behaviour: What the codebook learns of the training part, from the vectors, the held-out items and the frame:
            the vectors that are coded, and pairs of alike items or None. None for content alone.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        held_out: str | None = None,
        *,
        levels: int = _LEVELS,
        texts: Callable[[pl.DataFrame], pl.Series] | None = None,
        thinned: Callable[[Frame], Frame] | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        if not dataset.has_content:
            raise DatasetError(f"{dataset.source}: cold-start needs [items] with text; this dataset has none")
        self._dataset, self._seed, self._held_out = dataset, seed, held_out
        self._levels, self._texts, self._thinned, self._behaviour = levels, texts, thinned, behaviour
        described = dataset.model_dump(mode="json", exclude={"source"})
        self.key = key_of("cold-start", described, seed, held_out, _DIM, _LEVELS, asdict(rqvae.RqVaeConfig()))
        self._frame: Frame | None = None
        self._codebook: rqvae.RqVae | None = None

    def ready(self, variant: Variant) -> tuple[Frame, Schema]:
        """Returns the frame of a variant, with the new items' events as part `new`, and its schema."""
        frame = self._with_tokens(variant)
        return frame, self._schema(variant, frame)

    def measure(self, variant: Variant, config: TrainConfig) -> dict[str, Any]:
        """Trains one variant and measures it on known and on new items."""
        frame, schema = self.ready(variant)
        if variant.chosen:
            schema = reading(schema, choose_reads(schema, frame, config).parts)
        trained = train(schema, frame, config)
        by_part: dict[str, Any] = {}
        for name, part in (("known", frame.part("test")), ("new", frame.part("new"))):
            source = assembler(schema, frame, part, Admission(trained.sketch, schema.admission))
            labels = part["label"].to_numpy().astype(np.float32)
            by_part[name] = asdict(quality(labels, predict(trained.ranker, source, examples(part))))
        return by_part

    def _schema(self, variant: Variant, frame: Frame) -> Schema:
        options = TableOptions(content=variant.content)
        schema = default_schema(self._dataset, frame, options)
        if variant.budget < 1:
            schema = replace(schema, rows=int(schema.rows * variant.budget))
        if variant.baseline:
            return hashed_id_schema(schema)
        read = {"item_id": variant.item_id, SEMANTIC_ID: variant.tokens is not None}
        features = [
            feature for feature in schema.features if feature.of != "item" or read.get(feature.column, variant.metadata)
        ]
        numeric = [one for one in schema.numeric if one.of != "item" or variant.metadata]
        return replace(schema, features=tuple(features), numeric=tuple(numeric))

    def _with_tokens(self, variant: Variant) -> Frame:
        frame, codebook = self._made()
        if variant.permuted:
            order = np.random.default_rng([self._seed, 2]).permutation(frame.items.height)
            frame = frame.replace(items=frame.items.with_columns(frame.items["semantic_codes"].gather(order)))
        return with_tokens(frame, variant.tokens or "prefix", codebook)[0]

    def _made(self) -> tuple[Frame, rqvae.RqVae]:
        if self._frame is None or self._codebook is None:
            self._frame, self._codebook = self._make()
        return self._frame, self._codebook

    def _make(self) -> tuple[Frame, rqvae.RqVae]:
        dataset, seed = self._dataset, self._seed
        items = read_items(dataset)
        assert items is not None
        new = self._new(items)
        texts = (items["text"] if self._texts is None else self._texts(items)).fill_null("")
        encoder = lsa.fit(texts.filter(~pl.Series(new)).to_list(), dim=_DIM, seed=seed)
        vectors = encoder.encode(texts.to_list())
        shape = rqvae.RqVaeConfig(levels=self._levels, codes=default_codes(len(vectors)), seed=seed)
        coded, alike = vectors, None
        if self._behaviour is not None:
            seen = dataset_frame(dataset, seed=seed, content=(vectors, np.zeros((len(vectors), 1), dtype=np.uint16)))
            coded, alike = self._behaviour(vectors, new, seen)
        codebook = rqvae_fit.fit(coded[~new], shape, alike=alike)
        content = vectors, codebook.encode(coded)
        frame = dataset_frame(dataset, seed=seed, history_length=DEFAULT_LENGTH, content=content)
        frame = without(frame, new)
        return (frame if self._thinned is None else self._thinned(frame)), codebook

    def _new(self, items: pl.DataFrame) -> NDArray[np.bool_]:
        """Returns (N,) whether each item is held out."""
        if self._held_out is None:
            return new_items(items.height, self._seed)
        try:
            chosen = items.select(pl.sql_expr(self._held_out)).to_series()
        except pl.exceptions.PolarsError as error:
            raise DatasetError(
                f"held-out {self._held_out!r}: {error}; the items' columns are {', '.join(items.columns)}"
            ) from error
        if chosen.dtype != pl.Boolean or not 0 < (chosen.sum() or 0) < items.height:
            raise DatasetError(f"held-out {self._held_out!r}: expected a condition that holds for some items, not all")
        return chosen.fill_null(False).to_numpy()


def without(frame: Frame, held_out: NDArray[np.bool_]) -> Frame:
    """Returns the frame whose items `held_out` (N,) are in no history, with their events as part `new`."""
    examples = without_visits(frame.examples, held_out)
    is_new = pl.Series(np.isin(examples["item"].to_numpy(), np.flatnonzero(held_out)))
    split = pl.when(is_new).then(pl.lit("new")).otherwise(pl.col("split"))
    return frame.replace(examples=examples.with_columns(split=split))
