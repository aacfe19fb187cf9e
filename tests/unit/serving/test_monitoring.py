"""Dashboard and alerts ask for metrics that exist, with labels that they have, and no metric is left out of sight."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from serving.metrics import Metrics
from serving.skew.metrics import SkewMetrics
from streaming.metrics import StreamMetrics

INFRA = Path(__file__).parents[3] / "infra"
DASHBOARD = json.loads((INFRA / "grafana" / "tessera.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]


def families() -> dict[str, Any]:
    """By family, its collector."""
    stream = StreamMetrics()
    stream.visible([1.0])
    registries: list[CollectorRegistry] = [Metrics().registry, stream.registry, SkewMetrics().registry]
    return {
        name: collector
        for registry in registries
        for collector in registry._collector_to_names
        for name in registry._collector_to_names[collector]
    }


def labels_of(collector: Any) -> set[str]:
    """Labels that a collector declares, or has samples of."""
    if hasattr(collector, "_labelnames"):
        return set(collector._labelnames)
    return {label for family in collector.collect() for sample in family.samples for label in sample.labels}


def test_every_metric_that_is_asked_for_exists_with_its_labels() -> None:
    known = families()
    for expression in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]:
        names = re.findall(r"\btessera_\w+", expression)
        assert names, expression
        for name in names:
            assert name in known, f"{name} in {expression}"
        labels = {label for name in names for label in labels_of(known[name])} | {"le", "instance"}
        asked = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        asked |= set(re.findall(r"[{,]\s*(\w+)=", expression))
        assert asked <= labels, expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(EXPRESSIONS)
    plain = {family.name for collector in families().values() for family in collector.describe()}
    assert len(plain) > 20
    assert not [name for name in plain if name not in shown]


def test_panels_stand_beside_each_other_and_alerts_say_what_to_do() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "action"}
