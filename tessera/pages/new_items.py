"""The part of the demo's report about new items: ranks of many of them, and the story of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tessera.pages import markup
from tessera.pages import svg as plot

Ranked = tuple[str, str, float]
_FIRST_TENTH = 0.1


@dataclass(frozen=True)
class Ranks:
    """Ranks of new items, from 1, one per pair of user and item.

    Attributes:
        fans: ranks for users who like the item's kind.
        others: ranks for users who do not.
    """

    fans: Sequence[int]
    others: Sequence[int]

    @property
    def ratio(self) -> float:
        """Median rank for fans, divided by the median rank for others."""
        return float(np.median(self.fans) / np.median(self.others))


@dataclass(frozen=True)
class NewItemRanks:
    """Ranks of many new items among the catalogue, with their content and without.

    Attributes:
        items: number of new items.
        users: number of users who ranked all of them.
        catalogue: number of catalogue items that each new item was ranked among.
        seed: of the items and of the draw of users.
        kind: origin of the items, as text.
        fans_are, others_are: definition of the two groups, as text.
        with_content: ranks of the items with their content.
        without_content: ranks of the same items, known by their id alone.
    """

    items: int
    users: int
    catalogue: int
    seed: int
    kind: str
    fans_are: str
    others_are: str
    with_content: Ranks
    without_content: Ranks


@dataclass(frozen=True)
class NewItem:
    """An item that came during the demo.

    Attributes:
        user: for whom it was ranked.
        rank: from 1, among `of` items.
        seconds_to_rankable: from its message to the first request that could rank it.
        neighbours: (item id, title, similarity) of the items whose content is nearest.
    """

    id: str
    title: str
    user: str
    rank: int
    of: int
    seconds_to_rankable: float
    neighbours: Sequence[Ranked] = ()


def rank_figures(ranks: NewItemRanks) -> list[tuple[str, str, str]]:
    """Returns (label, value, note) of the medians with content, then without."""
    label = "median rank of a new item, for users who like its kind vs users who do not"
    draw = f"among {ranks.catalogue:,} items; {ranks.items:,} new items, {ranks.users:,} users, seed {ranks.seed}"
    return [
        (label, _pair(ranks.with_content), draw),
        ("the same items and users, without content", _pair(ranks.without_content), "the items' ids alone"),
    ]


def ranks_section(ranks: NewItemRanks) -> str:
    """Draws and tabulates the ranks by group and form."""
    forms = (("with content", ranks.with_content), ("without content", ranks.without_content))
    groups, body = [], []
    for form, found in forms:
        rows = []
        body.append([form])
        for name, values in (("like its kind", found.fans), ("do not", found.others)):
            middle = float(np.median(values))
            rows.append(plot.Row(name, middle, f"{middle:,.0f}", name == "like its kind"))
            quarters = (f"{value:,.0f}" for value in np.percentile(values, [25, 50, 75]))
            share = float(np.mean(np.array(values) <= ranks.catalogue * _FIRST_TENTH))
            body.append([name, *quarters, f"{100 * share:.0f} %"])
        groups.append((form, rows))
    last = ranks.catalogue + 1
    ticks = [(1.0, "first"), ((last + 1) / 2, "middle"), (float(last), f"{last:,}, last")]
    drawing = plot.rows(groups, describe="Median rank of a new item", low=1, high=last, form="dot", ticks=ticks)
    caption = (
        "Median rank of a new item for users who like its kind and for users who do not; further left is better. "
        "Without content the two groups should not differ."
    )
    columns = ["", ">best quarter", ">median", ">worst quarter", ">in first tenth"]
    about = (
        f"{ranks.items:,} new items ({ranks.kind}), each ranked among {ranks.catalogue:,} items for {ranks.users:,} "
        f"users who were drawn at random, seed {ranks.seed}. Users who like the kind: {ranks.fans_are}. "
        f"Users who do not: {ranks.others_are}. Content: text and categories. Without content: an id alone."
    )
    table = markup.table(columns, body, strong="like its kind") + markup.caption(about)
    return markup.section(
        "New items",
        markup.cards(markup.figure("Where new items land", drawing, caption), markup.card("Ranks", table)),
    )


def item_section(item: NewItem | None, before: Sequence[Ranked], after: Sequence[Ranked], *, seconds: str) -> str:
    """Tells the story of one new item.

    Args:
        before, after: the user's best items before and after the stream, best first.
        seconds: `seconds_to_rankable` as text.
    """
    lists = [
        markup.card(heading, markup.ranked(ranked, item.id if item else ""))
        for heading, ranked in (("Before", before), ("After", after))
        if ranked
    ]
    if item is None:
        none = markup.none("No new item was sent.")
        return markup.section("One new item, live", none, markup.cards(*lists) if lists else "")
    story = (
        f"<p><b>{escape(item.title)}</b> ({escape(item.id)}) arrived while the events were streamed. "
        f"{seconds} later it could be ranked. For user {escape(item.user)} its rank was "
        f"<b>{item.rank:,}</b> of {item.of:,}.</p>"
    )
    near = [[f"{title} ({id_})", f"{similarity:.3f}"] for id_, title, similarity in item.neighbours]
    if near:
        lists.append(markup.card("Nearest by content", markup.table(["item", ">similarity"], near)))
    return markup.section("One new item, live", story, markup.cards(*lists) if lists else "")


def _pair(ranks: Ranks) -> str:
    return f"{np.median(ranks.fans):,.0f} vs {np.median(ranks.others):,.0f}"
