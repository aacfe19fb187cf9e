"""Arranges the candidates of a request by a policy.

Order of the rules: consumed items leave, boosts change the relevance, pins take their places, chance fills the places
of new items, and the other places go to the best of the remaining candidates, one after another. Diversity is
maximal marginal relevance: Carbonell & Goldstein, "The Use of MMR" (SIGIR 1998), equation 1, where the relevance is
scaled to 0..1 over the candidates and `weight` is 1 - lambda.

The slow twin is `serving.policy.reference`. Shape letters: n candidates, m items of the answer, D dim, Q levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.hashing import fingerprint, splitmix64
from features.shown.policy import Diversity, Policy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MOST_DIVERSE = 100
"""First places of an answer for which items are compared. Later places go to the best remaining items."""
# Distance between two states of splitmix64.
_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ValueGroups:
    """Values of a capped column by candidate: those of candidate i are `codes[starts[i]:starts[i + 1]]`."""

    codes: Ints
    starts: Ints

    def of(self, candidate: int) -> Ints:
        """Returns the codes of a candidate's values."""
        return self.codes[self.starts[candidate] : self.starts[candidate + 1]]


@dataclass(frozen=True)
class PolicyInputs:
    """Candidates of a request, as a policy sees them.

    Attributes:
        relevance: (n,) relevance on a logarithmic scale: log-odds of a score, or the negative logarithm of a rank.
        consumed: (n,) True for an item that the user has consumed and the policy leaves out.
        boosts: (n,) sum of the logarithms of the boosts that the candidate matches.
        pinned: For each pin, (n,) True for a candidate that matches the pin.
        new: (n,) True for a new item.
        vectors: (n, D) float32 unit vectors, zero without content; None unless content is compared.
        semantic_ids: (n, Q) codes, negative without a Semantic ID; None unless Semantic IDs are compared.
        groups: Values of the capped column; None without a cap.
    """

    relevance: Floats
    consumed: Bools
    boosts: Floats
    pinned: Sequence[Bools]
    new: Bools
    vectors: NDArray[np.float32] | None = None
    semantic_ids: Ints | None = None
    groups: ValueGroups | None = None


@dataclass(frozen=True)
class Arrangement:
    """Items of an answer as a policy arranges them.

    Attributes:
        order: (m,) numbers of the candidates, in the order in which they are shown.
        places: (m,) place of each by relevance alone, from 1, among the candidates that were not left out.
        boosts: (m,) factor by which boosts changed each item's odds or reciprocal rank; 1 without a boost.
        pinned: (m,) True for an item that a pin placed.
        drawn: (m,) True for an item that chance placed.
        propensities: (m,) probability with which chance gave the item a place; 1 for an item that chance did not place.
        similarities: (m,) largest similarity with an item that was placed before, 0 if none was compared.
        consumed: Numbers of the candidates that were left out as consumed.
        capped: Numbers of the candidates that a cap refused, and that are more relevant than the last item that neither
            a pin nor chance placed.
    """

    order: Ints
    places: Ints
    boosts: Floats
    pinned: Bools
    drawn: Bools
    propensities: Floats
    similarities: Floats
    consumed: Ints
    capped: Ints

    @property
    def is_fixed(self) -> bool:
        """True if an item has its place by a pin or by chance, so that its place must not be changed."""
        return bool((self.pinned | self.drawn).any())


