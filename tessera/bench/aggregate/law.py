"""The law of aggregates on many events: the frame, the stream's micro-batches and a slow loop give the same bits."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator, Occasions
from features.aggregate.plan import Group, horizon_us
from features.aggregate.reader import part_keys
from features.aggregate.reference import Answer, Loop
from features.aggregate_frame import with_aggregates
from tessera.bench.aggregate.events import BATCH, PLAN, Generated, generate, in_batches, in_order
from tessera.bench.harness.result import Claim, at_most

Columns = NDArray[np.float32]
_AT_ONCE = 20_000
_US = 1_000_000
_BASE_ODDS = float(np.log(PLAN.base_rate / (1 - PLAN.base_rate)))


def law(events: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yields, by order of arrival, the values that differ from the loop's, and each way's seconds.

    Late events exist in the second order alone, since a frame sorts its rows. There one pass of the frame's code over
    the order of arrival takes the place of the frame.
    """
    arrived = generate(events, seed=seed)
    for order, generated in (("by time", in_order(arrived)), ("with late events", in_batches(arrived))):
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        expected = looped(generated)
        seconds["loop"] = time.perf_counter() - began
        began = time.perf_counter()
        whole = framed(generated) if order == "by time" else passed(generated, len(generated.time))
        seconds["frame"] = time.perf_counter() - began
        began = time.perf_counter()
        cut = passed(generated, BATCH)
        seconds["stream"] = time.perf_counter() - began
        differ = {name: differences(found, expected) for name, found in (("frame", whole), ("stream", cut))}
        yield {
            "part": "law",
            "seed": seed,
            "order": order,
            "events": events,
            "values": expected.size,
            **{f"{name}_differs": count for name, count in differ.items()},
            **{f"{name}_s": taken for name, taken in seconds.items()},
        }


def law_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns a claim for the frame and for the stream: no value differs from the loop's."""
    found = [row for row in rows if row["part"] == "law"]
    return [
        at_most(f"law, values of the {way} that differ from a loop's", sum(row[f"{way}_differs"] for row in found), 0)
        for way in ("frame", "stream")
        if found
    ]


def differences(found: Columns, expected: Columns) -> int:
    """Returns the number of values whose bits differ."""
    return int((found.view(np.uint32) != expected.view(np.uint32)).sum())


def framed(generated: Generated) -> Columns:
    """Returns the columns (E, A) of a frame."""
    examples = with_aggregates(generated.frame(), PLAN, base_rate=PLAN.base_rate)[0].examples
    return np.ascontiguousarray(examples.select(PLAN.columns).to_numpy())


def passed(generated: Generated, batch: int) -> Columns:
    """Returns the columns (E, A) of an aggregator that reads batches, as the step does."""
    frame = generated.frame()
    tables = {"user": (frame.users, generated.user), "item": (frame.items, generated.item)}
    lists = {part: (part_keys(part, tables[part.partition(".")[0]][0]), part.partition(".")[0]) for part in PLAN.parts}
    labels, enters = generated.label.astype(np.float32), generated.enters
    aggregator = Aggregator(PLAN)
    out = []
    for start in range(0, len(enters), batch):
        here = slice(start, start + batch)
        keys = {part: of.take(tables[entity][1][here]) for part, (of, entity) in lists.items()}
        out.append(aggregator.advance(Occasions(generated.time[here], keys, labels[here], enters[here]))[0])
    return np.concatenate(out)


def looped(generated: Generated) -> Columns:
    """Returns the columns (E, A) of a loop over single events."""
    loops = {group.by: Loop(len(group.channels), group.windows_us, group.half_lives_us) for group in PLAN.groups}
    out = np.empty((len(generated.time), len(PLAN.columns)), dtype=np.float32)
    rows = list(
        zip(
            *(getattr(generated, name).tolist() for name in ("user", "item", "time", "label", "enters")),
            strict=True,
        )
    )
    for start in range(0, len(rows), _AT_ONCE):
        chunk = rows[start : start + _AT_ONCE]
        for group in PLAN.groups:
            answers, lengths = _answers(loops[group.by], group, chunk, generated.genres)
            for name, column in _columns(group, answers):
                nothing = 0.0 if name.endswith(".weight") else _BASE_ODDS
                out[start : start + len(chunk), PLAN.columns.index(name)] = _means(column, lengths, nothing)
    return out


def _answers(
    loop: Loop, group: Group, rows: list[tuple[int, int, int, int, bool]], genres: list[list[int]]
) -> tuple[list[Answer], list[int]]:
    """Returns the answers for each key of each event, and the number of keys of each event."""
    answers: list[Answer] = []
    lengths: list[int] = []
    for user, item, moment, label, enters in rows:
        by_group: dict[tuple[str, ...], list[Any]] = {
            ("user",): [user],
            ("item",): [item],
            ("user", "item.genres"): [(user, genre) for genre in genres[item]],
        }
        keys = by_group[group.by]
        values = [1 if channel == "count" else label for channel in group.channels]
        answers += [loop.step(key, moment, values, enters) for key in keys]
        lengths.append(len(keys))
    return answers, lengths


def _columns(group: Group, answers: list[Answer]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    channels = {name: place for place, name in enumerate(group.channels)}
    for aggregation in group.aggregations:
        names = iter(aggregation.columns)
        if aggregation.kind == "recency":
            since = np.array([answer.since for answer in answers])
            yield next(names), np.log1p(np.where(since < 0, np.nan, since / _US))
        for kind, text in aggregation.horizons:
            sums = _sums(group, answers, kind, horizon_us(text))
            positive = sums[:, channels["positive"]]
            if aggregation.kind == "positive":
                yield next(names), np.log1p(positive.astype(np.float64))
                continue
            count, prior = sums[:, channels["count"]], aggregation.prior
            rest = count - positive + prior * (1.0 - PLAN.base_rate)
            yield next(names), np.log((positive + prior * PLAN.base_rate) / rest)
            yield next(names), count / (count + prior)


def _sums(group: Group, answers: list[Answer], kind: str, length: int) -> NDArray[Any]:
    if kind == "half_life":
        place = group.half_lives_us.index(length)
        return np.array([answer.decayed[place] for answer in answers]).reshape(-1, len(group.channels))
    if not length:
        return np.array([answer.every for answer in answers]).reshape(-1, len(group.channels))
    place = group.windows_us.index(length)
    return np.array([answer.windows[place] for answer in answers]).reshape(-1, len(group.channels))


def _means(column: NDArray[np.float64], lengths: list[int], nothing: float) -> list[float]:
    """Returns the mean of each event's values, `nothing` for an event without a key."""
    found, values = [], iter(column.tolist())
    for length in lengths:
        total = 0.0
        for _ in range(length):
            total += next(values)
        found.append(total / length if length else nothing)
    return found
