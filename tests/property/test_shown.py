"""Laws of the join of impressions and outcomes: it equals a loop over dictionaries, in any order of reading."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.shown.join import Join, ShownRow, row_id
from features.shown.message import Impression, Outcome
from features.shown.rule import JoinRule

RULE = JoinRule(("click", "buy"), window_ms=10_000, grace_ms=2_000)
Messages = list[tuple[Impression | Outcome, int]]


def shop(count: int, seed: int) -> Messages:
    """Returns messages with append times: some late, repeated, lost, early, of unknown impressions or items."""
    draw = random.Random(seed)
    found: Messages = []
    for number in range(count):
        shown = 100_000 + 700 * number + draw.randrange(50)
        items = [f"i{draw.randrange(40)}" for _ in range(draw.randrange(6))]
        prices = [draw.choice([None, 1.5, 2.0]) for _ in items]
        impression = Impression(
            f"r{number}",
            f"u{draw.randrange(9)}",
            shown,
            "b",
            "m",
            items=items,
            context={"device": draw.choice(["tv", "phone"])} if draw.random() < 0.7 else {},
            # A server of an earlier release wrote no prices.
            candidates={"price_now": prices} if items and draw.random() < 0.8 else {},
        )
        at = shown + draw.randrange(400)
        found += [(impression, at)] * (1 if draw.random() < 0.9 else 2)
        for item in items:
            if draw.random() < 0.4:
                time = shown + draw.choice([500, 3_000, 9_999, 10_000, 10_001, 30_000, -61_000])
                outcome = Outcome(
                    impression.id if draw.random() < 0.95 else "lost",
                    item if draw.random() < 0.95 else "other",
                    time,
                    draw.choice(["click", "buy", "view"]),
                )
                arrived = max(1, at + draw.choice([-2_001, -2_000, 0, 500, 5_000, 11_999, 12_000, 12_001, 40_000]))
                found += [(outcome, arrived)] * (1 if draw.random() < 0.8 else 3)
    return found


def twin(messages: Messages, rule: JoinRule) -> list[ShownRow]:
    """Joins with plain dictionaries, all messages at hand."""
    shown: dict[str, tuple[Impression, int]] = {}
    outcomes = defaultdict(list)
    for message, at in sorted(messages, key=lambda pair: pair[1]):
        if isinstance(message, Outcome):
            outcomes[message.impression].append((message, at))
        elif message.id not in shown:
            shown[message.id] = (message, at)
    rows = []
    for message, at in sorted(shown.values(), key=lambda pair: (pair[1], pair[0].id)):
        for position, item in enumerate(message.items):
            if item in message.items[:position] or message.failed:
                continue
            labels = tuple(
                int(
                    any(
                        outcome.item == item
                        and outcome.what == kind
                        and message.time_ms - 60_000 <= outcome.time_ms <= message.time_ms + rule.window_ms
                        and at - rule.grace_ms <= came <= at + rule.window_ms + rule.grace_ms
                        for outcome, came in outcomes[message.id]
                    )
                )
                for kind in rule.outcomes
            )
            time = min(message.time_ms, at + 300_000)
            number = row_id(message.id, item)
            fields = dict(message.context)
            for name, values in message.candidates.items():
                fields[name] = values[position]
            shown_row = (number, message.id, message.user, item, time, position, message.surface, labels, at, fields)
            rows.append(ShownRow(*shown_row))
    return rows


def fold(messages: Messages, order: random.Random | None = None) -> Join | list[ShownRow]:
    """Folds messages in order of their append, or each topic in its order and the topics interleaved at random."""
    join = Join(RULE)
    rows: list[ShownRow] = []
    ordered = sorted(messages, key=lambda pair: pair[1])
    queues = [
        [pair for pair in ordered if isinstance(pair[0], Impression)],
        [pair for pair in ordered if isinstance(pair[0], Outcome)],
    ]
    while any(queues):
        heads = [queue[0][1] for queue in queues if queue]
        rows += join.close(min(heads))
        chosen = [queue for queue in queues if queue]
        queue = order.choice(chosen) if order else min(chosen, key=lambda queue: queue[0][1])
        message, at = queue.pop(0)
        if isinstance(message, Outcome):
            join.note(message, at)
        else:
            join.show(message, at)
    rows += join.close(10**12)
    assert len(join) == join.waiting == 0
    return rows


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.integers(0, 10**6))
def test_the_join_equals_the_twin_in_any_order_of_the_topics(seed: int, order: int) -> None:
    messages = shop(60, seed)
    expected = twin(messages, RULE)
    assert fold(messages) == expected
    assert fold(messages, random.Random(order)) == expected


def test_the_laws_meet_every_kind_of_message() -> None:
    join = Join(RULE)
    for message, at in sorted(shop(600, 1), key=lambda pair: pair[1]):
        join.close(at)
        if isinstance(message, Outcome):
            join.note(message, at)
        else:
            join.show(message, at)
    join.close(10**12)
    reasons = {"joined", "late", "repeated outcome", "repeated impression", "other kind", "unknown impression"}
    reasons |= {"item was not shown", "before its impression", "empty impression", "row"}
    assert reasons <= {name for name, count in join.counts.items() if count}


def test_a_rule_without_window_or_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="window_ms: expected at least 1, got 0"):
        JoinRule(("click",), 0)
    with pytest.raises(ValueError, match="outcomes: expected one kind or more"):
        JoinRule((), 1)
