"""The heap that a service freezes: hidden while it runs, collected when a part of it ends, visible afterwards."""

import concurrent.futures
import gc
import multiprocessing
import weakref
from collections.abc import Callable

import pytest

from features.collector import frozen_heap


class _Ring:
    """Object that only the collector can free."""

    def __init__(self) -> None:
        self.own = self


def _ring() -> "weakref.ref[_Ring]":
    return weakref.ref(_Ring())


def objects_are_hidden_while_a_body_runs_and_visible_after_the_last() -> None:
    before, held = gc.get_freeze_count(), _Ring()
    assert held in _visible()
    with frozen_heap():
        assert held not in _visible()
        with frozen_heap():
            later = _Ring()
        assert held not in _visible()
        assert later not in _visible()
    assert held in _visible()
    assert gc.get_freeze_count() in (before, 0)


def garbage_before_a_body_and_of_an_ended_body_is_collected_at_once() -> None:
    before = _ring()
    with frozen_heap():
        assert before() is None
        with frozen_heap():
            held = _Ring()
            with frozen_heap():
                assert held not in _visible()
            gone = weakref.ref(held)
            del held
            gc.collect()
            assert gone() is not None
        assert gone() is None
    ring = _ring()
    gc.collect()
    assert ring() is None


def _visible() -> list[object]:
    return [one for one in gc.get_objects() if type(one) is _Ring]


@pytest.mark.parametrize(
    "law",
    [
        objects_are_hidden_while_a_body_runs_and_visible_after_the_last,
        garbage_before_a_body_and_of_an_ended_body_is_collected_at_once,
    ],
)
def test_the_heap_of_a_process_of_its_own(law: Callable[[], None]) -> None:
    # Services of other tests may freeze the heap of this process.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        # A law that fails raises here.
        assert process.submit(law).result() is None
