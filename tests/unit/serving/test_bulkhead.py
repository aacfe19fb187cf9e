"""A challenger that hangs takes its own threads and nobody else's."""

import contextlib
import threading
import time
from contextvars import ContextVar

import pytest

from features.errors import AnswerError
from serving.traffic.bulkhead import Bulkhead

WORD: ContextVar[str] = ContextVar("word", default="")


def test_a_call_returns_what_it_returns_raises_what_it_raises_and_sees_its_callers_context() -> None:
    with contextlib.closing(Bulkhead("b", answer_s=10)) as held:
        WORD.set("said")
        assert held.run(WORD.get) == "said"
        with pytest.raises(KeyError, match="x"):
            held.run(lambda: {}["x"])


def test_calls_that_hang_are_given_up_the_rest_is_shed_and_all_goes_on_when_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.traffic.bulkhead._TURN_S", 0.01)
    over = threading.Event()
    with contextlib.closing(Bulkhead("b", answer_s=0.05, threads=2)) as held:
        for _ in range(2):
            with pytest.raises(AnswerError, match=r"b: no ranking within 0.05 s"):
                held.run(lambda: over.wait(60))
        with pytest.raises(AnswerError, match="b: 2 rankings are running and no thread is free"):
            held.run(lambda: 1)
        over.set()
        give_up = time.monotonic() + 10
        while True:
            with contextlib.suppress(AnswerError):
                assert held.run(lambda: 1) == 1
                break
            assert time.monotonic() < give_up


def test_the_end_waits_for_free_threads_and_not_for_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.traffic.bulkhead._END_S", 2.0)
    own, gone = threading.local(), []

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.2)
            gone.append(self)

    free = Bulkhead("free", answer_s=10)
    free.run(lambda: setattr(own, "held", Slow()))
    free.close()
    assert len(gone) == 1
    over = threading.Event()
    hangs = Bulkhead("hangs", answer_s=0.05)
    with pytest.raises(AnswerError):
        hangs.run(lambda: over.wait(60))
    began = time.monotonic()
    hangs.close()
    assert time.monotonic() - began < 30
    over.set()
