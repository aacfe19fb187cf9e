"""A commit in the background: one at a time, in order, and its error is raised once."""

import threading

import pytest

from streaming.ranks.background import BackgroundCommit


def test_commits_run_one_at_a_time_in_their_order_beside_the_caller() -> None:
    background, done, gate = BackgroundCommit(), list[int](), threading.Event()

    def commit(number: int) -> None:
        gate.wait(10)
        done.append(number)

    background.start(lambda: commit(0))
    assert done == []
    gate.set()
    for number in range(1, 5):
        background.start(lambda number=number: commit(number))
        assert done[:number] == list(range(number))
    background.wait()
    assert done == list(range(5))
    background.close()


def test_an_error_is_raised_once_by_the_next_start_which_starts_nothing() -> None:
    background, done = BackgroundCommit(), list[int]()

    def fail() -> None:
        raise KeyError("refused")

    background.start(fail)
    with pytest.raises(KeyError, match="refused"):
        background.start(lambda: done.append(1))
    background.wait()
    assert done == []
    background.start(lambda: done.append(2))
    background.close()
    assert done == [2]
