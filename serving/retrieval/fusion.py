"""Lists of items that were ranked in different ways, and their fusion by ranks.

Each list orders items by scores of its own, and no score of one list is compared with a score of another. The lists are
fused by reciprocal ranks: Cormack et al., "Reciprocal Rank Fusion" (SIGIR 2009), equation 1, with k = 60.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from features.content.lexical import fuse_scores
from serving.retrieval.rows import Floats, Ints
from serving.retrieval.search_plan import POPULAR, SearchPlan

BOTH = "both"
"""Source of an item that two lists found."""
DEPTH = 100
"""Fewest items of each list that are fused."""


@dataclass(frozen=True)
class Hits:
    """Items found, best first.

    Attributes:
        numbers: (n,) items.
        scores: (n,) scores of the only list, or the sums of weighed reciprocal ranks of several.
        plan: Plan of the first list that ranked items.
        ranks: Rank of each item in each list that found it, from 1, by the list's name. Empty for the most popular
            items, which no list ranked.
        lists: Names of the lists that ranked items; none for the most popular items.
    """

    numbers: Ints
    scores: Floats
    plan: SearchPlan
    ranks: Sequence[dict[str, int]]
    lists: Sequence[str]


@dataclass(frozen=True)
class RankedList:
    """Items in the order of one way to rank them.

    Attributes:
        name: Name of the list.
        numbers: (n,) items, best first; an item occurs once.
        scores: (n,) scores of the list.
        plan: Plan of the search. If its method is `popular`, the list ranks nothing.
        weight: Weight of the list's reciprocal ranks.
    """

    name: str
    numbers: Ints
    scores: Floats
    plan: SearchPlan
    weight: float = 1.0

    @property
    def ranks_items(self) -> bool:
        """True if the list has an order of its own, False for the most popular items, which are the fallback."""
        return self.plan.method != POPULAR

    def alone(self, k: int) -> Hits:
        """Returns the k best items of this list, with the list's own scores."""
        numbers = self.numbers[:k]
        ranks = [{self.name: rank} if self.ranks_items else {} for rank in range(1, len(numbers) + 1)]
        names = (self.name,) if self.ranks_items else ()
        return Hits(numbers, self.scores[:k].astype(np.float32), self.plan, ranks, names)


def fuse_lists(lists: Sequence[RankedList], k: int) -> Hits:
    """Returns the k items with the largest sums of weight / (60 + rank) over the lists.

    One list keeps its own scores. The most popular items are fused with nothing: they answer if no list ranks an item.

    Args:
        lists: One list or more.
        k: Largest number of items.
    """
    ranking = [one for one in lists if one.ranks_items]
    if len(lists) == 1 or not any(len(one.numbers) for one in ranking):
        fallback = next((one for one in lists if not one.ranks_items), lists[0])
        return fallback.alone(k)
    numbers, sums = fuse_scores([one.numbers for one in ranking], k, [one.weight for one in ranking])
    places = [(one.name, {item: rank for rank, item in enumerate(one.numbers.tolist(), 1)}) for one in ranking]
    ranks = [{name: place[number] for name, place in places if number in place} for number in numbers.tolist()]
    return Hits(numbers, sums.astype(np.float32), ranking[0].plan, ranks, tuple(one.name for one in ranking))


def source_of(ranks: Mapping[str, int]) -> str:
    """Returns the name of the only list that found an item, `both` if two did, and `popular` if none did."""
    if len(ranks) > 1:
        return BOTH
    return next(iter(ranks), POPULAR)
