"""`aspects`: shows that an item's vector names its concepts and aspects, and that concepts can be erased or avoided.

New items are those that `cold-start` holds out. The encoder is fitted on the known items. "Hidden" means that the text
holds no column of an aspect or concept, so heads must read them from the rest. Every part has its control beside it:
another aspect's head, the most frequent concept, a random subspace, the declared column.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.content import lsa
from features.content.encoder import unit
from features.dataset.descriptor import CHOICES, Dataset
from features.dataset.tables import read_events, read_items
from features.errors import DatasetError
from models.encoder.meaning import concept_fit, erase, judge
from models.encoder.meaning.aspects import fit_aspect, parts
from models.encoder.meaning.concepts import ConceptHead, Floats, steer
from models.encoder.measure import LabelledPairs, auc, nearest, new_items
from tessera.bench.encoder.aspect_claims import aspect_claims
from tessera.bench.harness.data import progress_bar, remembered
from tessera.bench.harness.result import BenchResult
from tessera.pipeline.made_of import key_of

_DIM, _NEAREST, _SHOWN, _LAST_LIKES = 256, 10, 20, 20
_COMMON, _RARE, _MET, _JUDGED = 0.10, 0.03, 0.02, 3
Row = dict[str, Any]


def aspects(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures every part in each seed; finished seeds are kept in `out`.

    Args:
        dataset: Dataset that declares `[items.aspects]` and `concepts`.
        seeds: Number of seeds, from 0; each decides the new items and the fits.

    Raises:
        DatasetError: The dataset declares no aspects or no concepts.
    """
    items = dataset.items
    if items is None or not items.aspects or items.concepts is None:
        raise DatasetError(f"{dataset.source}: aspects needs [items.aspects] and concepts in [items]; declare them")
    described = dataset.model_dump(mode="json", exclude={"source", *CHOICES})
    measured: list[Row] = []
    with progress_bar(console) as progress:
        task = progress.add_task("aspects", total=seeds)
        for seed in range(seeds):
            work = partial(_measured, dataset, seed)
            measured += remembered(out / f"{seed}.json", __name__, (key_of(described), seed), work)["rows"]
            progress.advance(task)
    rows = list(_means(measured))
    return BenchResult("aspects", dataset.name, seeds, rows, list(aspect_claims(rows)))


