"""`tessera encoder report`: measures each space of a run, the base and its views, beside a control.

    OUT/encoder-report.json   the measures
    OUT/encoder-report.html   the same as a page

A run has no new items in its training, so two measures stand for them: items without a like in the training part, and
likes of the later parts, which no fit has read.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content.chain import BASE, View, load_view
from features.content.encoder import Encoder, unit
from features.content.kinds import load_encoder
from models.bundle.contents import VIEWS
from models.encoder.likes import COMMON_FANS, Likes, Neighbours
from models.encoder.measure import GOLD, alignment, recall, uniformity
from models.encoder.search import by_matrix, by_words, fused, hit_rate, phrase_queries
from tessera.encoders.run_items import RunItems
from tessera.pages import markup
from tessera.pipeline.artifact import write_json
from tessera.pipeline.stage import finished_key

NAME = "encoder-report"
CONTROL = "random vectors"
_LEAST_ASKED = 20
_SEARCHED, _TIMED = 2_000, 64
_LATER = ("validation", "test")


def report(run: Path, against: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Measures the spaces of a run, and of another run beside them.

    Args:
        run: Directory of a run with the stages `encode` and `frame`; the report is written into it.
        against: Directory of another run, or None.
        seed: Seed of the samples and of the control.

    Returns:
        `spaces` and `search`, lists of rows, and `encoders`, a row for each run.

    Raises:
        TesseraError: A stage of a run is missing, or a view cannot be read.
    """
    document: dict[str, Any] = {"spaces": [], "search": [], "encoders": []}
    for place in (run, against) if against is not None else (run,):
        for stage in ("encode", "frame"):
            finished_key(place / stage)
        items = RunItems(place)
        encoder = load_encoder(place / "encode" / "encoder")
        texts = items.texts()
        document["spaces"] += [{"run": str(place), **row} for row in _spaces(items, seed)]
        document["search"] += [{"run": str(place), **row} for row in _search(encoder, texts, seed)]
        document["encoders"].append(
            {
                "run": str(place),
                "encoder": encoder.id,
                "dim": encoder.dim,
                "bytes_an_item": 4 * encoder.dim,
                "items_per_s": _rate(encoder, texts[:_TIMED]),
            }
        )
    write_json(run / f"{NAME}.json", document)
    write_report_page(run / f"{NAME}.html", document)
    return document


def views_of(items: RunItems) -> list[View]:
    """Returns the base and the views of a run that read its vectors."""
    folder = items.run / VIEWS
    found = [load_view(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir()] if folder.is_dir() else []
    return [View(BASE, items.encoder_id), *(view for view in found if view.source == items.encoder_id)]


def _spaces(items: RunItems, seed: int) -> list[dict[str, Any]]:
    vectors = items.found.vectors
    train, every = items.likes(), items.likes(("train", *_LATER))
    later = items.likes(_LATER)
    new = items.known & (train.fans == 0)
    known = items.known & ~new
    wanted = {
        "new_recall": _gold(every, new, known),
        "later_recall": _gold(later, items.known, items.known),
    }
    spaces = {view.name: view.of(vectors) for view in views_of(items)}
    draws = np.random.default_rng([seed, 14]).normal(size=vectors.shape)
    spaces[CONTROL] = unit(draws * items.known[:, None])
    return [
        {"space": name} | _measures(own, wanted, {"new_recall": known, "later_recall": items.known}, seed)
        for name, own in spaces.items()
    ]


def _gold(likes: Likes, asked: NDArray[np.bool_], among: NDArray[np.bool_]) -> Neighbours:
    """Returns the most co-liked items of each asked item, by as many common fans, 3 at most, as 20 items have."""
    found = likes.neighbours(np.flatnonzero(asked), among, count=GOLD, common=COMMON_FANS)
    for common in range(COMMON_FANS - 1, 0, -1):
        if len(np.unique(found.of)) >= _LEAST_ASKED:
            break
        found = likes.neighbours(np.flatnonzero(asked), among, count=GOLD, common=common)
    return found


def _measures(
    vectors: NDArray[np.float32], wanted: dict[str, Neighbours], among: dict[str, NDArray[np.bool_]], seed: int
) -> dict[str, Any]:
    """Returns the recalls, None where fewer than 20 items ask, and the spread."""
    row: dict[str, Any] = {"dim": vectors.shape[1], "bytes_an_item": 4 * vectors.shape[1]}
    for name, neighbours in wanted.items():
        enough = len(np.unique(neighbours.of)) >= _LEAST_ASKED
        row[name] = recall(vectors, neighbours, among[name]) if enough else None
    pairs = wanted["later_recall"]
    return row | {
        "uniformity": uniformity(vectors, seed=seed),
        "alignment": alignment(vectors[pairs.of], vectors[pairs.item]),
    }


def _search(encoder: Encoder, texts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Returns the hit@10 of each channel, for phrases of a sample of the texts without the words of the titles."""
    chosen = np.random.default_rng([seed, 15]).permutation(len(texts))[:_SEARCHED]
    queries = phrase_queries([texts[row] for row in np.sort(chosen)], np.arange(len(chosen)), seed=seed)
    if len(queries.phrases) < _LEAST_ASKED:
        return []
    vectors, words = by_matrix(encoder, encoder.encode(queries.texts)), by_words(queries.texts)
    channels = {"vectors": vectors, "BM25": words, "fused": fused([vectors, words])}
    return [
        {"channel": name, "hit@10": hit_rate(channel, queries), "queries": len(queries.phrases)}
        for name, channel in channels.items()
    ]


def _rate(encoder: Encoder, texts: Sequence[str]) -> float:
    """Returns the texts a second on one core, the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        encoder.encode(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / max(min(seconds), 1e-9)


def write_report_page(path: Path, document: dict[str, Any]) -> None:
    """Writes a report as a page.

    Args:
        path: The page.
        document: Result of `report`.
    """
    several = len({row["run"] for row in document["encoders"]}) > 1
    sections = [
        markup.section(
            "Spaces",
            _table(document["spaces"], several),
            markup.caption(
                "new recall: co-liked items among the 50 nearest of items without a like in training. later recall: by "
                "likes after training. Higher recall is better. Lower uniformity and alignment are better."
            ),
        ),
        markup.section(
            "Text search",
            _table(document["search"], several)
            if document["search"]
            else markup.none("Too few texts have a title and a body."),
        ),
        markup.section("Encoders", _table(document["encoders"], several)),
    ]
    markup.write_page(path, "Encoder report", "\n".join(["<h1>Encoder report</h1>", *sections]))


def _table(rows: Sequence[dict[str, Any]], several: bool) -> str:
    names = [name for name in rows[0] if several or name != "run"]
    numbers = [all(isinstance(row[name], int | float | None) for row in rows) for name in names]
    columns = [f"{'>' * number}{name.replace('_', ' ')}" for name, number in zip(names, numbers, strict=True)]
    return markup.table(columns, [[shown(row[name]) for name in names] for row in rows])


def shown(value: Any) -> str:
    """Returns a cell's text; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)
