"""The slow twin of `serving.policy.arrange`: one place after another, one candidate at a time."""

import numpy as np

from features.shown.policy import Policy
from serving.policy.arrange import MOST_DIVERSE, PolicyInputs, drawn_of, places_of, spread


def arranged_slowly(inputs: PolicyInputs, policy: Policy, k: int, *, draw: str) -> list[int]:
    """Returns the candidates of an answer in the order in which they are shown; see `arrange`."""
    value = [float(one) for one in inputs.relevance + inputs.boosts]
    order = sorted((each for each in range(len(value)) if not inputs.consumed[each]), key=lambda each: -value[each])
    size = min(k, len(order))
    shown: dict[int, int] = {}
    for rule, matches in zip(policy.pin, inputs.pinned, strict=True):
        fitting = [each for each in order if matches[each] and each not in shown.values()]
        if fitting and rule.position <= size:
            shown[rule.position - 1] = fitting[0]
    if policy.new is not None:
        eligible = [each for each in order if inputs.new[each] and each not in shown.values()]
        free = [place for place in range(size) if place not in shown]
        count = min(places_of(policy.new.share, size), len(eligible), len(free))
        drawn = drawn_of(draw, len(eligible), count).tolist()
        for number, place in zip(drawn, spread(len(free), count).tolist() if count else [], strict=True):
            shown[free[place]] = eligible[number]
    placed = [shown[place] for place in sorted(shown)]
    for place in range(size):
        if place in shown:
            continue
        left = [each for each in order if each not in placed and not _capped(inputs, policy, placed, each)]
        if not left:
            break
        best = left[0]
        if place < MOST_DIVERSE:
            # Of equal candidates, max returns the first.
            best = max(left, key=lambda each: _marginal(inputs, policy, value, order, placed, each))
        shown[place] = best
        placed.append(best)
    return [shown[place] for place in sorted(shown)]


def _capped(inputs: PolicyInputs, policy: Policy, placed: list[int], candidate: int) -> bool:
    """Returns whether enough placed items share a value with a candidate."""
    if inputs.groups is None or policy.diversity is None or policy.diversity.most is None:
        return False
    groups = inputs.groups
    for code in groups.of(candidate).tolist():
        sharing = [each for each in placed if code in groups.of(each).tolist()]
        if len(sharing) >= policy.diversity.most:
            return True
    return False


def _marginal(
    inputs: PolicyInputs, policy: Policy, value: list[float], order: list[int], placed: list[int], candidate: int
) -> float:
    """Returns (1 - weight) relevance - weight similarity, the relevance scaled to 0..1."""
    weight = policy.diversity.weight if policy.diversity is not None else None
    if weight is None:
        return value[candidate]
    values = [value[each] for each in order]
    low, high = min(values), max(values)
    relevance = (value[candidate] - low) / (high - low) if high > low else 0.0
    similarities = [_similarity(inputs, candidate, other) for other in placed]
    return (1.0 - weight) * relevance - weight * max([0.0, *similarities])


def _similarity(inputs: PolicyInputs, one: int, other: int) -> float:
    if inputs.vectors is not None:
        return float(np.clip(np.dot(inputs.vectors[one], inputs.vectors[other]), 0.0, 1.0))
    if inputs.semantic_ids is None:
        return 0.0
    common = 0
    for own, its in zip(inputs.semantic_ids[one].tolist(), inputs.semantic_ids[other].tolist(), strict=True):
        if own != its or own < 0:
            break
        common += 1
    return float(common / max(inputs.semantic_ids.shape[1], 1))
