"""Source of an export: the tables of a finished run or of a bundle, scanned and not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from features.aggregate.plan import NOTHING, AggregatePlan
from features.dataset.descriptor import Dataset
from models.bundle.bundle import Bundle

MODELS = ("encoder", "codebook", "tokens")
"""Kinds of models whose ids an export names, in the order in which they compute."""


@dataclass(frozen=True)
class ExportSource:
    """Tables to export.

    Attributes:
        name: Name of the dataset.
        dataset: Descriptor, which says what the columns mean.
        ids: Ids of the bundle, the run's frame and the models, by kind.
        users, items: Dimensions of the frame.
        examples: Examples of the frame, with row numbers of `users` and `items`. None for a bundle.
        visits: Kept visits of all users, `user_id`, `item_id`, `time`, of each user oldest first. None for a run that
            was not published.
        history_length: Length of a history.
        aggregates: Plan of the examples' aggregates.
    """

    name: str
    dataset: Dataset
    ids: Mapping[str, str]
    users: pl.LazyFrame
    items: pl.LazyFrame
    examples: pl.LazyFrame | None = None
    visits: pl.LazyFrame | None = None
    history_length: int = 0
    aggregates: AggregatePlan = field(default=NOTHING)

    @property
    def has_clock(self) -> bool:
        """True if the events have times, false if they have positions."""
        return self.dataset.events.time is not None


def bundle_source(bundle: Bundle) -> ExportSource:
    """Returns the tables of a bundle: items, users and their histories before the test part, without examples."""
    models = {kind: getattr(bundle.manifest, kind) for kind in MODELS}
    return ExportSource(
        name=bundle.dataset.name,
        dataset=bundle.dataset,
        ids={"bundle": bundle.id} | {kind: found for kind, found in models.items() if found},
        users=pl.scan_parquet(bundle.directory / "users.parquet"),
        items=pl.scan_parquet(bundle.directory / "items.parquet"),
        visits=pl.scan_parquet(bundle.directory / "history.parquet"),
        history_length=bundle.schema.history_length,
    )
