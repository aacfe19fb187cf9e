"""Rates of callers: one process's buckets and those that forked processes share hold the same law."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import pytest

from serving.api import rate
from serving.api.rate import Buckets, Rates, SharedBuckets

Make = Callable[[float, float], Rates]


@pytest.fixture
def shared() -> Iterator[Callable[..., SharedBuckets]]:
    """Makes shared buckets that the test's end closes."""
    with contextlib.ExitStack() as stack:
        yield lambda *values, **slots: stack.enter_context(contextlib.closing(SharedBuckets(*values, **slots)))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_a_bucket_holds_its_burst_and_fills_at_its_rate(
    kind: str, shared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(rate.time, "monotonic", lambda: now[0])
    make: Make = shared if kind == "shared" else Buckets
    buckets = make(5.0, 2.0)
    assert [buckets.take("ann") for _ in range(10)] == [0.0] * 10
    assert buckets.take("ann") == pytest.approx(0.2)
    # Another caller has a bucket of its own.
    assert buckets.take("bob") == 0.0
    now[0] += 0.4
    assert [buckets.take("ann") for _ in range(2)] == [0.0, 0.0]
    assert buckets.take("ann") == pytest.approx(0.2)
    assert make(0.0, 2.0).take("ann") == 0.0


def test_forked_processes_take_from_one_bucket(shared: Make) -> None:
    buckets = shared(0.001, 50_000.0)
    reading, writing = os.pipe()
    children = []
    for _ in range(3):
        if not (pid := os.fork()):
            taken = sum(buckets.take("ann") == 0.0 for _ in range(30))
            os.write(writing, bytes([taken]))
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    # 50 tokens for 90 takes: none is given twice, none is lost.
    assert sum(os.read(reading, 3)) == 50
    assert buckets.take("ann") > 0
    assert buckets.take("bob") == 0.0
    os.close(reading)
    os.close(writing)


def test_a_process_that_dies_does_not_hold_the_others(shared: Callable[..., SharedBuckets]) -> None:
    buckets = shared(10.0, 1.0)
    if not (pid := os.fork()):
        rate.fcntl.lockf(buckets._guard, rate.fcntl.LOCK_EX)
        os._exit(1)
    os.waitpid(pid, 0)
    begin = time.monotonic()
    assert buckets.take("ann") == 0.0
    assert time.monotonic() - begin < 5


def test_a_new_caller_takes_the_slot_that_was_longest_unused(
    shared: Callable[..., SharedBuckets], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1.0]
    monkeypatch.setattr(rate.time, "monotonic", lambda: now[0])
    buckets = shared(1.0, 1.0, slots=2)
    for caller in ("ann", "bob", "eve"):
        now[0] += 0.01
        assert buckets.take(caller) == 0.0
    # Bob and Eve have no token left, Ann's slot is gone.
    assert buckets.take("eve") > 0
    assert buckets.take("bob") > 0
    assert buckets.take("ann") == 0.0
