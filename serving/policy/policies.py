"""Policies of one bundle: what they read of the candidates, and the candidates that they need."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.errors import DatasetError, EventError
from features.hashing import fingerprint
from features.shown.policy import Policy
from features.value.filter import Filter
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from serving.policy.arrange import Arrangement, PolicyInputs, ValueGroups, arrange, places_of
from serving.policy.item_codes import ItemCodes
from serving.retrieval.filter import Attributes
from serving.retrieval.fusion import Hits

POSITIVES = "train_positives"
"""Column of the items' positive events in training. It is filterable where a policy has a floor of new items."""
CANDIDATES = 200
"""Fewest candidates among which a policy chooses, if retrieval finds them."""
_FOR_A_PIN, _FOR_A_PLACE, _NEW_AT_LEAST = 5, 4, 20
_LEAST_REST = 2.0**-25

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Keys = NDArray[np.uint64]
Search = Callable[[int, Filter | None], Hits]
"""Returns the best items, at most a number, that match a filter."""
NO_KEYS: Keys = np.zeros(0, dtype=np.uint64)


class Policies:
    """Reader of the candidates of one bundle for its policies.

    Args:
        bundle: The bundle.
        catalogue: Users and items.
        attributes: Filterable columns of the items.
        codes: Semantic IDs of the items; None if no policy compares them.
    """

    def __init__(self, bundle: Bundle, catalogue: Catalogue, attributes: Attributes, codes: ItemCodes | None) -> None:
        self._bundle, self._catalogue, self._attributes, self._codes = bundle.id, catalogue, attributes, codes
        self._policies: Mapping[str, Policy] = bundle.dataset.policies

    def find(self, name: str) -> Policy:
        """Returns a policy by its name.

        Raises:
            EventError: The bundle has no policy of this name.
        """
        if name not in self._policies:
            known = ", ".join(self._policies) or "none; declare [policies] and run again"
            raise EventError(f"policy: bundle {self._bundle} has no policy {name!r}; choose of {known}")
        return self._policies[name]

    def arrange(
        self,
        policy: Policy,
        names: Sequence[str],
        numbers: Ints,
        relevance: NDArray[np.float64],
        consumed: Keys,
        k: int,
        *,
        draw: str,
    ) -> Arrangement:
        """Arranges candidates. The caller holds the lock of the catalogue.

        Args:
            policy: The policy.
            names, numbers: (n,) ids and numbers of the candidates.
            relevance: (n,) relevance on a logarithmic scale.
            consumed: Keys of the items that are left out, ascending.
            k: Largest number of items of the answer.
            draw: Text that decides what chance draws.
        """
        boosts = np.zeros(len(numbers))
        for boost in policy.boost:
            boosts[self._attributes.matches(boost.filter, numbers)] += np.log(boost.times)
        none = np.zeros(len(numbers), dtype=np.bool_)
        diversity = policy.diversity
        by = diversity.by if diversity is not None else None
        inputs = PolicyInputs(
            relevance=relevance,
            consumed=is_consumed(names, consumed),
            boosts=boosts,
            pinned=[self._attributes.matches(pin.filter, numbers) for pin in policy.pin],
            new=none if policy.new is None else self._attributes.matches(is_new(policy), numbers),
            vectors=self._catalogue.vectors[numbers] if by == "content" else None,
            semantic_ids=self._codes.take(numbers) if by == "semantic-id" and self._codes is not None else None,
            groups=self._groups(diversity.column, numbers) if diversity is not None and diversity.column else None,
        )
        return arrange(inputs, policy, k, draw=draw)

    def _groups(self, column: str, numbers: Ints) -> ValueGroups:
        values, lengths = self._attributes.values(column, numbers)
        _, codes = np.unique(values, return_inverse=True)
        return ValueGroups(codes.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]))


def is_consumed(names: Sequence[str], consumed: Keys) -> Bools:
    """Returns which items (n,) are among the consumed ones.

    Args:
        names: (n,) ids of items.
        consumed: Keys of the consumed items, ascending.
    """
    if not len(consumed):
        return np.zeros(len(names), dtype=np.bool_)
    keys = fingerprint(names)
    found: Bools = consumed[np.minimum(np.searchsorted(consumed, keys), len(consumed) - 1)] == keys
    return found


