"""Aggregates of examples: the columns of a plan, as of each example's time.

Shape letters: B examples, M examples by key, A columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregate.extremes import MISSING
from features.aggregate.key_map import Keys
from features.aggregate.order import NEVER
from features.aggregate.pairs import CountedPairs
from features.aggregate.plan import COUNT, POSITIVE, AggregatePlan, Aggregation, Group, horizon_us
from features.aggregate.state import Floats, GroupState, Ints, KeySums
from features.aggregate.together import GroupEvents, advance_groups, read_groups
from features.hashing import splitmix64
from features.history import Jagged

PLACES: Final = 1_000_000
"""A number that is summed has six decimal places."""
MOST: Final = 1e9
"""Bound of a number that is summed: a larger one counts as this one."""
_SECOND_US: Final = 1_000_000
_NO_VALUES: Final = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Occasions:
    """Examples as aggregates see them, in order of arrival.

    Attributes:
        times: (B,) microseconds.
        keys: By part of the plan, each example's values as `features.hashing.value_keys`: a list per example, uint64
            viewed as int64.
        labels: (B,) 0 or 1; may be empty where none enters.
        values: By numeric column of the events, (B,) float64, NaN for a missing value.
        values_keys: By column that is counted distinct, (B,) uint64 key of the value, 0 for a missing one.
        enters: (B,) True for an example that counts; a drawn negative, and a request, does not.
    """

    times: Ints
    keys: Mapping[str, Jagged]
    labels: NDArray[np.float32]
    enters: NDArray[np.bool_]
    values: Mapping[str, Floats] = field(default_factory=dict)
    values_keys: Mapping[str, Keys] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.times)


class Aggregator:
    """State of all groups of a plan.

    Args:
        plan: Aggregates to compute.

    Attributes:
        watermark: Time of the newest event that counts, `NEVER` without one.
    """

    def __init__(self, plan: AggregatePlan) -> None:
        self.plan = plan
        self.watermark = NEVER
        self.states = {
            group.by: GroupState(
                len(group.channels), group.windows_us, group.half_lives_us, tuple(kind for kind, _ in group.extremes)
            )
            for group in plan.groups
        }
        # Pairs of a key and a value that were counted, by group and column.
        self.pairs = {(group.by, column): CountedPairs() for group in plan.groups for column in group.distinct}

    def advance(self, occasions: Occasions) -> tuple[NDArray[np.float32], dict[tuple[str, ...], Keys]]:
        """Answers for examples, each as of its time; the examples that enter then count.

        Returns:
            (B, A) float32 columns of the plan: log-odds of rates and the weight of their events beside the prior, log1p
            of counts and seconds, `sign(x) * log1p(|x|)` of sums and means, NaN where there is none; and the distinct
            keys of each group that changed.
        """
        out = np.empty((len(occasions), len(self.plan.columns)), dtype=np.float32)
        self.watermark = int(occasions.times[occasions.enters].max(initial=self.watermark))
        changed: dict[tuple[str, ...], Keys] = {}
        places = {name: place for place, name in enumerate(self.plan.columns)}
        events, examples = [], []
        for group in self.plan.groups:
            own, example = self._events(group, occasions)
            events.append(own)
            examples.append(example)
            changed[group.by] = np.unique(own.keys[own.enters])
        through = advance_groups if occasions.enters.any() else read_groups
        found = through([self.states[group.by] for group in self.plan.groups], events)
        for group, sums, example in zip(self.plan.groups, found, examples, strict=True):
            counts = np.bincount(example, minlength=len(occasions))
            for aggregation in group.aggregations:
                for name, column in _columns(aggregation, group, sums, self.plan.base_rate):
                    nothing = _nothing(aggregation, name, self.plan.base_rate)
                    out[:, places[name]] = _mean(column, example, counts, nothing)
        return out, changed

    def _events(self, group: Group, occasions: Occasions) -> tuple[GroupEvents, Ints]:
        """Returns the events of a group's keys, and the example (M,) of each."""
        keys, example = group_keys(group, occasions.keys)
        enters = occasions.enters[example]
        values = _values(group, occasions)[example]
        for counted in group.distinct:
            met: Keys = occasions.values_keys[counted][example] if occasions.values_keys else np.zeros_like(keys)
            at = np.flatnonzero(enters & (met != 0))
            first = at[self.pairs[group.by, counted].meet(keys[at], met[at])]
            values[first, group.channels.index(f"distinct {counted}")] = 1
        numbers = _numbers(group, occasions)[example]
        return GroupEvents(keys, occasions.times[example], values, enters, numbers), example

    def shrink(self) -> dict[tuple[str, ...], Keys]:
        """Forgets an eighth of the keys of each group that has more than `most_keys`; returns the keys."""
        most = self.plan.most_keys
        removed = {by: state.forget(most - most // 8) for by, state in self.states.items() if len(state) > most}
        for (by, _), pairs in self.pairs.items():
            if by in removed:
                pairs.remove(removed[by], _NO_VALUES)
        return removed

    def forget(
        self, entity: str, lists: Mapping[str, Keys], values: Sequence[Keys]
    ) -> list[dict[tuple[str, ...], Keys]]:
        """Removes the keys of some values of an entity from all groups by the entity.

        The pairs of the removed keys are removed too. All values are removed at once, since a removal rebuilds a map.

        Args:
            entity: `user` or `item`.
            lists: By part of the plan, the keys of the values that may have been combined. Pairs without an owner are
                searched for the values of a counted column that has a list.
            values: Keys of each value of the entity, which stand for its list.

        Returns:
            The removed keys of each value, by group.
        """
        removed: list[dict[tuple[str, ...], Keys]] = [{} for _ in values]
        for group in self.plan.groups:
            if entity not in group.by:
                continue
            state, taken = self.states[group.by], _NO_VALUES
            for found, own in zip(removed, values, strict=True):
                one = {part: _one_list(own if part == entity else lists[part]) for part in group.by}
                held, _ = state.held(np.unique(group_keys(group, one)[0]))
                found[group.by] = np.setdiff1d(held, taken)
                taken = np.concatenate([taken, found[group.by]])
            state.remove(taken)
            for column in group.distinct:
                own = np.concatenate([_NO_VALUES, *values]) if column == entity else lists.get(column, _NO_VALUES)
                self.pairs[group.by, column].remove(taken, own)
        return removed

    def full(self) -> tuple[str, ...] | None:
        """Returns the parts of a group that has more than `most_keys`, None if there is none."""
        return next((by for by, state in self.states.items() if len(state) > self.plan.most_keys), None)


def _one_list(keys: Keys) -> Jagged:
    return Jagged(keys.view(np.int64), np.array([0, len(keys)], dtype=np.int64))


def group_keys(group: Group, keys_by_part: Mapping[str, Jagged]) -> tuple[Keys, Ints]:
    """Returns every combination of the keys of a group's parts: keys (M,), and the examples (M,) that have them."""
    parts = [keys_by_part[part] for part in group.by]
    first = parts[0]
    keys = first.values.view(np.uint64)
    example = np.repeat(np.arange(len(first.offsets) - 1), first.offsets[1:] - first.offsets[:-1])
    for part in parts[1:]:
        lengths = (part.offsets[1:] - part.offsets[:-1])[example]
        starts = part.offsets[example]
        ends = np.cumsum(lengths)
        place = np.repeat(starts - ends + lengths, lengths) + np.arange(int(ends[-1]) if len(ends) else 0)
        keys = splitmix64(np.repeat(keys, lengths) ^ part.values.view(np.uint64)[place])
        example = np.repeat(example, lengths)
    return keys, example


def _values(group: Group, occasions: Occasions) -> Ints:
    """Returns the numbers (B, C) that examples add to the channels of a group."""
    out = np.zeros((len(occasions), len(group.channels)), dtype=np.int64)
    for place, channel in enumerate(group.channels):
        kind, _, column = channel.partition(" ")
        if kind == COUNT:
            out[:, place] = 1
        elif kind == POSITIVE:
            out[:, place] = occasions.labels > 0 if len(occasions.labels) else 0
        elif kind != "distinct" and len(occasions.values):
            numbers = occasions.values[column]
            fixed = _fixed(numbers)
            present = fixed != MISSING
            out[:, place] = present if kind == "present" else np.where(present, fixed, 0)
    return out


def _numbers(group: Group, occasions: Occasions) -> Ints:
    """Returns the numbers (B, X) of examples for the extremes of a group."""
    out = np.full((len(occasions), len(group.extremes)), MISSING, dtype=np.int64)
    for place, (_, column) in enumerate(group.extremes):
        if len(occasions.values):
            out[:, place] = _fixed(occasions.values[column])
    return out


def _fixed(numbers: Floats) -> Ints:
    """Returns numbers (B,) with six decimal places as whole numbers, `MISSING` where there is none."""
    present = np.isfinite(numbers)
    fixed = np.rint(np.clip(np.where(present, numbers, 0.0), -MOST, MOST) * PLACES).astype(np.int64)
    found: Ints = np.where(present, fixed, MISSING)
    return found


def _columns(aggregation: Aggregation, group: Group, sums: KeySums, base_rate: float) -> list[tuple[str, Floats]]:
    """Returns the columns (M,) of one aggregate by name."""
    if aggregation.kind == "recency":
        seconds = np.where(sums.since < 0, np.nan, sums.since / _SECOND_US)
        return [(aggregation.columns[0], np.log1p(seconds))]
    if aggregation.kind in ("min", "max", "last"):
        found = sums.extremes[:, group.extremes.index((aggregation.kind, aggregation.column))]
        return [(aggregation.columns[0], _log_scaled(np.where(found == MISSING, np.nan, found / PLACES)))]
    columns: list[Floats] = []
    place = {channel: number for number, channel in enumerate(group.channels)}
    for kind, text in aggregation.horizons:
        of = [_horizon(group, sums, kind, text)[:, place[channel]] for channel in aggregation.channels]
        if aggregation.kind == "rate":
            count, positive = of
            rest = aggregation.prior * (1.0 - base_rate)
            # Positives and negatives, each with its share of the prior: their ratio is that of the smoothed rate.
            columns.append(np.log((positive + aggregation.prior * base_rate) / (count - positive + rest)))
            # Bounded, unlike the count, which grows beyond all that training has seen.
            columns.append(count / (count + aggregation.prior))
        elif aggregation.kind == "mean":
            total, present = of
            with np.errstate(invalid="ignore", divide="ignore"):
                columns.append(_log_scaled(total / PLACES / present))
        else:
            columns.append(_log_scaled(of[0] / PLACES if aggregation.kind == "sum" else of[0].astype(np.float64)))
    return list(zip(aggregation.columns, columns, strict=True))


def _horizon(group: Group, sums: KeySums, kind: str, text: str) -> NDArray[np.int64] | Floats:
    if kind == "half_life":
        return sums.decayed[group.half_lives_us.index(horizon_us(text))]
    length = horizon_us(text)
    return sums.windows[group.windows_us.index(length)] if length else sums.every


def _nothing(aggregation: Aggregation, name: str, base_rate: float) -> float:
    """Returns the value of a column for an example without a key, such as an item without a genre."""
    if aggregation.kind == "rate" and not name.endswith(".weight"):
        return float(np.log(base_rate / (1 - base_rate)))
    return 0.0 if aggregation.kind in ("count", "positive", "rate", "sum", "distinct") else np.nan


def _mean(column: Floats, example: Ints, counts: Ints, nothing: float) -> Floats:
    """Returns the mean (B,) of each example's values (M,)."""
    if (counts == 1).all():
        return column
    total = np.bincount(example, weights=column, minlength=len(counts))
    found: Floats = np.where(counts > 0, total / np.maximum(counts, 1), nothing)
    return found


def _log_scaled(values: Floats) -> Floats:
    found: Floats = np.sign(values) * np.log1p(np.abs(values))
    return found


@dataclass(frozen=True)
class Reading:
    """One aggregate of one entity as a person reads it.

    Attributes:
        name: Name of the aggregate.
        by: Entities or columns of entities.
        horizon: `all`, a window such as `7d`, or `half 7d`; "" for a recency.
        kind: `rate`, `count` and so on.
        value: Share of positives of a rate, seconds of a recency, else the number itself; None where there is none.
        count: Events behind a rate, decayed or not; None for other kinds.
    """

    name: str
    by: tuple[str, ...]
    horizon: str
    kind: str
    value: float | None
    count: float | None = None


def readings(plan: AggregatePlan, columns: NDArray[np.float32]) -> list[Reading]:
    """Returns a plan's columns (A,) of one example as numbers without logarithms."""
    by_name = dict(zip(plan.columns, columns.astype(np.float64).tolist(), strict=True))
    found: list[Reading] = []
    for one in plan.aggregations:
        if one.kind == "recency":
            found.append(Reading(one.name, one.by, "", one.kind, _unscaled(by_name[one.columns[0]])))
            continue
        names = one.columns[::2] if one.kind == "rate" else one.columns
        for (kind, text), name in zip(one.horizons, names, strict=True):
            horizon = text if kind == "window" else f"half {text}"
            if one.kind == "rate":
                share, weight = 1 / (1 + np.exp(-by_name[name])), by_name[f"{name}.weight"]
                count = one.prior * weight / (1 - weight)
                found.append(Reading(one.name, one.by, horizon, one.kind, float(share), float(count)))
            else:
                found.append(Reading(one.name, one.by, horizon, one.kind, _unscaled(by_name[name])))
    return found


def _unscaled(value: float) -> float | None:
    return None if np.isnan(value) else float(np.sign(value) * np.expm1(abs(value)))
