"""The load of the serving benchmarks: timed from when a request was due, failures at their time-out, none left out."""

import time
from typing import Any

import numpy as np

from tessera.bench.harness.load import Load

RATE, STALL_S, CYCLE_S = 100.0, 0.25, 0.5


class Stalling:
    """A server that answers at once, but for the first quarter of a second of every half."""

    def __init__(self, start: float) -> None:
        self._start = start

    def body(self) -> bytes:
        return b""

    def rank(self, body: bytes) -> tuple[int, dict[str, Any]]:
        into = (time.monotonic() - self._start) % CYCLE_S
        time.sleep(max(0.0, STALL_S - into))
        return 200, {}

    def close(self) -> None:
        pass


class Failing(Stalling):
    """A server that refuses, hangs up, or answers, in turn."""

    def __init__(self, number: int) -> None:
        self._count = number

    def rank(self, body: bytes) -> tuple[int, dict[str, Any]]:
        self._count += 1
        if self._count % 3 == 0:
            raise ConnectionResetError("hung up")
        return (503, {"detail": "full"}) if self._count % 3 == 1 else (200, {})


def test_a_stall_is_felt_by_every_request_that_was_due_in_it() -> None:
    def loaded(callers: int) -> Load:
        start = time.monotonic()
        load = Load(lambda number: Stalling(start), per_second=RATE, callers=callers)
        load.run(2 * CYCLE_S)
        return load

    for callers in (1, 40):
        load = loaded(callers)
        assert len(load.ms) == RATE * 2 * CYCLE_S
        # Half of the time is stall: of the requests due in it, the mean waits half of it.
        waited = np.array(load.ms) > 1_000 * STALL_S / 5
        assert waited.mean() > 0.25, callers
        assert np.percentile(load.ms, 99) > 1_000 * STALL_S * 0.8
    # A closed loop meets each stall once a caller, and so hides it from its percentiles.
    start = time.monotonic()
    closed = Load(lambda number: Stalling(start), per_second=None, callers=1)
    closed.run(2 * CYCLE_S)
    assert np.mean(np.array(closed.ms) > 1_000 * STALL_S / 5) < 0.02


def test_a_failed_request_counts_as_its_time_out_and_says_why() -> None:
    load = Load(Failing, per_second=200.0, callers=1, timeout_s=3.0)
    load.run(0.3)
    row = load.row("load")
    assert (row["requests"], row["failed"]) == (60, 40)
    assert sorted(set(load.failed)) == ["503: full", "ConnectionResetError('hung up')"]
    assert sum(ms >= 3_000 for ms in load.ms) == 40
    assert row["timed_from"] == "due"


def test_requests_that_nobody_was_free_to_send_are_failures_and_not_left_out() -> None:
    class Hanging(Failing):
        def rank(self, body: bytes) -> tuple[int, dict[str, Any]]:
            time.sleep(0.2)
            return 200, {}

    load = Load(Hanging, per_second=100.0, callers=1, timeout_s=0.2)
    load.run(0.2)
    assert len(load.ms) == 20
    assert any(why.startswith("not sent") for why in load.failed)


def test_a_load_without_an_end_stops_when_told_and_may_run_again() -> None:
    load = Load(Failing, per_second=None, callers=2)
    load.run(0.05)
    once = len(load.ms)
    load.run(0.05)
    assert len(load.ms) > once > 0
    assert load.rate > 0
    load.stop.set()
    began = time.monotonic()
    load.run(None)
    assert time.monotonic() - began < 5
