"""The account of one search: method, share of the matches, and the costs that decided."""

from dataclasses import dataclass

POPULAR = "popular"
"""Method that found nothing to search by, and returned the most popular items of training."""


@dataclass(frozen=True)
class SearchPlan:
    """Plan of a search, as it was carried out.

    Attributes:
        method: exact, ivf, ivf+filter (under a bitmap), bits (a shortlist by bit codes, put in order by rows),
            ivf>filter or bits>filter (found first, filtered after), words (the lexical channel alone), or popular.
        share: Approximate share of the items that match.
        matches: Number of matches, if it was counted.
        lists: Inverted lists that were scanned.
        shortlist: Items that the bits found and the rows put in order.
        cost, other_cost: Cost of this method and of the cheapest alternative, in vectors scored.
    """

    method: str
    share: float
    matches: int | None = None
    lists: int | None = None
    shortlist: int | None = None
    cost: float = 0.0
    other_cost: float = 0.0

    @property
    def why(self) -> str:
        """Numbers that decided, in words."""
        costs = f"costs {self.cost:,.0f} vectors scored"
        if self.other_cost:
            costs += f", the other way {self.other_cost:,.0f}"
        if self.method == "exact":
            return f"to score {self.matches:,} items {costs}" if self.other_cost else "few items: all are scored"
        if self.method == "ivf":
            return f"no filter: {self.lists} lists"
        if self.method == "ivf+filter":
            return f"to scan {self.lists} lists under a bitmap of {self.matches:,} matches {costs}"
        if self.method == "bits":
            return f"to scan the bits of {self.matches:,} items and order {self.shortlist:,} by their rows {costs}"
        if self.method.endswith(">filter"):
            return f"about {self.share:.0%} match: found without the filter, filtered after"
        if self.method == "words":
            return f"the words of the query are in {self.matches:,} items"
        return "no vector to search by: the most popular"
