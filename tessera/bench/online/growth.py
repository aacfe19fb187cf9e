"""`growth`: costs that must not grow with use, each measured in one run before and after it.

- The stream's rate, and a question for an unknown value, with none and with many values admitted since publishing.
- The memory of catalogue, attributes and index of a server after some and after ten times as many updates of its items.
- The share of new values that admission takes for seen ones, after more and more values.
"""

import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.table.admission import FALSE_SIGHTINGS, Admission, Sketch
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Retriever
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S, live_data
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows

_BATCH, _ASKED, _PUT = 256, 300, 100
_PUBLISHED, _THRESHOLD, _CHUNK = 10_000, 2, 1_000_000


@dataclass(frozen=True)
class GrowthSizes:
    """Sizes up to which each cost is measured.

    Attributes:
        admitted: values admitted since publishing, ascending.
        updates: of items, ascending.
        values: new values shown to admission, ascending.
        batches: micro-batches timed at each number of admitted values.
    """

    admitted: tuple[int, ...] = (0, 1_000_000, 10_000_000)
    updates: tuple[int, ...] = (100_000, 1_000_000)
    values: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    batches: int = 30


def growth(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures all three once for each seed, on a bundle of the dataset."""
    if dataset.events.user is None or dataset.items is None:
        raise TesseraError(f"bench growth needs users and a catalogue; {dataset.name} lacks one")
    data = live_data(dataset, out, console)
    rows = measured_rows()
    for seed in range(seeds):
        rows += [{"seed": seed} | row for row in measure(data.bundle, data.messages, GrowthSizes(), seed, console)]
    return BenchResult("growth", dataset.name, seeds, rows, claims(rows))


def measure(
    bundle: Bundle, messages: list[bytes], sizes: GrowthSizes, seed: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Measures rows `{"cost", "at", "value"}` of one seed."""
    with console.status("admission"):
        yield from _admission(bundle, messages, sizes, np.random.default_rng(seed))
    with console.status("updates"):
        yield from _updates(bundle, sizes, np.random.default_rng(seed))
    with console.status("new values"):
        yield from _new_values(sizes, np.random.default_rng(seed))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Judges the medians over the seeds: the last size of each cost against the first."""

    def medians(cost: str) -> list[tuple[int, float]]:
        by_time = {at: [row["value"] for row in rows if (row["cost"], row["at"]) == (cost, at)] for at in
                 dict.fromkeys(row["at"] for row in rows if row["cost"] == cost)}  # fmt: skip
        return [(at, float(np.median(values))) for at, values in by_time.items()]

    rate, asked, held, shown = (
        medians(cost) for cost in ("events/s", "unknown lookup us", "resident MB", "taken for seen")
    )
    return [
        at_least(f"events/s with {rate[-1][0]:,} admitted over those with none", rate[-1][1] / rate[0][1], 0.9),
        at_most(
            f"an unknown lookup with {asked[-1][0]:,} admitted over one with none", asked[-1][1] / asked[0][1], 1.2
        ),
        at_most(f"resident memory after {held[-1][0]:,} updates over {held[0][0]:,}", held[-1][1] / held[0][1], 1.05),
        at_most(f"new values taken for seen, up to {shown[-1][0]:,} values", max(v for _, v in shown), FALSE_SIGHTINGS),
    ]


def _admission(
    bundle: Bundle, messages: list[bytes], sizes: GrowthSizes, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Runs all sizes in turns, so that the machine's load is the same for all; each gets new users."""
    if not bundle.schema.admission:
        raise TesseraError("bench growth needs a bundle with admission; leave table.admission at its default")
    steps: list[Step] = []
    taken: list[tuple[list[float], list[float]]] = []
    for admitted in sizes.admitted:
        step = Step(bundle, Topics(), lateness_s=NEVER_LATE_S)
        step.catalogue.admission.admit(rng.integers(0, 2**64, admitted, dtype=np.uint64))
        steps.append(step)
        taken.append(([], []))
    # The first batch brings what the first batch always brings.
    for number in range(sizes.batches + 1):
        batch = _by_new_users(bundle, messages, number)
        for step, (rates, asked) in zip(steps, taken, strict=True):
            began = time.process_time()
            step.apply(batch)
            if number:
                rates.append(_BATCH / (time.process_time() - began))
            asked.append(_unknown_us(step.catalogue, number))
    for admitted, (rates, asked) in zip(sizes.admitted, taken, strict=True):
        yield {"cost": "events/s", "at": admitted, "value": float(np.median(rates))}
        yield {"cost": "unknown lookup us", "at": admitted, "value": float(np.median(asked))}


def _by_new_users(bundle: Bundle, messages: list[bytes], number: int) -> list[Message]:
    user, start = str(bundle.dataset.events.user), number * _BATCH
    return [
        Message(
            "events", 0, index, None,
            json.dumps(json.loads(messages[index % len(messages)]) | {user: f"new-{index}"}).encode(), 0,
        )
        for index in range(start, start + _BATCH)
    ]  # fmt: skip


def _unknown_us(catalogue: Catalogue, number: int) -> float:
    """Returns microseconds of processor for one query whether an unseen value reads rows."""
    keys = np.random.default_rng(number).integers(0, 2**64, (_ASKED, 1), dtype=np.uint64)
    began = time.process_time()
    for key in keys:
        catalogue.admission.admits(key)
    return 1e6 * (time.process_time() - began) / _ASKED


def _updates(bundle: Bundle, sizes: GrowthSizes, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Updates the items of a server, each time to values that no item had before."""
    catalogue = Catalogue(bundle)
    items = bundle.dataset.items
    retriever = Retriever(catalogue, Attributes(bundle.items, items.filterable if items is not None else ()))
    updated = 0
    for updates in sizes.updates:
        while updated < updates:
            chosen = rng.choice(len(catalogue.item_ids), min(_PUT, len(catalogue.item_ids)), replace=False)
            features = [_features(catalogue, updated + offset) for offset in range(len(chosen))]
            catalogue.put_items(_records(bundle, catalogue, chosen, features))
            retriever.update(chosen.tolist(), features)
            updated += len(chosen)
        gc.collect()
        yield {"cost": "resident MB", "at": updates, "value": _resident_bytes() / 1e6}


def _records(
    bundle: Bundle, catalogue: Catalogue, chosen: NDArray[np.int64], features: list[dict[str, Any]]
) -> dict[str, record.ItemRecord]:
    codes = [0] * bundle.codebook.levels if bundle.codebook is not None else []
    records = {}
    for item, values in zip(chosen.tolist(), features, strict=True):
        vector = catalogue.vectors[item].astype("<f4").tobytes()
        records[catalogue.item_ids[item]] = record.ItemRecord(
            bundle.manifest.encoder or "", vector, codes, values, bundle.manifest.codebook or ""
        )
    return records


def _features(catalogue: Catalogue, update: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, dtype in catalogue.item_types.items():
        if dtype == pl.String:
            values[name] = f"value {update}"
        elif dtype == pl.List(pl.String):
            values[name] = [f"value {update}", f"value {update % 7}"][: 1 + update % 2]
        elif dtype.is_numeric():
            values[name] = update % 100
    return values


def _new_values(sizes: GrowthSizes, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    admission, shown = Admission(Sketch.sized(_PUBLISHED), _THRESHOLD), 0
    for values in sizes.values:
        share = 0.0
        while shown < values:
            keys = rng.integers(0, 2**64, min(_CHUNK, values - shown), dtype=np.uint64)
            share = len(admission.sight(keys, np.ones(len(keys), dtype=np.int64))) / len(keys)
            shown += len(keys)
        yield {"cost": "taken for seen", "at": values, "value": share}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
