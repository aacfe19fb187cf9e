"""Every metric with its labels, from the registries that servers and streams fill."""

from prometheus_client import CollectorRegistry

from infra.docs.reference.markdown import code, table, text


def serving() -> str:
    """Returns the metrics of a server."""
    from serving.metrics import Metrics

    return _table(Metrics().registry)


def stream() -> str:
    """Returns the metrics of a stream."""
    from streaming.metrics import StreamMetrics

    return _table(StreamMetrics().registry)


def skew() -> str:
    """Returns the metrics of `tessera skew --every-s`."""
    from serving.skew.metrics import SkewMetrics

    return _table(SkewMetrics().registry)


def collected(registry: CollectorRegistry) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Returns name, type, labels and help of each metric, as a page of metrics writes them."""
    found = []
    for collector in list(registry._collector_to_names):
        for metric in collector.collect():
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            found.append((name, metric.type, tuple(getattr(collector, "_labelnames", ())), metric.documentation))
    return found


def _table(registry: CollectorRegistry) -> str:
    rows = [
        (code(name), kind, ", ".join(code(label) for label in labels), text(about))
        for name, kind, labels, about in collected(registry)
    ]
    return table(("metric", "type", "labels", "meaning"), rows)
