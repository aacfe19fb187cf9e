"""The join of impressions and outcomes: each counts once, in any order, and what cannot be joined is set aside."""

import itertools
import random

import pytest

from features.error import EventError
from models.impression import Impression, Outcome, Shadowed, decode_impression, decode_outcome, encode
from serving.assignment import CHALLENGER, CONTROL
from tessera.experiment import SKEW_MS, WINDOW_MS, Ledger

DAY = 86_400_000


def shown(number: int, user: str, arm: str, **fields: object) -> Impression:
    made = {"id": f"r{number}", "user": user, "time_ms": number * 1_000, "bundle": "b", "model": "m",
            "arms": {"e@1": arm}, "epochs": {"e@1": 1},
            "items": ["x", "y"], "scores": [0.5, 0.25], "ms": 4.0}  # fmt: skip
    return Impression(**(made | fields))  # type: ignore[arg-type]


MESSAGES = [
    shown(1, "u", CONTROL),
    shown(2, "u", CONTROL),
    shown(3, "v", CHALLENGER, items=["x"], scores=[0.5], ms=8.0),
    shown(4, "v", CHALLENGER, items=[], scores=[]),
    shown(5, "w", CHALLENGER, failed=True, items=[], scores=[]),
    Outcome("r1", "x", 2_000),
    Outcome("r1", "x", 2_500),
    Outcome("r1", "x", 2_500, what="buy"),
    Outcome("r2", "z", 3_000),
    Outcome("r3", "x", 3_000 - SKEW_MS - 1),
    Outcome("r3", "x", 3_000 + WINDOW_MS + 1),
    Outcome("r3", "x", 4_000),
    Outcome("r9", "x", 4_000),
]


def folded(messages: list[object]) -> Ledger:
    ledger = Ledger(familiar=frozenset({"x"}))
    for message in messages:
        ledger.note(message) if isinstance(message, Outcome) else ledger.show(message)  # type: ignore[arg-type]
    return ledger


def users(ledger: Ledger) -> dict[str, dict[str, list[float]]]:
    return {arm: tally.users for arm, tally in ledger.arms("e@1", 1).items()}


def test_what_was_shown_and_what_came_of_it_is_counted_by_arm() -> None:
    ledger = folded(MESSAGES)
    arms = ledger.arms("e@1", 1)
    control, challenger = arms[CONTROL].sums(), arms[CHALLENGER].sums()
    assert (control.rate.users, control.rate.exposure, control.rate.outcomes) == (1, 2, 1)
    assert (challenger.rate.users, challenger.rate.exposure, challenger.rate.outcomes) == (1, 2, 1)
    assert (challenger.users, challenger.failed, challenger.empty) == (2, 1, 1)
    assert (arms[CHALLENGER].requests, arms[CHALLENGER].faults()) == (3, (1, 1))
    assert control.calibration.rate == pytest.approx(1 / 1.5)
    assert (control.novelty.outcomes, control.novelty.exposure) == (2, 4)
    assert arms[CONTROL].of_novel_items().exposure == 2
    assert arms[CONTROL].of_novel_items().outcomes == 0
    assert arms[CONTROL].kinds == {"click": 1, "buy": 1}
    assert challenger.p99_ms == pytest.approx(8.0, abs=0.1)
    assert ledger.aside == {
        "repeated outcome": 1, "item was not shown": 1, "before its impression": 1, "too late": 1,
    }  # fmt: skip
    assert ledger.waiting == 1


def test_the_order_of_the_topics_does_not_matter() -> None:
    expected = folded(MESSAGES)
    for seed in range(20):
        mixed = list(MESSAGES)
        random.Random(seed).shuffle(mixed)
        found = folded(mixed)
        assert users(found) == users(expected)
        assert (found.aside, found.waiting) == (expected.aside, expected.waiting)


def test_an_impression_that_comes_again_counts_once() -> None:
    ledger = folded([*MESSAGES, *MESSAGES[:5]])
    assert ledger.impressions == 5
    assert ledger.aside["repeated impression"] == 5
    assert users(ledger) == users(folded(MESSAGES))


def test_the_outcome_that_counts_is_the_one_that_is_asked_for() -> None:
    ledger = Ledger(outcome="buy")
    for message in MESSAGES:
        ledger.note(message) if isinstance(message, Outcome) else ledger.show(message)  # type: ignore[arg-type]
    arms = ledger.arms("e@1", 1)
    assert (arms[CONTROL].sums().rate.outcomes, arms[CHALLENGER].sums().rate.outcomes) == (1, 0)


def test_another_start_of_the_same_name_and_another_epoch_are_counted_apart() -> None:
    later = [
        shown(11, "u", CONTROL, epochs={"e@1": 2}),
        shown(12, "u", CONTROL, arms={"e@9": CONTROL}, epochs={"e@9": 9}),
        shown(13, "u", "no arm of ours"),
    ]
    ledger = folded([*MESSAGES, *later])
    assert users(ledger) == users(folded(MESSAGES))
    assert list(ledger.epochs("e@1")) == [1, 2]
    assert ledger.arms("e@9", 9)[CONTROL].requests == 1
    assert ledger.epochs("never") == {}


def test_messages_come_back_as_they_went_and_others_are_refused() -> None:
    for message in MESSAGES[:5]:
        assert decode_impression(encode(message)) == message
    shadow = Shadowed("r1", "e", 1, 0.5, 0.1, 3.0)
    assert decode_impression(encode(shadow)) == shadow
    assert decode_outcome(encode(MESSAGES[5])) == MESSAGES[5]
    for decode, data in itertools.product(
        (decode_impression, decode_outcome), (b"{", b"[]", b'{"kind": "x"}', b"\xff")
    ):
        with pytest.raises(EventError):
            decode(data)