def arrange(inputs: PolicyInputs, policy: Policy, k: int, *, draw: str) -> Arrangement:
    """Arranges candidates by a policy.

    Args:
        inputs: The candidates.
        policy: The policy.
        k: Largest number of items of the answer.
        draw: Text that decides what chance draws, such as the id of the request.
    """
    ranked = _by_relevance(inputs.relevance, inputs.consumed)
    value = inputs.relevance + inputs.boosts
    order = _by_relevance(value, inputs.consumed)
    places = _Places(inputs, order, min(k, len(order)))
    places.pin(policy)
    propensity = 1.0
    if policy.new is not None:
        propensity = places.draw(policy.new.share, draw)
    _fill(places, value, policy.diversity)
    capped = order[places.blocked[order] & ~places.taken[order]]
    shown = places.slots >= 0
    found = places.slots[shown]
    drawn = places.by_chance[shown]
    by_relevance = np.zeros(len(value), dtype=np.int64)
    by_relevance[ranked] = np.arange(1, len(ranked) + 1)
    own = found[~(places.by_pin | places.by_chance)[shown]]
    last = value[own].min() if len(own) else -np.inf
    return Arrangement(
        order=found,
        places=by_relevance[found],
        boosts=np.exp(inputs.boosts[found]),
        pinned=places.by_pin[shown],
        drawn=drawn,
        propensities=np.where(drawn, propensity, 1.0),
        similarities=places.similarities[found],
        consumed=np.flatnonzero(inputs.consumed),
        capped=capped[(value[capped] > last) | (len(found) < places.size)],
    )


def _by_relevance(value: Floats, consumed: Bools) -> Ints:
    """Returns the candidates that are not left out, best first. Of equal candidates the earlier one is first."""
    order = np.argsort(-value, kind="stable")
    return order[~consumed[order]]


class _Places:
    """Places of an answer while they are filled.

    Attributes:
        size: Number of places.
        slots: (size,) candidate of each place, -1 for a free one.
        by_pin, by_chance: (size,) True for a place that a pin, or chance, has filled.
        taken: (n,) True for a candidate with a place.
        blocked: (n,) True for a candidate that the cap refuses from now on.
        similarities: (n,) largest similarity with an item that was placed before.
    """

    def __init__(self, inputs: PolicyInputs, order: Ints, size: int) -> None:
        count = len(inputs.relevance)
        self.inputs, self.order, self.size = inputs, order, size
        self.slots: Ints = np.full(size, -1, dtype=np.int64)
        self.by_pin, self.by_chance = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
        self.taken, self.blocked = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
        self.similarities: Floats = np.zeros(count)

    def free(self) -> Ints:
        """Returns the free places, first one first."""
        return np.flatnonzero(self.slots < 0)

    def pin(self, policy: Policy) -> None:
        """Gives each pin's place to the best candidate that matches. A place beyond the answer is ignored."""
        for rule, matches in zip(policy.pin, self.inputs.pinned, strict=True):
            if rule.position <= self.size:
                found = self.order[(matches & ~self.taken)[self.order]][:1]
                self._put(np.array([rule.position - 1])[: len(found)], found, self.by_pin)

    def draw(self, share: float, draw: str) -> float:
        """Gives new candidates the places of chance. Returns the probability that each candidate had."""
        eligible = self.order[(self.inputs.new & ~self.taken)[self.order]]
        free = self.free()
        count = min(places_of(share, self.size), len(eligible), len(free))
        if not count:
            return 1.0
        chosen = eligible[drawn_of(draw, len(eligible), count)]
        self._put(free[spread(len(free), count)], chosen, self.by_chance)
        return count / len(eligible)

    def _put(self, slots: Ints, candidates: Ints, by: Bools) -> None:
        self.slots[slots], self.taken[candidates], by[slots] = candidates, True, True


def places_of(share: float, size: int) -> int:
    """Returns the number of places of chance in an answer of a size."""
    # A share such as 0.1 of 30 places is 3 places, and not 4 by a rounding error.
    return int(np.ceil(round(share * size, 9)))


def spread(free: int, count: int) -> Ints:
    """Returns the numbers (count,) of the free places that chance fills: at equal distances, up to the last place."""
    found: Ints = (np.arange(1, count + 1) * free + count - 1) // count - 1
    return found


def drawn_of(draw: str, among: int, count: int) -> Ints:
    """Returns distinct numbers (count,) below `among`. Each set of numbers has the same probability."""
    with np.errstate(over="ignore"):
        keys = splitmix64(fingerprint([f"new {draw}"])[0] + np.arange(among, dtype=np.uint64) * _STEP)
    return np.argsort(keys, kind="stable")[:count]


