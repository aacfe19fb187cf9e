"""`upgrade`: vectors made smaller and encoders replaced, each method beside its control.

- LSA refitted: an LSA of nine tenths of the items is replaced by an LSA of all items. The new items are encoded by the
  new LSA, mapped into the old space, and searched in the index of known items.
- MiniLM replaced: MiniLM is replaced by another sentence transformer (`--model`).
- MiniLM tuned: MiniLM is replaced by MiniLM under a head that was tuned on co-liked items of the training part.
- ranker: the default ranker, trained on the old vectors and codes, predicts from mapped vectors.
- dims and bits: a rotated and cut vector by the task, and ITQ bits by the float neighbours after a rerank.
- free embeddings: the number of items of which every pair can be found at a width.

The kept codes are compared under two codebooks: three levels of 32 codes, and the default for the catalogue's size.
Finer codes are harder to keep.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.content import lsa
from features.content.chain import View, apply_steps
from features.content.encoder import unit
from features.content.sentence import SentenceEncoder
from features.dataset.descriptor import Dataset
from features.durable import write_directory
from features.frame import Frame
from features.history import DEFAULT_LENGTH
from features.jobs.encode import encode_catalogue
from features.jobs.shard import read_shards, write_shards
from models.encoder.align import Pairs, fit_map
from models.encoder.axes import smaller
from models.encoder.bits import fit_itq, fit_signs, shortlist_recall
from models.encoder.limit import pairs_solved
from models.encoder.tune import tune
from models.encoder.tuning.options import TuneOptions
from models.encoder.upgrade import FIRST, TASK, WHOLE, OldSpace, UpgradeSample, candidates
from models.ranker.evaluate import quality
from models.ranker.loading import assembler, examples
from models.ranker.train import TrainConfig, predict, train
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import Quantizer, recommended_shape
from models.table.admission import Admission
from models.table.default_schema import default_schema
from tessera.bench.encoder.shop import LSA, TRANSFORMER, Shop
from tessera.bench.harness.data import dataset_frame, progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.artifact import with_tokens

PAIRS, DIM, SMALL = 1_000, 128, 32
WORDS = 48
"""Words of a text that the newer transformer reads: about as much as MiniLM reads here."""
_QUERIES, _SHORTLIST, _K = 300, 100, 10
_LIMITS = {4: 9, 8: 26, 12: 47, 16: 79}
_STARTS = 4
_COARSE, _DEFAULT = "3 x 32", "default"
_REFIT, _NEWER, _TUNED = "LSA refitted", "MiniLM replaced", "MiniLM tuned"
_AXES, _PREFIX, _LADDER, _FULL = "rotation", "plain prefix", "Matryoshka prefix", "full width"
_PREFIXES = (16, 32, 64, 128)
_OLD, _AGAIN, _NONE = "old vectors", "re-embedded", "no map"
_EVERY, _SERVED = "ridge, all known items", "ridge, known items keep their vectors"
# One epoch of patience for `tessera run`'s two: the same order, in fewer epochs.
_TRAIN = TrainConfig(patience=1)
Row = dict[str, Any]
Floats = NDArray[np.float32]


def upgrade(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    model: str | None = None,
    config: TrainConfig | None = None,
) -> BenchResult:
    """Measures every case in each seed; finished cases are kept in `out`.

    Args:
        dataset: Dataset with events, and items that have text.
        out: Directory of kept results and of encoded vectors.
        seeds: Number of seeds, from 0; each decides the new items, the sample, the codebooks and the ranker.
        console: Prints the progress.
        model: Directory or hub id of the sentence transformer that replaces MiniLM; None leaves the case out.
        config: Training of the ranker.

    Raises:
        DatasetError: The dataset has no items with text.
    """
    described = dataset.model_dump(mode="json", exclude={"source"})
    used = config or _TRAIN
    cases: dict[str, tuple[Callable[[Shop], list[Row]], Any]] = {
        "refit": (_refit, None),
        "newer": (partial(_newer, model), model),
        "tuned": (_tuned, None),
        "small": (_small, None),
        "ranker": (partial(_ranker, used), asdict(used)),
        "limit": (_limit, None),
    }
    measured: list[Row] = []
    with progress_bar(console) as progress:
        task = progress.add_task("upgrade", total=len(cases) * seeds)
        for seed in range(seeds):
            shop = Shop(dataset, seed, out / "vectors")
            for name, (work, choice) in cases.items():
                decided_by = described, seed, name, choice
                kept = remembered(out / f"{name}-{seed}.json", __name__, decided_by, partial(_rows_of, work, shop))
                measured += kept["rows"]
                progress.advance(task)
    rows = measured_rows()
    rows += _means(measured)
    return BenchResult("upgrade", dataset.name, seeds, list(rows), list(claims(rows)))


def _rows_of(work: Callable[[Shop], list[Row]], shop: Shop) -> dict[str, Any]:
    return {"rows": work(shop)}


def _means(measured: Sequence[Row]) -> Iterator[Row]:
    """Yields the mean row of each case and method over the seeds."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in measured:
        groups[row["case"], row.get("vectors", ""), row["method"]].append(row)
    for same in groups.values():
        yield {
            name: value if isinstance(value, str) else float(np.mean([row[name] for row in same]))
            for name, value in same[0].items()
        }


