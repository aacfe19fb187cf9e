"""The join of impressions and outcomes: each counts once, in any order, and what cannot be joined is quarantined."""

import itertools
import os
import random
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from features.errors import EventError
from features.shown.message import Impression, Outcome, Shadowed, decode_impression, decode_outcome, encode
from features.shown.rule import SKEW_MS
from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.guardrails import Guardrails
from serving.rollout.ledger import WINDOW_MS, Ledger

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


def fold(ledger: Ledger, messages: Iterable[object]) -> Ledger:
    for message in messages:
        ledger.note(message) if isinstance(message, Outcome) else ledger.show(message)  # type: ignore[arg-type]
    return ledger


def folded(messages: Iterable[object]) -> Ledger:
    return fold(Ledger(familiar=frozenset({"x"})), messages)


def users(ledger: Ledger, experiment: str = "e@1", epoch: int = 1) -> dict[str, dict[str, list[float]]]:
    by_arm = {arm: tally.by_user() for arm, tally in ledger.arms(experiment, epoch).items()}
    return {arm: dict(zip(names, sums.tolist(), strict=True)) for arm, (names, sums) in by_arm.items()}


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
    ledger = fold(Ledger(outcome="buy"), MESSAGES)
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


def test_a_ledger_that_is_opened_again_goes_on_and_a_copy_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "judge" / "ledger.sqlite"
    for part in (MESSAGES[:6], MESSAGES[6:]):
        ledger = fold(Ledger(path, familiar=frozenset({"x"})), part)
        ledger.keep({("impressions", 0): len(part)})
        # What is not kept was not folded.
        fold(ledger, [shown(99, "z", CONTROL)])
        ledger.close()
    copy = Ledger(path, copy=True, familiar=frozenset({"x"}))
    assert users(copy) == users(folded(MESSAGES))
    assert (copy.aside, copy.waiting) == (folded(MESSAGES).aside, 1)
    assert copy.positions == {("impressions", 0): len(MESSAGES) - 6}
    fold(copy, [shown(98, "z", CONTROL)]).keep({("impressions", 0): 100})
    copy.close()
    again = Ledger(path, familiar=frozenset({"x"}))
    assert users(again) == users(folded(MESSAGES))
    again.close()
    # Other outcomes count: nothing of the file is of use.
    assert Ledger(path, outcome="buy").positions == {}
    # A file that is no ledger is begun again as well.
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE meta(name TEXT, value TEXT)")
    assert users(Ledger(tmp_path / "other")) == {CONTROL: {}, CHALLENGER: {}}


def test_what_no_outcome_can_join_any_more_is_forgotten_and_a_wrong_clock_forgets_nothing() -> None:
    ledger = folded([*MESSAGES, shown(20, "u", CONTROL, time_ms=10**15)])
    ledger.forget(10_000, ["e@1"])
    assert (ledger.impressions, ledger.waiting) == (6, 1)
    before = users(ledger)
    ledger.forget(WINDOW_MS + 2 * DAY, ["e@1"])
    assert ledger.impressions == 1
    assert users(ledger) == before
    # The sums of an experiment that has ended go, and what still comes of it counts for nobody.
    ledger.forget(WINDOW_MS + 2 * DAY, [])
    fold(ledger, [Outcome("r20", "x", 10**15)])
    assert users(ledger) == {CONTROL: {}, CHALLENGER: {}} or sum(map(len, users(ledger).values())) <= 1


def test_outcomes_of_impressions_that_do_not_exist_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.ledger._MOST_EARLY", 50)
    ledger = folded(Outcome(f"made up {number}", "x", 1) for number in range(200))
    ledger.forget(1, [])
    assert (ledger.waiting, ledger.aside["unknown impression"]) == (50, 150)
    ledger.forget(10**15, [])
    assert (ledger.waiting, ledger.aside["unknown impression"]) == (0, 200)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_rows_stay_what_they_are_however_much_comes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", familiar=frozenset({"x"}))
    sizes: list[tuple[int, int]] = []
    # An impression each five minutes, for seven weeks; users come again.
    for number in range(14_000):
        now = 300_000 * number
        message = shown(number, f"u{number % 500}", CONTROL, time_ms=now, items=[f"i{n}" for n in range(10)])
        fold(ledger, [message, Outcome(f"r{number}", "i1", now), Outcome(f"lost {number}", "x", 1)])
        if number % 1_000 == 999:
            ledger.close_slices(now)
            ledger.forget(now, ["e@1"])
            ledger.forget(time.time_ns() // 1_000_000 + 2 * DAY if number % 5_000 == 4_999 else 0, ["e@1"])
            ledger.keep({})
            sizes.append((resident(), ledger.impressions))
    kept = (WINDOW_MS + DAY) / 300_000
    assert max(count for _, count in sizes) <= kept + 1_000
    assert sizes[-1][0] <= 1.05 * sizes[3][0]


def minutes(seed: int, share: float, *, per_minute: int, slow: range, slower: float = 1.0) -> Iterator[Impression]:
    """Minutes of requests by anybody, which take 300 ms longer for everybody in some of them."""
    rng, number = np.random.default_rng(seed), 0
    for minute in range(90):
        for user in rng.integers(0, 20_000, per_minute).tolist():
            number += 1
            arm = CHALLENGER if user < 20_000 * share else CONTROL
            ms = float(rng.lognormal(1.5, 0.4)) * (slower if arm == CHALLENGER else 1.0) + 300 * (minute in slow)
            yield shown(number, f"u{user}", arm, time_ms=minute * 60_000, ms=ms, items=["x"], scores=[0.1])


def p99_alarm(messages: Iterable[Impression], share: float, *, every: int) -> bool:
    ledger, rule, minute = Ledger(), Guardrails(), 0
    for message in messages:
        if message.time_ms // 60_000 > minute:
            minute = message.time_ms // 60_000
            if minute % every == 0:
                ledger.close_slices(minute * 60_000)
                sums = [tally.sums() for tally in ledger.arms("e@1", 1).values()]
                look = rule.look(*sums, shares=(1 - share, share), slower=ledger.slower("e@1", 1))
                if any(breach.startswith("p99: ") for breach in look.breaches):
                    return True
        ledger.show(message)
    return False


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_stretch_that_is_slow_for_everybody_is_no_fault_of_the_challengers(share: float) -> None:
    slow = range(30, 32)
    assert not p99_alarm(minutes(1, share, per_minute=200, slow=slow), share, every=10)
    assert p99_alarm(minutes(1, share, per_minute=200, slow=slow, slower=3.0), share, every=10)


def test_one_user_who_always_waits_long_is_no_slow_arm() -> None:
    one = (shown(10**6 + n, "batch", CHALLENGER, time_ms=n * 60_000, ms=5_000.0) for n in range(90))
    others = minutes(2, 0.05, per_minute=200, slow=range(0))
    assert not p99_alarm(sorted([*one, *others], key=lambda message: message.time_ms), 0.05, every=30)


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
