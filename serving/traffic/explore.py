"""Explores positions: in a share of the answers, chance decides the order of two neighbours.

The impression names the two positions, whether they were swapped or not. So the clicks at both show how likely users
examine each position (`features.shown.propensity`). A hash of the request's id decides, so no state is kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from features.hashing import fingerprint, splitmix64
from serving.ranking.answer import RankingAnswer

Value = TypeVar("Value")
_SPACE = 1 << 64
# Last position that a pair may have. Users rarely reach later positions, and a pair there would cost clicks elsewhere.
_LAST = 20


def arranged(request: str, answer: RankingAnswer, *, rate: float) -> tuple[RankingAnswer, list[int]]:
    """Returns the answer as it is shown, and the positions that chance arranged, or none.

    Args:
        request: Id of the request.
        answer: The ranking. If it has reasons, it is not explored, since a person reads it. If a policy pinned or drew
            an item, it is not explored either, since the item's place was promised or its propensity is logged.
        rate: Share of the answers to explore, 0 to 1. Half of these are swapped.
    """
    pairs = min(len(answer.items), _LAST + 1) - 1
    fixed = answer.arrangement is not None and answer.arrangement.is_fixed
    if not rate or pairs < 1 or answer.reasons or fixed:
        return answer, []
    drawn = int(splitmix64(fingerprint([f"explore {request}"]))[0])
    if drawn >= rate * _SPACE:
        return answer, []
    # Another hash, since the first is small by condition.
    chosen = int(splitmix64(fingerprint([f"pair {request}"]))[0])
    first = (chosen >> 1) % pairs
    positions = [first, first + 1]
    if not chosen & 1:
        return answer, positions
    context, fields = answer.sent
    swapped = {name: _swapped(values, first) for name, values in fields.items()}
    return replace(answer, items=_swapped(answer.items, first), sent=(context, swapped)), positions


def _swapped(values: Sequence[Value], first: int) -> list[Value]:
    found = list(values)
    found[first : first + 2] = found[first : first + 2][::-1]
    return found
