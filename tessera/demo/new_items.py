"""Ranks many new items for users who like their kind and for users who do not, with content and without.

Each new item is sent twice under two new ids: once with its content, and once as an id alone. Every drawn user ranks
the catalogue with both forms in one request, so that both forms meet the same users and the same competitors.

Shape letters: U users, I new items.
"""

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.dataset.split import PARTS
from features.dataset.tables import read_table
from models.bundle.bundle import Bundle
from serving.client import Client
from serving.ranking.service import MAX_CANDIDATES
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from tessera.demo import synthetic
from tessera.pages.new_items import NewItemRanks, Ranks
from tessera.pipeline.artifact import read_frame
from tessera.stream_service import StreamService

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ITEMS, USERS = 72, 100
"""Number of new items and of users who rank them, where the dataset has so many."""
_LEAST_VISITS = 5


@dataclass(frozen=True)
class NewItemPlan:
    """New items, the users who rank them, and which of these users like which item.

    Attributes:
        item_column: Name of the items' id column.
        catalogue: ids of the items that the new items compete with.
        with_content, without_content: items as messages, I each, in the same order.
        users: ids, U.
        fans, others: (U, I), users who like the item's kind, and users who do not; a user may be neither.
        kind: origin of the items, as text.
        fans_are, others_are: definition of the two groups, as text.
        seed: decides the draw.
        before_events: True if the held-back events decide who likes an item. The stream must not have read them.
    """

    item_column: str
    catalogue: Sequence[str]
    with_content: Sequence[Mapping[str, Any]]
    without_content: Sequence[Mapping[str, Any]]
    users: Sequence[str]
    fans: Bools
    others: Bools
    kind: str
    fans_are: str
    others_are: str
    seed: int
    before_events: bool

    @property
    def messages(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Ids and messages of all 2 I items, the items with content first."""
        rows = (*self.with_content, *self.without_content)
        return [(str(row[self.item_column]), row) for row in rows]


def plan_new_items(dataset: Dataset, bundle: Bundle, run_directory: Path, *, seed: int) -> NewItemPlan | None:
    """Chooses new items and users; returns None if the dataset has no content or no users to compare.

    The generator of a synthetic dataset writes one new item for each of its subtopics, and knows all tastes. For any
    other dataset the new items are copies of catalogue items under new ids, and the held-back events say who likes
    them. The ranker must not have read these events: rank the items before the events are streamed.

    Args:
        run_directory: output of the offline job; its frame holds the held-back events.
        seed: of the items and of the draw of users.
    """
    if dataset.items is None or not dataset.has_text or dataset.events.user is None:
        return None
    if synthetic.is_synthetic(dataset.directory):
        return _generated(dataset.directory, bundle, seed)
    return _copied(dataset, bundle, run_directory, seed)


@contextlib.contextmanager
def new_items(log: EventLog, stream: StreamService, topics: Topics, plan: NewItemPlan) -> Iterator[None]:
    """Adds the planned items through the stream, and deletes them on exit."""
    log.append(topics.items, [(name.encode(), encode_row(row)) for name, row in plan.messages])
    stream.drain()
    try:
        yield
    finally:
        deleted = [(name, {plan.item_column: row[plan.item_column], "_deleted": True}) for name, row in plan.messages]
        log.append(topics.items, [(name.encode(), encode_row(row)) for name, row in deleted])
        stream.drain()


def measure_ranks(client: Client, plan: NewItemPlan) -> NewItemRanks:
    """Ranks the new items over HTTP and returns each rank among the catalogue, by group and form.

    The items must be rankable already. A new item's rank is one more than the number of catalogue items above it; the
    other new items do not count. A catalogue that does not fit into a request is sampled by the plan's seed.

    Raises:
        ApiError: the server refuses a request.
        ValueError: the server does not know one of the new items.
    """
    new, catalogue = [name for name, _ in plan.messages], list(plan.catalogue)
    if len(catalogue) > (room := MAX_CANDIDATES - len(new)):
        chosen = np.random.default_rng([plan.seed, 1]).choice(len(catalogue), size=room, replace=False)
        catalogue = [catalogue[index] for index in chosen]
    ranks = np.stack([_ranks(client, user, new, catalogue) for user in plan.users])
    count = len(plan.with_content)

    def groups(ranks_of: Ints) -> Ranks:
        return Ranks(fans=ranks_of[plan.fans].tolist(), others=ranks_of[plan.others].tolist())

    return NewItemRanks(
        items=count,
        users=len(plan.users),
        catalogue=len(catalogue),
        seed=plan.seed,
        kind=plan.kind,
        fans_are=plan.fans_are,
        others_are=plan.others_are,
        with_content=groups(ranks[:, :count]),
        without_content=groups(ranks[:, count:]),
    )


def _ranks(client: Client, user: str, new: Sequence[str], catalogue: Sequence[str]) -> Ints:
    """Returns the ranks (2 I,) of the new items for a user, from 1, among the catalogue."""
    answer = client.rank(user, [*catalogue, *new], k=MAX_CANDIDATES)
    if answer.unknown_items:
        raise ValueError(f"the server does not know the new item {answer.unknown_items[0]!r}")
    scores = {ranked.item: ranked.score for ranked in answer.items}
    ascending = np.sort([scores[item] for item in catalogue])
    above = len(catalogue) - np.searchsorted(ascending, [scores[item] for item in new], side="right")
    ranks: Ints = above + 1
    return ranks


def _generated(directory: Path, bundle: Bundle, seed: int) -> NewItemPlan | None:
    users = _drawn(_experienced(bundle), seed)
    if not users:
        return None
    kinds = synthetic.tree().names
    rows = [synthetic.new_item(1_000 * (seed + 1) + number, kind) for number, kind in enumerate(kinds[:ITEMS])]
    taste = synthetic.tastes(directory, users)[:, : len(rows)]
    with_content, without_content = _forms(rows, "item_id")
    return NewItemPlan(
        item_column="item_id",
        catalogue=_catalogue(bundle),
        with_content=with_content,
        without_content=without_content,
        users=users,
        fans=taste >= np.quantile(taste, 0.9, axis=0),
        others=taste <= np.quantile(taste, 0.5, axis=0),
        kind="generated articles, one of each subtopic",
        fans_are="the tenth of the users who like its subtopic most, by the tastes of the generator",
        others_are="the half of the users who like its subtopic least",
        seed=seed,
        before_events=False,
    )


def _copied(dataset: Dataset, bundle: Bundle, run_directory: Path, seed: int) -> NewItemPlan | None:
    """Copies catalogue items; a user is a fan of a copy if the first liking of the original is a held-back event."""
    assert dataset.items is not None
    frame = read_frame(run_directory / "frame")
    positive = pl.concat(
        block.filter(pl.col("label") == 1)
        for part in PARTS
        for block in frame.blocks(part).frames("user", "item", "split", "label")
    )
    held_back = positive.filter(pl.col("split") == "test")
    numbers = held_back["user"].unique().to_numpy()
    possible = set(frame.users["user_id"].gather(numbers).to_list())
    users = _drawn([user for user in _experienced(bundle) if user in possible], seed)
    user_numbers = {name: number for number, name in enumerate(frame.users["user_id"].to_list())}
    drawn = [user_numbers[user] for user in users]
    earlier = positive.filter(pl.col("split") != "test").select("user", "item")
    pairs = held_back.filter(pl.col("user").is_in(drawn)).join(earlier, on=["user", "item"], how="anti")
    described = frame.items.with_row_index("item").filter("listed", pl.col("content_vector").is_not_null())
    liked = np.sort(pairs.join(described, on="item", how="semi")["item"].unique().to_numpy())
    chosen = np.random.default_rng([seed, 2]).permutation(liked)[:ITEMS]
    if not len(chosen):
        return None
    first = set(pairs.select("user", "item").iter_rows())
    any_time = set(positive.select("user", "item").iter_rows())
    fans = np.array([[(user, item) in first for item in chosen.tolist()] for user in drawn])
    familiar = np.array([[(user, item) in any_time for item in chosen.tolist()] for user in drawn])
    originals = frame.items["item_id"].gather(chosen).to_list()
    with_content, without_content = _forms(_copies(dataset, originals), dataset.items.id)
    return NewItemPlan(
        item_column=dataset.items.id,
        catalogue=_catalogue(bundle),
        with_content=with_content,
        without_content=without_content,
        users=users,
        fans=fans,
        others=~familiar,
        kind="copies of catalogue items under new ids",
        fans_are="users who liked the original in a held-back event, which the ranker has not read",
        others_are="users who never liked the original",
        seed=seed,
        before_events=True,
    )


def _copies(dataset: Dataset, originals: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the originals' rows of the items' table, in order, under new ids."""
    assert dataset.items is not None
    key = dataset.items.id
    raw = read_table(dataset.items, dataset.directory, table="items")
    rows = {str(row[key]): row for row in raw.filter(pl.col(key).cast(pl.String).is_in(originals)).to_dicts()}
    return [rows[name] | {key: f"new-{number:04}"} for number, name in enumerate(originals)]


def _forms(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows under new ids, first with all columns and then with the id alone."""
    full = [{**row, key: f"{row[key]}-with-content"} for row in rows]
    return full, [{key: f"{row[key]}-without-content"} for row in rows]


def _catalogue(bundle: Bundle) -> list[str]:
    ids: list[str] = bundle.items.filter("listed")["item_id"].to_list()
    return ids


def _experienced(bundle: Bundle) -> list[str]:
    """Users who liked several items in the bundle's history, in the order of their ids."""
    counts = bundle.history.group_by("user_id").len().filter(pl.col("len") >= _LEAST_VISITS)
    return sorted(counts["user_id"].to_list())


def _drawn(users: Sequence[str], seed: int) -> list[str]:
    order = np.random.default_rng([seed, 3]).permutation(len(users))[:USERS]
    return [users[index] for index in order]


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Returns a row as a message, without its nulls; dates are written in ISO 8601."""
    return json.dumps({name: value for name, value in row.items() if value is not None}, default=_iso).encode()


def _iso(value: Any) -> str:
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__} has no form in JSON")
