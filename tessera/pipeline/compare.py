"""Compares champion and challenger on the test part of a run: quality by slice, latency, bytes, loss by small storage.

Both bundles predict without places, as they serve, and are then told the places of the test rows alike. Otherwise a
bundle with a position path would explain clicks by their positions, which a bundle without a path cannot.

The champion reads the run's test events as it would have been served them. For items that it knows it reads its own
features. For newer items it reads vectors, codes and tokens of their text, by its own encoder, codebook and tokenizer.
"""

import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from features.aggregate_frame import aggregated_part
from features.content.given.encoder import given_in
from features.frame import Frame
from features.frame_blocks import shown_items
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.contents import RANKER_VECTOR
from models.bundle.request_aggregates import published_columns
from models.bundle.request_features import request_events, sent_values
from models.bundle.scorer import Scorer
from models.ranker.evaluate import Quality, at_places, novelty, quality
from models.ranker.loading import content_vectors, event_columns
from models.ranker.train import predict_part
from models.registry.encoder_gate import compare_encoders
from models.registry.gate import BundleQuality, Check, Gates, Verdict, judge
from models.registry.paired_test import drops
from models.registry.served_gate import served_checks
from models.table.batch import Entities
from models.table.default_schema import places_of
from models.table.row_files import row_files
from models.table.schema import SEMANTIC_ID, Schema
from serving.store.page import pack, unpack
from serving.store.protocol import STORAGES, StoredTable

Floats = NDArray[np.floating]
_RARE = 10
# Shown and not tested: each tested slice widens the intervals of all others, and `all` nearly covers this slice.
_KNOWN_USERS = "known users"
_CANDIDATES, _ROUNDS = 500, 30


def verdict(
    champion: Bundle,
    challenger: Bundle,
    frame: Frame,
    gates: Gates,
    *,
    note: str = "",
    unseen: NDArray[np.bool_] | None = None,
    served: Mapping[str, Any] | None = None,
) -> Verdict:
    """Compares two bundles on the frame's test part.

    Args:
        champion: Bundle that serves users.
        challenger: Bundle to judge.
        frame: Frame of the challenger's run.
        gates: Thresholds.
        note: Text that the verdict shows.
        unseen: Mask (N,) of the test examples that neither bundle was trained on. Only these are judged; None: all.
        served: The champion's kept report of `tessera skew`. None: there is none.
    """
    test = frame.blocks("test").whole("label", "user")
    judged = np.ones(test.height, dtype=bool) if unseen is None else unseen
    labels = test["label"].to_numpy().astype(np.float32)
    # Of several tasks the challenger's judged task is compared, on the rows whose label is known.
    known = ~np.isnan(labels)
    users = test["user"].to_numpy().astype(np.int64)
    space = challenger.manifest.encoder
    places = places_of(challenger.dataset, frame, "test")
    predicted = [_told(predictions(bundle, frame, space=space), labels, places) for bundle in (champion, challenger)]
    parts = {name: held & judged & known for name, held in _slices(frame).items()}
    times = _latencies(champion, challenger)
    measured = [
        BundleQuality(bundle.id, _quality(labels, probabilities, parts), time_ms, _bytes(bundle))
        for bundle, probabilities, time_ms in zip((champion, challenger), predicted, times, strict=True)
    ]
    first, second = predicted
    tested = {
        name: None if name == _KNOWN_USERS else drops(labels[held], first[held], second[held], users[held])
        for name, held in parts.items()
    }
    if not judged.all():
        only = f"{int(judged.sum()):,} of {test.height:,} test rows are judged: neither bundle was trained on them."
        note = f"{note} {only}".strip()
    if challenger.dataset.events.tasks is not None:
        note = f"{note} The task {challenger.dataset.events.judge!r} is judged, on {int(known.sum()):,} rows.".strip()
    seen = [(bundle, _as_seen_by(bundle, frame, space).items) for bundle in (champion, challenger) if gates.encoder]
    encoders = compare_encoders(seen[0], seen[1], frame, gates.encoder) if seen else {}
    checks = judge(measured[0], measured[1], gates, tested, encoders) + served_checks(gates.skew, served)
    return Verdict(champion.id, challenger.id, checks, note, storage_cost(challenger, frame))


def storage_cost(bundle: Bundle, frame: Frame) -> dict[str, float]:
    """Returns the AUC on the test part by the storage of the rows; empty if all labels of the part are equal."""
    labels = frame.blocks("test").whole("label")["label"].to_numpy().astype(np.float32)
    places, rows = places_of(bundle.dataset, frame, "test"), bundle.rows()
    aucs: dict[str, float] = {}
    for storage in STORAGES:
        kept = unpack(pack(StoredTable(rows.shape[0], rows.shape[1], storage), rows))
        auc = quality(labels, _told(predictions(bundle, frame, rows=kept), labels, places)).auc
        if auc is not None:
            aucs[storage] = auc
    return aucs


