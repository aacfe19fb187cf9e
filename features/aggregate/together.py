"""Advances the states of several groups in one pass.

The time of a small batch is that of its numpy calls and not of its events. So groups whose rows have one layout
share a pass: the rows of their keys are laid out one group after the other, advanced as one state, and written back.
A key's sums depend on its own events alone, so the bits are those of one pass a group.

Shape letters: M events with their keys, C channels, X extremes.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.aggregate.key_map import NOT_THERE, Keys
from features.aggregate.state import GroupState, Ints, KeySums

# Keys of a group up to which a shared pass is faster; beyond it the processor's caches hold one group at a time.
_MOST: Final = 4_096


class GroupEvents(NamedTuple):
    """Events of one group; see `GroupState.advance`."""

    keys: Keys
    times: Ints
    values: Ints
    enters: NDArray[np.bool_]
    numbers: Ints


def advance_groups(states: Sequence[GroupState], events: Sequence[GroupEvents]) -> list[KeySums]:
    """Answers for the events of each group, each as of its own time; the events that enter then count.

    Args:
        states: State of each group.
        events: Events of each group.
    """
    found: list[KeySums | None] = [None] * len(states)
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, (state, own) in enumerate(zip(states, events, strict=True)):
        if len(own.keys) > _MOST:
            found[number] = state.advance(*own)
        else:
            alike.setdefault(state.shape, []).append(number)
    for numbers in alike.values():
        chosen = [states[number] for number in numbers], [events[number] for number in numbers]
        for number, sums in zip(numbers, _advance_alike(*chosen), strict=True):
            found[number] = sums
    return [sums for sums in found if sums is not None]


def read_groups(states: Sequence[GroupState], questions: Sequence[GroupEvents]) -> list[KeySums]:
    """Answers for events of which none enters, as `advance_groups` does."""
    found: list[KeySums | None] = [None] * len(states)
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, state in enumerate(states):
        alike.setdefault(state.shape, []).append(number)
    for numbers in alike.values():
        rows = [states[number].find(questions[number].keys) for number in numbers]
        times = np.concatenate([questions[number].times for number in numbers])
        known, there = (np.concatenate(part) for part in zip(*rows, strict=True))
        sums = states[numbers[0]].answer(known, there, times)
        for number, own in zip(numbers, _divided(sums, [len(part) for part, _ in rows]), strict=True):
            found[number] = own
    return [sums for sums in found if sums is not None]


def _advance_alike(states: Sequence[GroupState], events: Sequence[GroupEvents]) -> list[KeySums]:
    if len(states) == 1:
        return [states[0].advance(*events[0])]
    held, slots, start = [], [], 0
    for state, own in zip(states, events, strict=True):
        slot = state.slots(own.keys, own.enters)
        distinct = np.unique(slot[slot != NOT_THERE])
        slots.append(np.where(slot == NOT_THERE, NOT_THERE, start + np.searchsorted(distinct, slot)))
        held.append(distinct)
        start += len(distinct)
    joint = states[0].excerpt(held[0])
    joint.extend([state.excerpt(distinct) for state, distinct in zip(states[1:], held[1:], strict=True)])
    columns = (np.concatenate([own[place] for own in events]) for place in range(1, len(GroupEvents._fields)))
    sums = joint.advance_slots(np.concatenate(slots), *columns)
    start = 0
    for state, distinct in zip(states, held, strict=True):
        state.write_back(distinct, joint.laid_out[start : start + len(distinct)])
        start += len(distinct)
    return _divided(sums, [len(own.keys) for own in events])


def _divided(sums: KeySums, lengths: Sequence[int]) -> list[KeySums]:
    found, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        found.append(
            KeySums(
                sums.every[own],
                tuple(window[own] for window in sums.windows),
                tuple(decayed[own] for decayed in sums.decayed),
                sums.since[own],
                sums.extremes[own],
            )
        )
        start += length
    return found
