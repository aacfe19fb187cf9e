"""`codebook-change`: what a ranker keeps when the codebook under it is refitted.

A ranker learns on the Semantic IDs of a codebook that knows nine tenths of the items. Then a codebook of all items
takes its place, and training goes on: with the rows of Semantic IDs as they were, which now belong to other items;
started again; or moved to the new codes through the items (`recode`). Each is measured at once, after a tenth of the
training events, and after all of them, beside a ranker trained from nothing. Only the first two are claimed: a whole
epoch on events that were trained on before evens the starts out.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from rich.console import Console

from features.content import lsa
from features.dataset.descriptor import Dataset
from features.dataset.tables import read_items
from features.errors import DatasetError
from features.frame import Frame
from features.history import DEFAULT_LENGTH
from models.ranker.evaluate import Quality, quality
from models.ranker.loading import assembler, examples
from models.ranker.network import Ranker
from models.ranker.recode import recode, semantic_rows
from models.ranker.train import TrainConfig, new_ranker, predict, train
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.match import match
from models.semantic_id.codebook.quantizer import Quantizer, recommended_shape
from models.table.admission import Admission
from models.table.default_schema import default_schema
from models.table.open import open_table
from models.table.schema import SEMANTIC_ID, Schema
from tessera.bench.harness.data import dataset_frame, progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.pipeline.artifact import with_tokens

_DIM = 128
CODEBOOKS = ("cold", "warm, matched")
STARTS = ("moved", "left", "cold rows", "from nothing")
_MOVED, _COLD = "moved", "cold rows"
_TARGET = 0.005
_CLAIMED = {"at_once": "at once", "tenth": "after a tenth of the events"}
# How much of the training events a start sees before it is measured.
_SHARES = {"at_once": 0.0, "tenth": 0.1, "epoch": 1.0}


def codebook_change(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, config: TrainConfig | None = None
) -> BenchResult:
    """Measures every start under every new codebook in each seed; finished ones are kept in `out`.

    Args:
        dataset: Dataset with users, and items that have text.
        seeds: Number of seeds, from 0; each decides the items that come later, the split, the codebooks and the ranker.

    Raises:
        DatasetError: the dataset has no items with text.
    """
    if not dataset.has_content:
        raise DatasetError(f"{dataset.source}: codebook-change needs [items] with text; this dataset has none")
    qualities: dict[tuple[str, str], list[dict[str, Quality]]] = {key: [] for key in product(CODEBOOKS, STARTS)}
    with progress_bar(console) as progress:
        task = progress.add_task("codebook-change", total=seeds)
        for seed in range(seeds):
            used = replace(config or TrainConfig(max_epochs=2), seed=seed)
            described = dataset.model_dump(mode="json", exclude={"source"})
            data = remembered(
                out / f"{seed}.json", __name__, (described, seed, asdict(used)), partial(_measured, dataset, seed, used)
            )
            for key in qualities:
                measured = data[key[0]][key[1]]
                qualities[key].append({when: msgspec.convert(values, Quality) for when, values in measured.items()})
            progress.advance(task)
    rows = [_row(*key, measured) for key, measured in qualities.items()]
    return BenchResult("codebook-change", dataset.name, seeds, rows, list(_claims(qualities)))


def _measured(dataset: Dataset, seed: int, config: TrainConfig) -> dict[str, Any]:
    items = read_items(dataset)
    assert items is not None
    texts = items["text"].fill_null("").to_list()
    vectors = lsa.fit(texts, dim=_DIM, seed=seed).encode(texts)
    levels, codes = recommended_shape(len(vectors))
    known = np.random.default_rng([seed, 1]).random(len(vectors)) < 0.9
    old = codebooks.fit("rqvae", vectors[known], levels=levels, codes=codes, seed=seed)

    def coded(book: Quantizer) -> Frame:
        content = vectors, book.encode(vectors)
        frame = dataset_frame(dataset, seed=seed, history_length=DEFAULT_LENGTH, content=content)
        return with_tokens(frame, "prefix", book)[0]

    first = coded(old)
    schema = default_schema(dataset, first)
    trained = train(schema, first, config).ranker
    tokens = first.items.select("item_id", SEMANTIC_ID).join(items.filter(pl.Series(known)), on="item_id", how="semi")
    starts: dict[str, Any] = {}
    for way in CODEBOOKS:
        fit = partial(codebooks.fit, "rqvae", vectors, levels=levels, codes=codes)
        if way == "cold":
            book: Quantizer = fit(seed=seed + 1_000)
        else:
            warm = fit(seed=seed, start=old)
            book = match(warm, warm.encode(vectors[known]), old.encode(vectors[known]))
        second = coded(book)
        starts[way] = {}
        for start in STARTS:
            starts[way][start] = {}
            for when, share in _SHARES.items():
                ranker = new_ranker(schema, config) if start == "from nothing" else _copy(schema, trained, config)
                if start == _MOVED:
                    recode(schema, ranker, second, tokens)
                elif start == _COLD:
                    _start_again(schema, ranker, second, config)
                if share:
                    ranker = train(
                        schema, _some(second, share, seed), replace(config, max_epochs=1), start=ranker
                    ).ranker
                starts[way][start][when] = _quality(schema, second, ranker)
    return starts


def _some(frame: Frame, share: float, seed: int) -> Frame:
    """Returns the frame with a share of its training examples."""
    kept = np.random.default_rng([seed, 3]).random(frame.examples.height) < share
    return frame.replace(examples=frame.examples.filter((pl.col("split") != "train") | pl.Series(kept)))


def _copy(schema: Schema, ranker: Ranker, config: TrainConfig) -> Ranker:
    table = open_table(schema, learning_rate=config.table_rate)
    table.weight.copy_(ranker.table.weight)
    table.accumulator.copy_(ranker.table.accumulator)
    return Ranker(table, deepcopy(ranker.network).requires_grad_(True))


@torch.no_grad()
def _start_again(schema: Schema, ranker: Ranker, frame: Frame, config: TrainConfig) -> None:
    """The rows of the new Semantic IDs as in an untrained table."""
    tokens = frame.items[SEMANTIC_ID].explode(empty_as_null=False).drop_nulls().unique().sort().to_list()
    rows = torch.from_numpy(np.unique(semantic_rows(schema, tokens)))
    ranker.table.weight[rows] = new_ranker(schema, config).table.weight[rows]
    ranker.table.accumulator[rows] = 0


def _quality(schema: Schema, frame: Frame, ranker: Ranker) -> dict[str, Any]:
    test = frame.part("test")
    source = assembler(schema, frame, test, Admission.off())
    labels = test["label"].to_numpy().astype(np.float32)
    return asdict(quality(labels, predict(ranker.eval(), source, examples(test))))


def _row(book: str, start: str, measured: Sequence[dict[str, Quality]]) -> dict[str, Any]:
    row: dict[str, Any] = {"new_codebook": book, "rows": start}
    for when in _SHARES:
        row[f"auc_{when}"] = float(np.mean([qualities[when].auc for qualities in measured]))
        row[f"log_loss_{when}"] = float(np.mean([qualities[when].log_loss for qualities in measured]))
    return row


def _claims(qualities: dict[tuple[str, str], list[dict[str, Quality]]]) -> Iterator[Claim]:
    for book in CODEBOOKS:
        for when in _CLAIMED:
            ours, theirs = ([seed[when].auc or 0.0 for seed in qualities[book, start]] for start in (_MOVED, _COLD))
            gain = float(np.mean(np.subtract(ours, theirs)))
            what = f"{book} codebook, {_CLAIMED[when]}"
            yield at_least(f"{what}: AUC of rows moved less that of rows started again", gain, _TARGET)