def _refit(shop: Shop) -> list[Row]:
    index = OldSpace(shop.lsa_encoder.id, shop.vectors(LSA), ~shop.new, None, shop.gold)
    return list(_mapped(_REFIT, index, _refitted(shop), shop))


def _refitted(shop: Shop) -> tuple[str, Floats]:
    """Returns id and vectors (N, D) of an LSA of all items."""
    encoder = lsa.fit(shop.texts, dim=DIM, seed=shop.seed)
    return encoder.id, encoder.encode(shop.texts)


def _newer(model: str | None, shop: Shop) -> list[Row]:
    if model is None:
        return [{"case": _NEWER, "method": "not measured", "missing": "give --model, another sentence transformer"}]
    encoder = SentenceEncoder(model)
    index = OldSpace(TRANSFORMER, shop.vectors(TRANSFORMER), ~shop.new, None, shop.gold)
    return list(_mapped(_NEWER, index, (encoder.id, _encoded(shop, encoder)), shop))


def _encoded(shop: Shop, encoder: SentenceEncoder) -> Floats:
    """Encodes the first words of each text: (N, D) float32. A call that was stopped is continued by the next call."""
    place = shop.out / f"{encoder.id}-{WORDS}"
    if not (place / "encoder").is_dir():
        write_directory(place / "encoder", encoder.save)
    short = [" ".join(text.split()[:WORDS]) for text in shop.texts]
    texts = pl.DataFrame({"item_id": [str(row) for row in range(len(short))], "text": short})
    encode_catalogue(write_shards(texts, place / "texts", rows=256), place / "encoder", place / "vectors")
    return read_shards(place / "vectors")["vector"].to_numpy().astype(np.float32)


def _tuned(shop: Shop) -> list[Row]:
    old = shop.vectors(TRANSFORMER)
    task = shop.task(old)
    plain, ladder = (tune([task], TuneOptions(seed=shop.seed, prefixes=prefixes)).steps for prefixes in ((), _PREFIXES))
    view = View("tuned", TRANSFORMER, plain)
    found, trained = view.of(old), apply_steps(ladder, old)
    rows = list(_mapped(_TUNED, OldSpace(TRANSFORMER, old, ~shop.new, None, shop.gold), (view.id, found), shop))
    rows += _dims(_TUNED, found, shop)
    kept = shop.recall(unit(trained[:, :SMALL]))
    row = {"case": "dims", "vectors": _TUNED, "method": _LADDER, "item_bytes": 4 * SMALL}
    return [*rows, row | {"recall@50": kept, "of_full": kept / shop.recall(found)}]


def _books(vectors: Floats, seed: int) -> dict[str, Quantizer]:
    levels, codes = recommended_shape(len(vectors))
    return {
        _COARSE: codebooks.fit("residual-kmeans", vectors, levels=3, codes=32, seed=seed),
        _DEFAULT: codebooks.fit("rqvae", vectors, levels=levels, codes=codes, seed=seed),
    }


