"""The recorder of impressions: a batch waits while the log is unavailable, and a hopeless batch is lost."""

import contextlib
import time
from collections.abc import Callable, Sequence

import pytest

from features.errors import LogError
from features.shown.message import Impression
from serving.metrics import Metrics
from serving.traffic import recorder
from serving.traffic.recorder import Recorder


class FailingSink:
    """Raises the next of some errors at each call, and then accepts."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.appended: list[bytes] = []

    def append(self, kind: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
        assert kind == "impressions"
        if self.errors:
            raise self.errors.pop(0)
        self.appended += [key for key, _ in messages]


def _impression(name: str) -> Impression:
    return Impression(id=name, user="u", time_ms=0, bundle="b", model="m")


def _counts(metrics: Metrics) -> tuple[float, float]:
    appended, dropped = (metrics.impressions.labels(what)._value.get() for what in ("appended", "dropped"))
    return appended, dropped


def _until(ready: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_a_batch_waits_for_the_log_and_a_hopeless_one_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_PAUSE_S", 0.001)
    sink, metrics = FailingSink(LogError("away"), LogError("away"), TypeError("hopeless")), Metrics()
    with contextlib.closing(Recorder(sink, metrics)) as running:
        running.put(_impression("first"))
        _until(lambda: _counts(metrics) == (0, 1))
        running.put(_impression("second"))
        _until(lambda: _counts(metrics) == (1, 1))
    assert sink.appended == [b"second"]
    assert metrics.background_failures.labels("impressions")._value.get() == 3


def test_at_the_end_the_queue_is_appended_or_counted_as_dropped() -> None:
    for errors, expected in ((), (3, 0)), ((LogError("away"),) * 9, (0, 3)):
        sink, metrics = FailingSink(*errors), Metrics()
        running = Recorder(sink, metrics)
        for name in ("a", "b", "c"):
            running.put(_impression(name))
        running.close()
        assert _counts(metrics) == expected
