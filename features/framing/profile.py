"""Profile of a dataset whose frame was built by jobs, from their counts; as `features.dataset.profile.profile`.

Shape letter: N rows of a table.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset, Items, Users
from features.dataset.profile import (
    Novelty,
    Profile,
    TableProfile,
    TextProfile,
    ValueRange,
    VectorProfile,
    iso_time,
)
from features.dataset.split import PARTS
from features.errors import DatasetError
from features.frame_blocks import Blocks
from features.framing.choices import Built
from features.framing.dimension import Dimension
from features.framing.parse import TableCounts
from features.value.known_ids import few_known_counted


def profile_of(dataset: Dataset, built: Built, parts: dict[str, Blocks]) -> Profile:
    """Returns the profile of a dataset.

    Args:
        dataset: Descriptor of the tables.
        built: Counts of the jobs.
        parts: Examples of each part.

    Raises:
        DatasetError: No text of the items holds a usable word.
    """
    labels = built.labels
    total = labels.positives + labels.negatives
    dimensions = {"item": built.items, "user": built.users}
    tables: dict[str, TableProfile] = {}
    unknown, warnings = {"item": 0, "user": 0}, []
    for kind, source in (("item", dataset.items), ("user", dataset.users)):
        if source is None:
            continue
        tables[f"{kind}s"] = _table(source, built.tables[kind], dimensions[kind])
        unknown[kind] = sum(one.unknown.get(kind, 0) for one in built.strange)
        strange = dimensions[kind].unknown_id(
            next((row for one in built.strange if (row := one.first.get(kind)) is not None), None)
        )
        known = pl.scan_parquet(dimensions[kind].shards[0]).select(f"{kind}_id").head(1).collect().to_series().first()
        warnings += few_known_counted(unknown[kind], total, kind, strange=strange, known=known)
    tables["events"] = TableProfile(
        rows=sum(one.rows for one in built.events),
        nulls=_summed([one.nulls for one in built.events]),
        cardinalities={name: _cardinality(built.shards, name) for name in dataset.events.row_categories},
    )
    times = [time for one in built.events for time in one.times]
    return Profile(
        name=dataset.name,
        tables=tables,
        users=built.distinct["user"] if dataset.events.user else None,
        items=built.distinct["item"] if dataset.events.item else None,
        span=ValueRange(iso_time(min(times)), iso_time(max(times))) if dataset.events.time else None,
        labels=labels,
        text=_text(dataset, built.tables["item"]) if dataset.has_text else None,
        vectors=_vectors(dataset, built.tables["item"]),
        unknown_items=unknown["item"],
        unknown_users=unknown["user"],
        split={part: sum(one.events[part] for one in built.parts) for part in PARTS},
        unseen_users=_novelty(parts, "user", built.users.height) if dataset.events.user else None,
        unseen_items=_novelty(parts, "item", built.items.height) if dataset.events.item else None,
        warnings=tuple(warnings),
    )


def _table(source: Items | Users, counts: Sequence[TableCounts], dimension: Dimension) -> TableProfile:
    cardinalities = {name: _cardinality(dimension.shards, name) for name in source.categorical_features}
    return TableProfile(sum(one.rows for one in counts), _summed([one.nulls for one in counts]), cardinalities)


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for one in counts for name in one)
    return {name: sum(one[name] for one in counts) for name in names}


def _cardinality(shards: Sequence[Path], name: str) -> int:
    distinct: pl.Series | None = None
    for shard in shards:
        values = pl.read_parquet(shard, columns=[name])[name]
        flat = values.explode() if values.dtype == pl.List else values
        more = flat.drop_nulls().unique()
        distinct = more if distinct is None else pl.concat([distinct, more]).unique()
    return 0 if distinct is None else len(distinct)


def _text(dataset: Dataset, counts: Sequence[TableCounts]) -> TextProfile:
    lengths: Counter[int] = Counter()
    for one in counts:
        lengths.update(one.lengths)
    values = np.array(sorted(lengths), dtype=np.int64)
    ends = np.cumsum([lengths[value] for value in values.tolist()])
    total, unusable = int(ends[-1]), sum(one.unusable for one in counts)
    if unusable == total:
        raise DatasetError(
            f"{dataset.source}: [items] text: the {total} texts hold no usable word; name other columns as text, "
            "or none"
        )
    p50, p90 = (int(values[np.searchsorted(ends, int((total - 1) * q + 0.5), side="right")]) for q in (0.5, 0.9))
    return TextProfile(p50, p90, int(values[-1]), lengths[0], unusable - lengths[0])


def _vectors(dataset: Dataset, counts: Sequence[TableCounts]) -> dict[str, VectorProfile]:
    if dataset.items is None:
        return {}
    found = {name: [one.vectors[name] for one in counts] for name in dataset.items.vectors}
    return {
        name: VectorProfile(dataset.items.spaces[name], max(width for width, _ in own), sum(less for _, less in own))
        for name, own in found.items()
    }


def _novelty(parts: dict[str, Blocks], kind: str, size: int) -> Novelty:
    """Counts test events whose user or item has no event in training."""
    trained, unseen = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for rows in _event_rows(parts["train"], kind):
        trained[rows] = True
    events = total = 0
    for rows in _event_rows(parts["test"], kind):
        new = rows[~trained[rows]]
        unseen[new] = True
        events, total = events + len(new), total + len(rows)
    return Novelty(events, events / total, int(unseen.sum()))


def _event_rows(blocks: Blocks, kind: str) -> Iterator[NDArray[np.int64]]:
    """Yields the rows of users or items of the events, without drawn negatives, block after block."""
    for block in blocks.frames("event", kind):
        yield block.filter(pl.col("event").is_first_distinct())[kind].to_numpy().astype(np.int64)