def _mapped(case: str, index: OldSpace, newer: tuple[str, Floats], shop: Shop) -> Iterator[Row]:
    """Yields a row for the old vectors, for a re-embedded catalogue, and for each kind of map."""
    (space, vectors), new, seed = newer, shop.new, shop.seed
    order = np.random.default_rng([seed, 5]).permutation(np.flatnonzero(~new & vectors.any(axis=1)))
    count = min(PAIRS, 2 * len(order) // 3)
    sample = UpgradeSample(space, order[:count], order[count:], np.flatnonzero(new), vectors)
    before, again = index.recall(sample.asking, index.vectors[sample.asking]), shop.recall(vectors)
    books = _books(index.vectors[~new], seed)
    kinds: dict[str, Row] = defaultdict(dict)
    for name, book in books.items():
        for found in candidates(replace(index, codebook=book), sample, seed=seed):
            kinds[found.map.kind] |= {
                "recall@50": found.fidelity["recall"],
                "of_old": found.fidelity[TASK],
                "of_reembedded": found.fidelity["recall"] / again,
                f"{FIRST}_{name}": found.fidelity[FIRST],
                f"{WHOLE}_{name}": found.fidelity[WHOLE],
            }
    if "none" not in kinds:
        kinds["none"] = _cut_to_fit(index, sample, books, again)
    yield {"case": case, "method": _OLD, "recall@50": before, "of_old": 1.0, "of_reembedded": before / again}
    yield {"case": case, "method": _AGAIN, "recall@50": again, "of_old": again / before, "of_reembedded": 1.0}
    for kind, row in kinds.items():
        yield {"case": case, "method": _NONE if kind == "none" else kind} | row


def _cut_to_fit(index: OldSpace, sample: UpgradeSample, books: Mapping[str, Quantizer], again: float) -> Row:
    """Returns the row of no map between widths that differ: the vector is cut, or padded with zeros."""
    width = index.vectors.shape[1]
    grown = max(0, width - sample.vectors.shape[1])
    cut = unit(np.pad(sample.vectors, ((0, 0), (0, grown)))[:, :width])
    found = index.recall(sample.asking, cut[sample.asking])
    before = index.recall(sample.asking, index.vectors[sample.asking])
    row = {"recall@50": found, "of_old": found / before, "of_reembedded": found / again}
    for name, book in books.items():
        kept = replace(index, codebook=book).kept(sample.coded, cut[sample.coded])
        row |= {f"{measure}_{name}": value for measure, value in kept.items()}
    return row


def _small(shop: Shop) -> list[Row]:
    spaces = {"LSA": (shop.vectors(LSA), 128), "MiniLM": (shop.vectors(TRANSFORMER), 256)}
    return [
        row
        for name, (vectors, bits) in spaces.items()
        for row in (*_dims(name, vectors, shop), *_bits(name, vectors, bits, shop.seed))
    ]


def _dims(name: str, vectors: Floats, shop: Shop) -> Iterator[Row]:
    whole, dim = shop.recall(vectors), min(SMALL, vectors.shape[1])
    small = {
        _FULL: vectors,
        _AXES: apply_steps(smaller(vectors[~shop.new], dim), vectors),
        _PREFIX: unit(vectors[:, :dim]),
    }
    for method, cut in small.items():
        found = shop.recall(cut)
        row = {"case": "dims", "vectors": name, "method": method, "item_bytes": 4 * cut.shape[1]}
        yield row | {"recall@50": found, "of_full": found / whole}


def _bits(name: str, vectors: Floats, bits: int, seed: int) -> Iterator[Row]:
    filled = vectors[vectors.any(axis=1)]
    queries = np.random.default_rng([seed, 6]).choice(len(filled), min(_QUERIES, len(filled)), replace=False)
    bits = min(bits, vectors.shape[1] // 8 * 8)
    codes = {"ITQ": fit_itq(filled, bits, space=name, seed=seed), "sign": fit_signs(filled, space=name)}
    shortlist = min(_SHORTLIST, len(filled) - 1)
    for method, code in codes.items():
        row: Row = {"case": "bits", "vectors": name, "method": method, "item_bytes": code.bits // 8}
        for rows in ("float", "int8"):
            found = shortlist_recall(code, filled, queries=queries, k=_K, shortlist=shortlist, int8=rows == "int8")
            row |= {f"recall@10_{query}_{rows}": value for query, value in found.items()}
        yield row


def _ranker(config: TrainConfig, shop: Shop) -> list[Row]:
    """Trains the default ranker on the old LSA, and predicts from the refitted LSA with and without a map.

    Two ways of mapping: every item, and new items alone, as an upgrade of a running shop does. AUCs are of all test
    events, and of those of new items.
    """
    new, seed, dataset = shop.new, shop.seed, shop.dataset
    old, (new_id, newer) = shop.vectors(LSA), _refitted(shop)
    levels, codes = recommended_shape(len(old))
    book = codebooks.fit("rqvae", old[~new], levels=levels, codes=codes, seed=seed)
    listed = shop.frame.items["listed"].to_numpy().sum()
    content = old[:listed], book.encode(old[:listed])
    made = dataset_frame(dataset, seed=seed, history_length=DEFAULT_LENGTH, content=content)
    first = with_tokens(made, "prefix", book)[0]
    schema = default_schema(dataset, first)
    trained = train(schema, first, replace(config, seed=seed))
    order = np.random.default_rng([seed, 5]).permutation(np.flatnonzero(~new & newer.any(axis=1)))
    chosen = order[: min(PAIRS, 2 * len(order) // 3)]
    mapped = fit_map("ridge", Pairs(new_id, "old", newer[chosen], old[chosen]), seed=seed).of(newer, space=new_id)

    test = first.part("test")
    labels, of_new = test["label"].to_numpy().astype(np.float32), new[test["item"].to_numpy()]

    def auc(vectors: Floats) -> tuple[float, float]:
        frame = with_tokens(_with_vectors(first, vectors[:listed], book), "prefix", book)[0]
        source = assembler(schema, frame, test, Admission(trained.sketch, schema.admission))
        scores = predict(trained.ranker, source, examples(test))
        return quality(labels, scores).auc or 0.0, quality(labels[of_new], scores[of_new]).auc or 0.0

    every = fit_map("ridge", Pairs(new_id, "old", newer[order], old[order]), seed=seed).of(newer, space=new_id)
    served = np.where(new[:, None], mapped, old)
    spaces = {_OLD: old, "ridge": mapped, _EVERY: every, _SERVED: served, _NONE: newer}
    found = {method: auc(vectors) for method, vectors in spaces.items()}
    before = found[_OLD]
    return [
        {"case": "ranker", "vectors": "LSA", "method": method}
        | {"auc": value, "auc_less_old": value - before[0]}
        | {"auc_new_items": fresh, "auc_new_items_less_old": fresh - before[1]}
        for method, (value, fresh) in found.items()
    ]


def _with_vectors(frame: Frame, vectors: Floats, book: Quantizer) -> Frame:
    """Returns the frame with other content vectors (N, D) and their codes; items without content stay without."""
    items = frame.items
    content = pl.DataFrame(
        {
            "content_vector": pl.Series(vectors, dtype=items["content_vector"].dtype),
            "semantic_codes": pl.Series(book.encode(vectors), dtype=items["semantic_codes"].dtype),
        }
    )
    rest = items.height - len(vectors)
    if rest:
        content = pl.concat([content, items[len(vectors) :].select(content.columns)])
    return frame.replace(items=items.with_columns(content))


def _limit(shop: Shop) -> list[Row]:
    rows, seed = [], shop.seed
    for dim, items in _LIMITS.items():
        solved = max(pairs_solved(items, dim, seed=_STARTS * seed + start) for start in range(_STARTS))
        rows.append({"case": "free embeddings", "method": f"d = {dim}", "items": items, "pairs_solved": solved})
    return rows


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Yields the claims on the rows' means, and on the controls."""
    found = {(row["case"], row.get("vectors", ""), row["method"]): row for row in rows}

    def value(case: str, vectors: str, method: str, name: str) -> float | None:
        return found.get((case, vectors, method), {}).get(name)

    wanted = [
        (_REFIT, "", "ridge", f"{FIRST}_{_COARSE}", 0.93),
        (_REFIT, "", "ridge", f"{WHOLE}_{_COARSE}", 0.65),
        (_REFIT, "", "ridge", "of_reembedded", 0.95),
        (_NEWER, "", "procrustes", "of_old", 1.0),
        (_TUNED, "", "ridge", f"{WHOLE}_{_COARSE}", 0.65),
        ("ranker", "LSA", "ridge", "auc_less_old", -0.003),
        ("ranker", "LSA", _SERVED, "auc_new_items_less_old", -0.003),
        ("dims", "MiniLM", _AXES, "of_full", 0.97),
        ("bits", "LSA", "ITQ", "recall@10_float_query_float", 0.96),
        ("bits", "MiniLM", "ITQ", "recall@10_float_query_float", 0.96),
        *(("free embeddings", "", f"d = {dim}", "pairs_solved", 1.0) for dim in _LIMITS),
    ]
    for case, vectors, method, name, target in wanted:
        if (measured := value(case, vectors, method, name)) is not None:
            label = f"{case} {vectors}".strip()
            yield at_least(f"{label}, {method}: {name.replace('_', ' ')}", measured, target)
    gains = {row["method"]: row["of_old"] for row in rows if row["case"] == _TUNED}
    if gains:
        best = max(value for method, value in gains.items() if method not in (_OLD, _AGAIN))
        yield at_least(f"{_TUNED}, best map or {_NONE} for the gain: of old", best, 1.3)
        yield at_least(f"{_TUNED}, best map or {_NONE} less {_NONE}: of old", best - gains[_NONE], 0.0)
    for case, most in ((_REFIT, 0.75), (_NEWER, 0.5)):
        if (measured := value(case, "", _NONE, "of_old")) is not None:
            yield at_most(f"{case}, {_NONE}: of old", measured, most)
