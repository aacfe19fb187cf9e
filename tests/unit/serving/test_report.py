"""The order in which the report of an experiment reads its messages."""

import contextlib
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from serving.rollout.report import TimeOrder


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=4)), max_size=30), st.integers(0, 30))
def test_messages_come_by_time_and_those_of_one_time_as_they_were_stored(
    messages: list[tuple[int, bytes]], cut: int
) -> None:
    with contextlib.closing(TimeOrder()) as order:
        order.put(messages[:cut])
        order.put(messages[cut:])
        assert len(order) == len(messages)
        assert list(order) == [payload for _, payload in sorted(messages, key=lambda one: one[0])]


def test_the_memory_of_the_order_does_not_grow_with_the_messages() -> None:
    with contextlib.closing(TimeOrder()) as order:
        tracemalloc.start()
        try:
            order.put((number * 7_919 % 20_000, b"%d" % number * 40) for number in range(20_000))
            count = sum(1 for _ in order)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert count == 20_000
    assert peak < 200_000