def _told(probabilities: Floats, labels: NDArray[np.float32], places: NDArray[np.int64] | None) -> Floats:
    return probabilities if places is None else at_places(probabilities, labels, places)


def predictions(
    bundle: Bundle, frame: Frame, *, rows: NDArray[np.float32] | None = None, space: str | None = None
) -> Floats:
    """Returns a bundle's probabilities (N,) for the frame's test part, as a server computes them: without places.

    Args:
        bundle: Bundle that predicts.
        frame: Frame of any run on the same kind of data.
        rows: Rows (R, D) that replace the bundle's own; None for the bundle's own.
        space: Id of the encoder of the frame's vectors; None if unknown.
    """
    ranker = bundle.ranker()
    if rows is not None:
        ranker.table.weight.copy_(torch.from_numpy(rows))
    seen, schema = _as_seen_by(bundle, frame, space), bundle.schema.served

    def conformed(block: pl.DataFrame) -> pl.DataFrame:
        cut = block.with_columns(pl.col("history").list.tail(schema.history_length))
        return _conformed(cut, schema, "event")

    made = {"history", *event_columns(schema)}
    test = aggregated_part(seen, "test", schema.aggregates).mapped(conformed, of=made)
    return predict_part(ranker, schema, seen, test, bundle.admission())


def render(judged: Verdict) -> Table:
    """Draws the comparison as a table, a row for each check."""
    title = f"challenger {judged.challenger} against champion {judged.champion}"
    table = Table(title=title, title_justify="left", caption=judged.note or None, caption_justify="left")
    table.add_column("")
    for name in ("rows", "champion", "challenger", "limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for check in judged.checks:
        mark = _mark(check)
        rows = "" if check.rows is None else f"{check.rows:,}"
        table.add_row(check.name, rows, *map(_number, (check.champion, check.challenger, check.limit)), mark)
    exact = judged.storage.get("float32")
    for storage, auc in judged.storage.items():
        if exact is not None and storage != "float32":
            table.add_row(f"AUC in {storage} storage", "", "", _number(auc), "", f"{auc - exact:+.5f}")
    return table


def _mark(check: Check) -> Text | str:
    if not check.passed:
        return Text("worse", "red")
    if not check.told:
        return Text("cannot tell", "yellow")
    return Text("passed", "green") if check.limit is not None else ""


def _as_seen_by(bundle: Bundle, frame: Frame, space: str | None) -> Frame:
    """Returns the frame with the columns that a bundle reads, and with the bundle's own features of items."""
    items = _conformed(frame.items, bundle.schema, "item")
    if bundle.encoder is not None:
        items = _with_own_content(bundle, items, space)
    return frame.replace(items=items, users=_conformed(frame.users, bundle.schema, "user"))


def _conformed(table: pl.DataFrame, schema: Schema, of: Literal["user", "item", "event"]) -> pl.DataFrame:
    """Adds the columns that a schema reads and a table lacks, as nulls."""
    columns = schema.columns(of)
    numeric = [feature.column for feature in schema.numeric if feature.of == of]
    missing = [pl.lit(None, dtype=pl.String).alias(name) for name in columns if name not in table.columns]
    missing += [pl.lit(None, dtype=pl.Float32).alias(name) for name in numeric if name not in table.columns]
    return table.with_columns(missing) if missing else table


def _with_own_content(bundle: Bundle, items: pl.DataFrame, space: str | None) -> pl.DataFrame:
    column = RANKER_VECTOR if RANKER_VECTOR in bundle.items.columns else "content_vector"
    own = bundle.items.select("item_id", pl.col(column).alias("content_vector"), "semantic_codes")
    joined = items.drop("content_vector", "semantic_codes", SEMANTIC_ID, strict=False).join(
        own, on="item_id", how="left", maintain_order="left"
    )
    missing = joined["content_vector"].is_null()
    new, vectors, codes = _encoded(bundle, items, missing, space)
    if len(new):
        vectors = bundle.for_ranker(vectors)
        encoded = {"place": new, "vector": pl.Series(vectors, dtype=own.schema["content_vector"])}
        if bundle.codebook is not None:
            encoded["codes"] = pl.Series(codes, dtype=own.schema["semantic_codes"])
        joined = joined.with_row_index("place").join(
            pl.DataFrame(encoded).cast({"place": pl.UInt32}), on="place", how="left", maintain_order="left"
        )
        joined = joined.with_columns(pl.coalesce("content_vector", "vector").alias("content_vector"))
        if bundle.codebook is not None:
            joined = joined.with_columns(pl.coalesce("semantic_codes", "codes").alias("semantic_codes"))
        joined = joined.drop("place", "vector", "codes", strict=False)
    if bundle.tokenizer is None:
        return joined
    return joined.with_columns(bundle.tokenizer.column(joined["semantic_codes"]).alias(SEMANTIC_ID))


def _encoded(
    bundle: Bundle, items: pl.DataFrame, missing: pl.Series, space: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.uint16]]:
    """Returns the rows (N,) of items without content that get some, with their vectors (N, D) and codes (N, Q).

    A frame holds no vectors as the team brought them. Its own content vectors are used if they lie in the bundle's
    space, and otherwise such items stay without content.
    """
    if not given_in(bundle.encoder):
        new = np.flatnonzero((missing & (items["text"].fill_null("") != "")).to_numpy())
        if len(new):
            vectors, codes, _ = bundle.encode_items(items["text"].gather(new).to_list())
            return new, vectors, codes
    elif space == bundle.manifest.encoder and "content_vector" in items.columns:
        new = np.flatnonzero((missing & items["content_vector"].is_not_null()).to_numpy())
        vectors = content_vectors(items[new])
        none = np.zeros((len(new), 0), dtype=np.uint16)
        return new, vectors, none if bundle.codebook is None else bundle.codebook.encode(bundle.for_ranker(vectors))
    return np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32), np.zeros((0, 0), dtype=np.uint16)


