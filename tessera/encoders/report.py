"""`tessera encoder report`: measures each space of a run, the base and its views, beside a control.

    OUT/encoder-report.json   the measures
    OUT/encoder-report.html   the same as a page

If the run is published, both are kept with its version in the registry too, and the measures that `[run.gates]` may
limit are logged as `encoder.NAME`. A run has no new items in its training, so two measures stand for them: items
without a like in the training part, and likes of the later parts, which no fit has read.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.content.chain import BASE, SIMILAR, View, load_view
from features.content.encoder import Encoder, unit
from features.content.given.encoder import given_in
from features.content.kinds import load_encoder
from models.bundle.contents import VIEWS
from models.encoder.judging.items import judged_items
from models.encoder.judging.measures import LEAST_QUERIES, MEASURES
from models.encoder.judging.space_tasks import Scores, SpaceTasks
from models.encoder.judging.text_tasks import TextTasks
from models.encoder.measure import alignment, uniformity
from tessera.encoders.run_items import RunItems
from tessera.pages import markup
from tessera.pages.encoder_page import report_page
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.stage import finished_key

NAME = "encoder-report"
CONTROL = "random vectors"
_TIMED = 64
_TITLES = {
    "spaces": "Spaces", "aspects": "Aspects", "conditional": "An item and a value", "search": "Text search",
    "passages": "Passages", "encoders": "Encoders",
}  # fmt: skip


def report(run: Path, against: Path | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Measures the spaces of a run, and of another run beside them.

    Args:
        run: Directory of a run with the stages `encode` and `frame`; the report is written into it.
        against: Directory of another run, or None.
        seed: Seed of the samples and of the control.

    Returns:
        Lists of rows: `spaces`, `aspects` and `conditional` with a row for each space, `search` and `passages` with a
        row for each way to search, and `encoders` with a row for each run. `measures` holds those of `MEASURES` of the
        run, by name.

    Raises:
        TesseraError: A stage of a run is missing, or a view cannot be read.
    """
    document: dict[str, Any] = {name: [] for name in _TITLES} | {"measures": {}}
    for place in (run, against) if against is not None else (run,):
        for stage in ("encode", "frame"):
            finished_key(place / stage)
        measured = _measured(RunItems(place), seed)
        if place == run:
            document["measures"] = measured.pop("measures")
        for name in _TITLES:
            document[name] += [{"run": str(place), **row} for row in measured[name]]
    write_json(run / f"{NAME}.json", document)
    markup.write_page(run / f"{NAME}.html", "Encoder report", report_page(document))
    return document


def views_of(items: RunItems) -> list[View]:
    """Returns the base and the views of a run that read its vectors."""
    folder = items.run / VIEWS
    found = [load_view(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir()] if folder.is_dir() else []
    return [View(BASE, items.encoder_id), *(view for view in found if view.source == items.encoder_id)]


def _measured(items: RunItems, seed: int) -> dict[str, Any]:
    texts = items.texts()
    tasks = SpaceTasks(judged_items(read_frame(items.run / "frame"), items.ids.to_list(), texts), seed)
    vectors = items.found.vectors
    spaces = {view.name: view.of(vectors) for view in views_of(items)}
    draws = np.random.default_rng([seed, 14]).normal(size=vectors.shape)
    spaces[CONTROL] = unit(draws * items.known[:, None])
    scores = {name: tasks.scores(own) for name, own in spaces.items()}
    encoder = load_encoder(items.run / "encode" / "encoder")
    # Vectors that the items bring have no text encoder, so no text task is asked.
    reads = TextTasks([] if given_in(encoder) else texts, seed)
    search, passages = reads.search(encoder), reads.passages(encoder)
    pairs = tasks.gold_later
    alike = scores[SIMILAR if SIMILAR in scores else BASE]
    measures = {name: _mean(of) for name, of in alike.items()}
    measures |= {"search": _mean(search.get("vectors")), "passages": _mean(passages.get("whole text"))}
    return {
        "measures": {name: measures[name] for name in MEASURES},
        "spaces": [
            {"space": name, "dim": own.shape[1], "bytes_an_item": 4 * own.shape[1]}
            | {measure: _mean(of) for measure, of in scores[name].items() if measure not in ("aspects", "conditional")}
            | {"uniformity": uniformity(own, seed=seed), "alignment": alignment(own[pairs.of], own[pairs.item])}
            for name, own in spaces.items()
        ],
        "aspects": [
            {"space": name} | {column: _mean(of) for column, of in tasks.by_column(own).items()}
            for name, own in spaces.items()
            if tasks.items.values
        ],
        "conditional": [{"space": name} | _ways(tasks, own) for name, own in spaces.items() if tasks.concepts[0]],
        "search": _rows("channel", "hit@10", search),
        "passages": _rows("texts as", "mrr", passages),
        "encoders": [
            {
                "encoder": encoder.id,
                "dim": encoder.dim,
                "bytes_an_item": 4 * encoder.dim,
                "items_per_s": _rate(encoder, items.contents()[:_TIMED]),
            }
        ],
    }


def _ways(tasks: SpaceTasks, vectors: Any) -> dict[str, Any]:
    found = tasks.conditional(vectors)
    ways = {"item_and_value": found.both, "item_alone": found.item, "value_alone": found.value}
    return {name: _mean(of) for name, of in ways.items()} | {"queries": len(found.both)}


def _rows(way: str, measure: str, found: Mapping[str, Scores]) -> list[dict[str, Any]]:
    return [{way: name, measure: _mean(of), "queries": len(of)} for name, of in found.items()]


def _mean(scores: Scores | None) -> float | None:
    """Returns the mean of scores; None for too few queries."""
    return float(scores.mean()) if scores is not None and len(scores) >= LEAST_QUERIES else None


def _rate(encoder: Encoder, texts: Sequence[str]) -> float:
    """Returns the texts a second on one core, the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        encoder.encode(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / max(min(seconds), 1e-9)