def is_new(policy: Policy) -> Filter:
    """Returns the filter of the new items of a policy with a floor."""
    return Filter(column=POSITIVES, lte=policy.new.positives if policy.new is not None else 0)


def log_odds(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns the log-odds (n,) of probabilities (n,), in the same order, finite for 0 and 1 too."""
    exact = scores.astype(np.float64)
    found: NDArray[np.float64] = np.log(np.maximum(exact, np.finfo(np.float32).smallest_subnormal))
    return found - np.log(np.maximum(1.0 - exact, _LEAST_REST))


def by_rank(count: int) -> NDArray[np.float64]:
    """Returns the relevance (n,) of retrieved items, best first: the negative logarithm of the rank."""
    return -np.log(np.arange(1, count + 1, dtype=np.float64))


def candidates_for(
    search: Search,
    k: int,
    allowed: Filter | None,
    policy: Policy,
    consumed: Keys,
    names: Callable[[Ints], Sequence[str]],
    *,
    least: int = CANDIDATES,
) -> Hits:
    """Finds the candidates among which a policy chooses: the best items, then items for its pins and its floor.

    Args:
        search: Finds items.
        k: Largest number of items of the answer.
        allowed: Condition that all items must meet.
        policy: The policy.
        consumed: Keys of the items that are left out, ascending.
        names: Returns the ids of items by number.
        least: Fewest candidates.
    """
    found = [unconsumed(search, max(k, least), allowed, consumed, names)]
    found += [unconsumed(search, _FOR_A_PIN, _both(allowed, pin.filter), consumed, names) for pin in policy.pin]
    if policy.new is not None:
        count = max(_FOR_A_PLACE * places_of(policy.new.share, k), _NEW_AT_LEAST)
        found.append(unconsumed(search, count, _both(allowed, is_new(policy)), consumed, names))
    if len(found) == 1:
        return found[0]
    numbers = np.concatenate([hits.numbers for hits in found])
    _, first = np.unique(numbers, return_index=True)
    scores = np.concatenate([hits.scores for hits in found])
    ranks = [rank for hits in found for rank in hits.ranks]
    return taken(Hits(numbers, scores, found[0].plan, ranks, found[0].lists), np.sort(first))


def unconsumed(
    search: Search, k: int, allowed: Filter | None, consumed: Keys, names: Callable[[Ints], Sequence[str]]
) -> Hits:
    """Returns the k best items that are not consumed. Asks for more while consumed items take places."""
    if not len(consumed):
        return search(k, allowed)
    asked = k + min(len(consumed), k)
    while True:
        hits = search(asked, allowed)
        kept = np.flatnonzero(~is_consumed(names(hits.numbers), consumed))
        if len(kept) >= k or len(hits.numbers) < asked:
            return taken(hits, kept[:k])
        asked *= 2


def taken(hits: Hits, index: Ints) -> Hits:
    """Returns the hits at positions (m,)."""
    ranks = [hits.ranks[place] for place in index.tolist()]
    return Hits(hits.numbers[index], hits.scores[index], hits.plan, ranks, hits.lists)


def _both(one: Filter | None, other: Filter) -> Filter:
    return other if one is None else Filter.model_validate({"and": [one, other]})


def check_filters(dataset: Dataset, items: pl.DataFrame) -> None:
    """Checks the filters of a dataset's policies against the values of its items.

    Args:
        dataset: The dataset.
        items: Rows of the items, with the filterable columns.

    Raises:
        DatasetError: A filter compares a column with a value of another kind.
    """
    if not dataset.policies or dataset.items is None:
        return
    attributes = Attributes(items, dataset.items.filterable, of_csv=dataset.items.kind == "csv")
    for name, policy in dataset.policies.items():
        for field, wanted in policy.filters():
            try:
                wanted.check_size()
                attributes.matches(wanted, np.zeros(0, dtype=np.int64))
            except EventError as error:
                reason = str(error).removeprefix("filter: ")
                raise DatasetError(
                    f"{dataset.source}: [policies] {name}.{field}: {reason}; compare the column with values of its kind"
                ) from error