def _fill(places: _Places, value: Floats, diversity: Diversity | None) -> None:
    """Fills the free places with the best remaining candidates."""
    free = places.free()
    if diversity is None:
        rest = places.order[~places.taken[places.order]][: len(free)]
        places.slots[free[: len(rest)]] = rest
        places.taken[rest] = True
        return
    cap = _Cap(places, diversity.most)
    distance = _Distance(places, value, diversity.weight or 0.0)
    for placed in places.slots[places.slots >= 0].tolist():
        cap.placed(placed)
        distance.placed(placed)
    for place in free.tolist():
        left = places.order[~(places.taken | places.blocked)[places.order]]
        if not len(left):
            break
        compared = place < MOST_DIVERSE
        chosen = int(left[np.argmax(distance.values[left])]) if compared else int(left[0])
        places.slots[place], places.taken[chosen] = chosen, True
        cap.placed(chosen)
        if compared:
            distance.placed(chosen)


class _Cap:
    """Blocks candidates with a value that enough placed items have."""

    def __init__(self, places: _Places, most: int | None) -> None:
        self._blocked, self._groups, self._most = places.blocked, places.inputs.groups, most
        if self._groups is None or most is None:
            return
        codes, lengths = self._groups.codes, np.diff(self._groups.starts)
        self._counts = np.zeros(int(codes.max(initial=-1)) + 1, dtype=np.int64)
        # Candidates of each value, value after value.
        self._owners = np.repeat(np.arange(len(lengths)), lengths)[np.argsort(codes, kind="stable")]
        self._ends = np.cumsum(np.bincount(codes, minlength=len(self._counts)))

    def placed(self, candidate: int) -> None:
        """Counts the values of a placed item."""
        if self._groups is None or self._most is None:
            return
        codes = self._groups.of(candidate)
        self._counts[codes] += 1
        for code in codes[self._counts[codes] >= self._most].tolist():
            start = int(self._ends[code - 1]) if code else 0
            self._blocked[self._owners[start : self._ends[code]]] = True


class _Distance:
    """Value of each candidate: its relevance, less its similarity with the items that are placed."""

    def __init__(self, places: _Places, value: Floats, weight: float) -> None:
        self._inputs, self._similarities, self._weight = places.inputs, places.similarities, weight
        self._nearest: Floats = np.zeros(len(value))
        self._scaled = scaled(value, places.order) if weight else value
        self.values = (1.0 - weight) * self._scaled

    def placed(self, candidate: int) -> None:
        """Lowers the values of the candidates that are similar to a placed item."""
        if not self._weight:
            return
        self._similarities[candidate] = self._nearest[candidate]
        np.maximum(self._nearest, similarity(self._inputs, candidate), out=self._nearest)
        self.values = (1.0 - self._weight) * self._scaled - self._weight * self._nearest


def scaled(value: Floats, order: Ints) -> Floats:
    """Returns relevances (n,) scaled to 0..1 over the candidates of an order."""
    if not len(order):
        return value
    low, high = value[order].min(), value[order].max()
    found: Floats = (value - low) / (high - low) if high > low else np.zeros(len(value))
    return found


def similarity(inputs: PolicyInputs, candidate: int) -> Floats:
    """Returns the similarity (n,) of each candidate with one, 0 to 1."""
    if inputs.vectors is not None:
        found: Floats = (inputs.vectors @ inputs.vectors[candidate]).astype(np.float64)
        return np.clip(found, 0.0, 1.0, out=found)
    if inputs.semantic_ids is None or inputs.semantic_ids.shape[1] == 0:
        return np.zeros(len(inputs.relevance))
    own = inputs.semantic_ids[candidate]
    common = np.logical_and.accumulate((inputs.semantic_ids == own) & (own >= 0), axis=1)
    shares: Floats = common.sum(axis=1) / inputs.semantic_ids.shape[1]
    return shares