def _slices(frame: Frame) -> dict[str, NDArray[np.bool_]]:
    """Returns the test examples (N,) of new items, rare items, new users and known users, by the training events."""
    often = shown_items(frame.blocks("train"), frame.items.height)[
        frame.blocks("test").whole("item")["item"].to_numpy()
    ]
    users = novelty(frame, "user")
    known_users = np.zeros(len(often), dtype=bool) if users is None else users.known
    return {
        "all": np.ones(len(often), dtype=bool),
        "new items": often == 0,
        "rare items": (often > 0) & (often < _RARE),
        "new users": ~known_users if users is not None else known_users,
        _KNOWN_USERS: known_users,
    }


def _quality(
    labels: NDArray[np.float32], probabilities: Floats, parts: dict[str, NDArray[np.bool_]]
) -> dict[str, Quality]:
    return {name: quality(labels[held], probabilities[held]) for name, held in parts.items()}


def _latencies(*bundles: Bundle) -> list[float]:
    """Returns median milliseconds to score 500 candidates; the bundles take turns, so that noise meets both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = [_Scoring(bundle) for bundle in bundles]
        times: list[list[float]] = [[] for _ in calls]
        for number in range(_ROUNDS + 3):
            for call, taken in zip(calls, times, strict=True):
                began = time.perf_counter()
                call(number)
                taken.append(1_000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    return [float(np.median(taken[3:])) for taken in times]


class _Scoring:
    """Scoring of a bundle without a store: lookups, gather and network, with the rows in memory."""

    def __init__(self, bundle: Bundle) -> None:
        self._rows = bundle.rows()
        self._aggregates = bundle.aggregates()
        self._catalogue = Catalogue(bundle)
        self._bundle = bundle
        self._scorer = Scorer(
            bundle.schema, bundle.network(), self._catalogue, bundle.dataset.events.varying, bundle.formula
        )
        self._sent = sent_values(bundle, {}, {}, _CANDIDATES)
        # Without features that differ between candidates, all requests share one row of events.
        self._shared = None if bundle.dataset.events.varying else self._events("", np.zeros(1, dtype=np.int64))

    def _events(self, user: str, chosen: NDArray[np.int64]) -> Entities:
        return request_events(self._bundle, self._catalogue, self._sent, user, chosen)

    def __call__(self, number: int) -> None:
        items = len(self._catalogue.item_ids)
        if not items:
            return
        rng = np.random.default_rng(number)
        users = self._catalogue.user_ids
        user = users[number % len(users)] if users else ""
        chosen = rng.integers(0, items, _CANDIDATES)
        aggregates = published_columns(self._aggregates, self._scorer, user, chosen)
        events = self._shared or self._events(user, chosen)
        lookups = self._scorer.lookups(user, chosen, chosen[:20], events, aggregates)
        self._scorer.score(lookups, self._rows[lookups.rows])


def _bytes(bundle: Bundle) -> int:
    return sum(path.stat().st_size for path in (*row_files(bundle.directory), bundle.directory / "network.safetensors"))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.5f}"
