"""Chooses one new item that is added while the stream and the server run, and a user who likes its kind."""

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
    """New item as a message, with its id and title, and a user who likes its kind."""

    message: dict[str, Any]
    item: str
    title: str
    user: str


def choose_newcomer(dataset: Dataset, bundle: Bundle) -> Newcomer | None:
    """Chooses a new item and a user who likes its kind; returns None for a dataset without content or users.

    For the synthetic dataset both come from its generator. For another dataset the user is the user whose history is
    most uniform in content, and the item is a copy of the most typical item of this history, under a new id.
    """
    if dataset.items is None or not dataset.has_text or dataset.events.user is None:
        return None
    title, directory = dataset.items.text[0], dataset.directory
    if synthetic.is_synthetic(directory):
        for kind in (_SYNTHETIC_KIND, *synthetic.tree().names):
            if fans := synthetic.fans(directory, kind):
                message = synthetic.new_item(1, kind)
                return Newcomer(message, str(message[dataset.items.id]), str(message[title]), fans[0])
        return None
    focused = _focused(bundle)
    if focused is None:
        return None
    user, liked = focused
    raw = read_table(dataset.items, dataset.directory, table="items")
    row = raw.filter(pl.col(dataset.items.id).cast(pl.String) == liked).head(1).to_dicts()
    if not row:
        return None
    message = row[0] | {dataset.items.id: "brand-new-item"}
    return Newcomer(message, "brand-new-item", f"{message[title]} (the same content under a new id)", user)


def _focused(bundle: Bundle) -> tuple[str, str] | None:
    """Returns the user with the most uniform full history, and its most typical item; None without such a user."""
    placed = bundle.items.select("item_id", "content_vector").drop_nulls()
    visits = bundle.history.join(placed, on="item_id", how="inner", maintain_order="left")
    best: tuple[float, str, str] | None = None
    for (user,), visited in visits.group_by("user_id", maintain_order=True):
        if visited.height < bundle.schema.history_length:
            continue
        vectors = visited["content_vector"].to_numpy()
        mean = vectors.mean(axis=0)
        # The length of the mean of unit vectors measures their likeness.
        together = float(np.linalg.norm(mean))
        if best is None or together > best[0]:
            best = (together, str(user), visited["item_id"][int(np.argmax(vectors @ mean))])
    return best[1:] if best else None