def _means(rows: list[Row]) -> Iterator[Row]:
    """Yields the mean over the seeds of rows with the same words."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.items() if isinstance(value, str))
        groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        numbers = [name for name in group[0] if not isinstance(group[0][name], str)]
        yield dict(key) | {name: float(np.mean([row[name] for row in group])) for name in numbers}


def _measured(dataset: Dataset, seed: int) -> dict[str, Any]:
    world = _World(dataset, seed)
    parts_of = (world.by_aspect, world.shared, world.erased, world.steered, world.few)
    return {"rows": [row for part in parts_of for row in part()]}


class _World:
    """Vectors, values and events of one seed."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._seed, declared = seed, dataset.items
        assert declared is not None
        assert declared.concepts is not None
        items = read_items(dataset)
        assert items is not None
        self.new = new_items(items.height, seed)
        named = set(declared.named_for_meaning)
        hidden = [name for name in declared.text if name not in named]
        if not hidden:
            raise DatasetError(f"{dataset.source}: aspects needs a text column that no aspect or concept names")
        bare = read_items(dataset.model_copy(update={"items": declared.model_copy(update={"text": tuple(hidden)})}))
        assert bare is not None
        self.shown, _ = self._encoded(items["text"].to_list())
        self.hidden, self.encoder = self._encoded(bare["text"].to_list())
        self.rows = items.select(sorted(named)).to_dicts()
        self.aspects = declared.aspects
        self.column = declared.concepts
        self.concepts = [parts(row[self.column]) or None for row in self.rows]
        self.values = {
            name: [_shared_values(row, columns) for row in self.rows] for name, columns in self.aspects.items()
        }
        self._events(dataset, items)

    def _encoded(self, texts: list[str]) -> tuple[Floats, lsa.LsaEncoder]:
        known = [text for text, new in zip(texts, self.new, strict=True) if not new]
        encoder = lsa.fit(known, dim=_DIM, seed=self._seed)
        return encoder.encode(texts), encoder

    def _events(self, dataset: Dataset, items: pl.DataFrame) -> None:
        frame = read_events(dataset)[0].join(
            items.select("item_id").with_row_index("row"), on="item_id", maintain_order="left"
        )
        users = frame["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
        self.users = int(users.max()) + 1
        self.events = LabelledPairs(
            users, frame["row"].to_numpy().astype(np.int64), frame["label"].to_numpy().astype(np.int64)
        )
        self.times = frame["time"].to_numpy()

    def by_aspect(self) -> Iterator[Row]:
        """Yields precision at 10 of new items in each space, for each aspect, with hidden and with shown columns."""
        known, queries = ~self.new, np.flatnonzero(self.new)
        chosen = [row for row, is_known in zip(self.rows, known, strict=True) if is_known]
        fitted = {
            name: fit_aspect(name, columns, self.hidden[known], chosen, source="hidden", seed=self._seed)
            for name, columns in self.aspects.items()
        }
        none: list[dict[str, Any]] = [{}] * len(self.rows)

        def row(columns: str, space: str, asked: Floats, index: Floats) -> Row:
            found = nearest(asked[queries], index, known, _NEAREST)
            precision = {f"{name}_p10": judge.sharing(found, queries, values) for name, values in self.values.items()}
            return {"part": "aspects", "way": f"columns {columns}", "space": space} | precision

        yield row("hidden", "generic", self.hidden, self.hidden)
        yield row("shown", "generic", self.shown, self.shown)
        for name, aspect in fitted.items():
            index = aspect.of(self.hidden, self.rows)
            yield row("hidden", name, aspect.of(self.hidden, none), index)
            yield row("shown", name, index, index)

    def shared(self) -> Iterator[Row]:
        """Yields the share of new items and near known items whose top shared concept both carry."""
        known = ~self.new
        head = self._head(self.hidden, known)
        queries = np.flatnonzero(self.new)
        found = nearest(self.hidden[queries], self.hidden, known, _NEAREST)
        sets = [set(values or ()) for values in self.concepts]
        pairs = [
            (q, i) for q, row in zip(queries.tolist(), found.tolist(), strict=True) for i in row if sets[q] & sets[i]
        ]
        first, second = np.array(pairs).T
        tops = judge.top_shared(head, self.hidden[first], self.hidden[second])
        names, counts = np.unique([name for values in sets for name in values], return_counts=True)
        frequent = str(names[counts.argmax()])
        for way, chosen in (
            ("concept head", [head.names[top] for top in tops]),
            ("most frequent", [frequent] * len(pairs)),
        ):
            true = [name in sets[q] and name in sets[i] for name, (q, i) in zip(chosen, pairs, strict=True)]
            yield {"part": "shared concept", "way": way, "true": float(np.mean(true)), "pairs": len(pairs)}

    def erased(self) -> Iterator[Row]:
        """Yields what neighbours and probes know of a concept after each erasure."""
        known = ~self.new
        head = self._head(self.hidden, known)
        for name in self._judged():
            carries = self._carries(name)
            fitted_on, its = self.hidden[known], carries[known]
            clusters = erase.cluster_means(fitted_on, its, head.probe(name), name=name, seed=self._seed)
            phrase = self.encoder.encode([name])
            steps = {
                "nothing": None,
                "random subspace": erase.random_subspace(fitted_on, erase.CLUSTERS, seed=self._seed),
                "LEACE": erase.leace(fitted_on, its, name=name),
                "cluster means, gated": clusters,
                "cluster means": erase.cluster_means(fitted_on, its, None, name=name, seed=self._seed),
            }
            if phrase.any():
                steps["phrase, gated"] = erase.phrases(fitted_on, phrase, head.probe(name), name=name)
            before = judge.nearest_others(self.hidden, _NEAREST)
            for way, step in steps.items():
                vectors = self.hidden if step is None else unit(step(self.hidden))
                after = judge.nearest_others(vectors, _NEAREST)
                yield {
                    "part": "erase",
                    "way": way,
                    "concept": name,
                    "share": judge.share(after[carries], carries),
                    "kept": judge.others_kept(before[~carries], after[~carries], carries),
                    "auc": self._probe_auc(vectors, carries),
                }

    def steered(self) -> Iterator[Row]:
        """Yields the share of a concept in users' top 20, and of the other items that remain there."""
        predicted = self._left_out()
        head = self._head(self.hidden, np.ones(len(self.new), dtype=bool), self._rare())
        queries, seen = self._tastes
        nothing = np.zeros(len(self.new), dtype=bool)
        before = judge.search(queries, self.hidden, _SHOWN, seen=seen, out=nothing)
        for name in head.names:
            carries = self._carries(name)
            away = np.stack([steer(head, query, [name]) for query in queries])
            ways = {
                "nothing": before,
                "avoid": judge.search(away, self.hidden, _SHOWN, seen=seen, out=nothing),
                "without, predicted": judge.search(queries, self.hidden, _SHOWN, seen=seen, out=predicted[name]),
                "without, declared": judge.search(queries, self.hidden, _SHOWN, seen=seen, out=carries),
            }
            for way, found in ways.items():
                kept = judge.others_kept(before, found, carries)
                yield {
                    "part": "top 20",
                    "way": way,
                    "concept": name,
                    "share": judge.share(found, carries),
                    "kept": kept,
                }

    def few(self) -> Iterator[Row]:
        """Yields precision at 20 of concepts made from 5 carriers, among items that are none of them."""
        rng = np.random.default_rng([self._seed, 43])
        hits, chance = [], []
        for name in self._rare():
            carries = self._carries(name)
            chosen = rng.choice(np.flatnonzero(carries), 5, replace=False)
            head = concept_fit.fit_examples(name, self.hidden[chosen], self.hidden, source="hidden")
            shares = head.weigh(self.hidden)[:, 0]
            shares[chosen] = -1
            hits.append(carries[np.argsort(-shares)[:20]].mean())
            chance.append(carries.mean())
        yield {"part": "5 examples", "way": "mean direction", "precision": float(np.mean(hits))}
        yield {"part": "5 examples", "way": "chance", "precision": float(np.mean(chance))}

    def _head(self, vectors: Floats, rows: NDArray[np.bool_], names: list[str] | None = None) -> ConceptHead:
        chosen = set(names or ())
        values = [
            (values if names is None or values is None else [name for name in values if name in chosen])
            for values, kept in zip(self.concepts, rows, strict=True)
            if kept
        ]
        return concept_fit.fit_column(
            vectors[rows], values, column=self.column, source=self.encoder.id, seed=self._seed
        )

    def _left_out(self) -> dict[str, NDArray[np.bool_]]:
        """Returns the predicted carriers of each rare concept, each item by a head that did not read it."""
        fold = np.random.default_rng([self._seed, 5]).integers(_JUDGED, size=len(self.new))
        found = {name: np.zeros(len(self.new), dtype=bool) for name in self._rare()}
        for number in range(_JUDGED):
            head = self._head(self.hidden, fold != number, self._rare())
            carried = head.carries(self.hidden[fold == number])
            for row, name in enumerate(head.names):
                found[name][fold == number] = carried[:, row]
        return found

    def _rare(self) -> list[str]:
        """Returns the concepts that a filter or an erasure is asked for: neither frequent nor very rare."""
        names = sorted({name for values in self.concepts for name in values or ()})
        return [name for name in names if _RARE <= self._carries(name).mean() <= _COMMON]

    def _judged(self) -> list[str]:
        """Returns the concepts of the claims: of those that users meet in their top 20, the best predicted."""
        queries, seen = self._tastes
        found = judge.search(queries, self.hidden, _SHOWN, seen=seen, out=np.zeros(len(self.new), dtype=bool))
        met = [name for name in self._rare() if judge.share(found, self._carries(name)) >= _MET]
        aucs = {one.name: one.auc or 0.0 for one in self._head(self.hidden, ~self.new, met).concepts}
        return sorted(aucs, key=lambda name: -aucs[name])[:_JUDGED]

    def _carries(self, name: str) -> NDArray[np.bool_]:
        return np.array([name in (values or ()) for values in self.concepts], dtype=bool)

    def _probe_auc(self, vectors: Floats, carries: NDArray[np.bool_]) -> float:
        """Returns the AUC on new items of a probe that is fitted on the known items."""
        weight, bias = concept_fit.logistic(vectors[~self.new], carries[~self.new])
        return auc(carries[self.new].astype(np.int64), vectors[self.new] @ weight + bias)

    @cached_property
    def _tastes(self) -> tuple[Floats, list[NDArray[np.int64]]]:
        """Returns the mean of each user's last likes, (U, D), and the items that the user knows."""
        order = np.lexsort((self.times, self.events.user))
        user, item, label = self.events.user[order], self.events.item[order], self.events.label[order]
        likes = [item[(user == one) & (label == 1)][-_LAST_LIKES:] for one in range(self.users)]
        with_likes = [one for one in range(self.users) if len(likes[one])]
        means = np.stack([self.hidden[likes[one]].mean(axis=0) for one in with_likes])
        return unit(means), [item[user == one] for one in with_likes]


def _shared_values(row: dict[str, Any], columns: tuple[str, ...]) -> set[str]:
    """Returns the values by which two items are alike; of a number, its ten: 1994 and 1999 share 1990."""
    found: set[str] = set()
    for column in columns:
        value = row[column]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found |= {str(value // 10 * 10)} if number else set(parts(value))
    return found
