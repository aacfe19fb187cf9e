"""Ages that are counted many at once are those of the client's own histogram."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from streaming.metrics import _SECONDS, StreamMetrics

AGES = st.lists(st.one_of(st.sampled_from([1_000 * bound for bound in _SECONDS]), st.floats(-5.0, 400_000.0)))


def lines(registry: CollectorRegistry) -> dict[str, float]:
    """Values of the metric by name and labels."""
    page = generate_latest(registry).decode().splitlines()
    found = [line.rsplit(" ", 1) for line in page if line.startswith("tessera_freshness") and "_created" not in line]
    return {name: float(value) for name, value in found}


@given(st.lists(st.tuples(st.sampled_from(["store", "mirror"]), AGES), max_size=4))
def test_many_ages_at_once_count_as_one_by_one(calls: list[tuple[str, list[float]]]) -> None:
    metrics, registry = StreamMetrics(), CollectorRegistry()
    each = Histogram("tessera_freshness_seconds", "Ages.", ["at"], buckets=_SECONDS, registry=registry)
    for at, ages in calls:
        metrics.visible(ages, at)
        child = each.labels(at)
        for age in ages:
            child.observe(age / 1_000)
    assert lines(metrics.registry) == pytest.approx(lines(registry))
