"""Chooses one brand-new item that is added while everything runs, and a user who likes its kind."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from features.dataset.descriptor import Dataset
from features.dataset.tables import read_table
from models.bundle.bundle import Bundle
from tessera.demo import synthetic

_SYNTHETIC_KIND = "sourdough bread"


@dataclass(frozen=True)
class Newcomer:
    """A brand-new item as a message, and a user who likes its kind."""

    message: dict[str, Any]
    item: str
    title: str
    user: str


def choose_newcomer(dataset: Dataset, bundle: Bundle) -> Newcomer | None:
    """A brand-new item and a user who likes its kind.

    For the synthetic dataset both come from what generated it. Elsewhere the user is the one whose history is closest
    together in content, and the item is a copy, under a new id, of what is most typical of it.
    """
    if dataset.items is None or not dataset.has_content or dataset.events.user is None:
        return None
    title, directory = dataset.items.text[0], dataset.directory
    if synthetic.is_synthetic(directory):
        for kind in (_SYNTHETIC_KIND, *synthetic.tree().names):
            if fans := synthetic.fans(directory, kind):
                message = synthetic.new_item(1, kind)
                return Newcomer(message, str(message[dataset.items.id]), str(message[title]), fans[0])
        return None
    found = _focused(bundle)
    if found is None:
        return None
    user, liked = found
    raw = read_table(dataset.items, dataset.directory, table="items")
    row = raw.filter(pl.col(dataset.items.id).cast(pl.String) == liked).head(1).to_dicts()
    if not row:
        return None
    message = row[0] | {dataset.items.id: "brand-new-item"}
    return Newcomer(message, "brand-new-item", f"{message[title]} (the same content under a new id)", user)


def _focused(bundle: Bundle) -> tuple[str, str] | None:
    """The user with the most uniform taste of those with a full history, and the item most typical of it."""
    placed = bundle.items.select("item_id", "content_vector").drop_nulls()
    visits = bundle.history.join(placed, on="item_id", how="inner", maintain_order="left")
    best: tuple[float, str, str] | None = None
    for (user,), visited in visits.group_by("user_id", maintain_order=True):
        if visited.height < bundle.schema.history_length:
            continue
        vectors = visited["content_vector"].to_numpy()
        mean = vectors.mean(axis=0)
        # Of unit vectors, the length of the mean says how alike they are.
        together = float(np.linalg.norm(mean))
        if best is None or together > best[0]:
            best = (together, str(user), visited["item_id"][int(np.argmax(vectors @ mean))])
    return best[1:] if best else None
