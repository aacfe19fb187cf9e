"""Readers share a lock, a writer has it alone, and none waits for ever."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.ranking.read_write_lock import ReadWriteLock

SOON_S, LONG_S = 0.05, 20.0


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_readers_meet_inside() -> None:
    lock, inside = ReadWriteLock(), threading.Barrier(3)

    def read() -> None:
        with lock.reading():
            inside.wait(LONG_S)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: read(), range(3)))
    assert not inside.broken


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_a_writer_is_alone(kind: str) -> None:
    lock, entered = ReadWriteLock(), threading.Event()

    def enter() -> None:
        with getattr(lock, kind)():
            entered.set()

    with lock.writing():
        other = started(enter)
        assert not entered.wait(SOON_S)
    other.join(LONG_S)
    assert entered.is_set()


def test_a_writer_waits_for_readers_that_are_inside_and_not_for_later_ones() -> None:
    lock, order = ReadWriteLock(), []

    def write() -> None:
        with lock.writing():
            order.append("writer")

    def read() -> None:
        with lock.reading():
            order.append("reader")

    with lock.reading():
        writer = started(write)
        while not lock._waiting and not order:
            time.sleep(0.001)
        reader = started(read)
        time.sleep(SOON_S)
        assert order == []
    writer.join(LONG_S)
    reader.join(LONG_S)
    assert order == ["writer", "reader"]


def test_an_error_inside_releases_the_lock() -> None:
    lock = ReadWriteLock()
    for kind in (lock.reading, lock.writing):
        with pytest.raises(ZeroDivisionError), kind():
            raise ZeroDivisionError
    with lock.writing():
        pass


def test_what_writers_change_readers_see_whole() -> None:
    lock, pair, torn = ReadWriteLock(), [0, 0], []

    def write() -> None:
        for _ in range(300):
            with lock.writing():
                pair[0] += 1
                time.sleep(0)
                pair[1] += 1

    def read() -> None:
        for _ in range(300):
            with lock.reading():
                first = pair[0]
                time.sleep(0)
                torn.append(first != pair[1])

    threads = [started(work) for work in (write, read, write, read, read)]
    for thread in threads:
        thread.join(LONG_S)
    assert pair == [600, 600]
    assert not any(torn)
