"""Work in the background outlasts its errors and tells of them; a breaker keeps callers from a system that failed."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import pytest

from features.errors import StoreError
from serving.background import MOST_MISSES, Background, Rounds
from serving.breaker import Breaker
from serving.metrics import Metrics


def _until(ready: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def _failures(metrics: Metrics) -> float:
    return float(metrics.background_failures.labels("part")._value.get())


def test_work_outlasts_its_errors_and_tells_the_first_of_a_row(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics, error, done = Metrics(), threading.Event(), []

    def work(_: threading.Event) -> None:
        done.append(1)
        if error.is_set():
            raise StoreError("away")

    error.set()
    with contextlib.closing(Background("part", work, Rounds("part", "no work", metrics), every_s=0.001)) as background:
        _until(lambda: background.rounds.broken)
        assert isinstance(background.rounds.error, StoreError)
        error.clear()
        _until(lambda: background.rounds.error is None)
        assert not background.rounds.broken
        rounds = len(done)
        _until(lambda: len(done) > rounds)
    ended = len(done)
    assert _failures(metrics) >= MOST_MISSES
    assert [one.message for one in caplog.records if "no work" in one.message] == ["no work: away"]
    time.sleep(0.01)
    assert len(done) == ended


@pytest.mark.parametrize("at_once", [True, False])
def test_the_first_round_comes_at_once_or_after_the_pause(at_once: bool) -> None:
    begun = threading.Event()
    rounds = Rounds("part", "no work", Metrics())
    background = Background("part", lambda stop: begun.set(), rounds, every_s=60, at_once=at_once)
    assert begun.wait(5 if at_once else 0.1) is at_once
    assert background.close(5)


def test_a_round_that_does_not_end_is_not_waited_for_beyond_the_limit() -> None:
    hold = threading.Event()
    rounds = Rounds("part", "no work", Metrics())
    background = Background("part", lambda stop: hold.wait(20), rounds, every_s=0, at_once=True)
    assert not background.close(0.05)
    hold.set()
    assert background.close(5)


def test_a_breaker_lets_one_caller_try_in_each_interval_until_a_call_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serving.breaker.time.monotonic", lambda: now)
    breaker = Breaker(2.0)
    assert breaker.allows()
    assert breaker.allows()
    breaker.failed()
    assert breaker.open
    assert not breaker.allows()
    now = 102.0
    assert not breaker.open
    assert [breaker.allows(), breaker.allows()] == [True, False]
    now = 104.5
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.succeeded()
    assert not breaker.open
    assert breaker.allows()
    assert breaker.allows()
