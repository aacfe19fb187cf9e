"""Content of the console's pages: numbers and drawings from the samples."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from features.aggregate.aggregator import Reading
from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import Bundle
from models.ranker.evaluate import PARTS
from models.registry.lineage import ModelVersion
from serving.ranking.service import RankService
from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.judge import interval_text
from serving.traffic.router import Router
from streaming.dead_letter import Filed
from streaming.log.topics import Topics
from tessera.pages import svg as plot
from tessera.pages.console.followed import followed
from tessera.pages.console.sampler import Sample, Seen

_SHOWN_BYTES = 2_000
_STALE_LOOK_S = 300.0
_MEASURES = {
    "all.auc": "AUC",
    "unseen.auc": "AUC, new items",
    "unseen_users.auc": "AUC, new users",
    "all.log_loss": "log loss",
}
_UNSEEN = {"unseen": "items", "unseen_users": "users"}
_QUALITY = ("auc", "log_loss", "calibration_error")


def moment(at: float, *, seconds: bool = False) -> str:
    """Returns a time as text, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def ago(seconds: float) -> str:
    """Returns an age in the unit that suits it."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def count(value: float | None) -> str:
    """Returns a number with thousands apart; a dash for none."""
    return "–" if value is None else f"{value:,.0f}"


def ratio(value: float | None) -> str:
    """Returns a measure with four decimals; a dash for none."""
    return "–" if value is None else f"{value:.4f}"


def overview(seen: Seen, topics: Topics, current: Router) -> dict[str, Any]:
    """Returns throughput, freshness, lag, and the entries that need attention."""
    last = seen.samples[-1] if seen.samples else None
    counted = {
        "requests answered": lambda one: one.requests,
        "events appended": lambda one: float(one.ends.get(topics.events, 0)),
        "changes of the table": lambda one: float(one.ends.get(topics.deltas, 0)),
        "impressions": lambda one: float(one.ends.get(topics.impressions, 0)),
    }
    rates = []
    for name, value in counted.items():
        found = seen.rates(value)
        drawn = plot.spark(
            found, describe=f"{name} a second over the last minutes, {found[-1] if found else 0:.1f} now"
        )
        rates.append({"name": name, "now": found[-1] if found else None, "drawn": Markup(drawn)})
    return {
        "rates": rates,
        "lag": _lag(last, topics),
        "followed": followed(seen.followed, last.at if last else 0.0),
        "fresh_s": last.fresh_s if last else None,
        "items": current.service.items,
        "champion": next((one for one in seen.versions if "champion" in one.aliases), None),
        "running": [_experiment(seen, one) for one in seen.running],
        "letters": seen.letters.waiting,
        "ranges": last.ranges if last and len(last.ranges) > 1 else (),
        "servers": seen.servers if len(seen.servers) > 1 else [],
        "span_s": seen.samples[-1].at - seen.samples[0].at if len(seen.samples) > 1 else 0.0,
    }


def _lag(last: Sample | None, topics: Topics) -> list[tuple[str, int | None]]:
    if last is None:
        return []
    names = {"events not trained on": topics.events, "items not consumed": topics.items}
    names |= {"changes not in the store": topics.deltas}
    return [(name, last.lag.get(topic)) for name, topic in names.items()]


def lineage(versions: Sequence[ModelVersion]) -> dict[str, Any]:
    """Returns versions, the newest first, with the version each started from and its successors."""
    numbers = {one.bundle: one.version for one in versions}
    rows = [
        {
            "one": one,
            "parent": numbers.get(one.lineage.parent or "", one.lineage.parent),
            "children": [other.version for other in versions if other.lineage.parent == one.bundle],
            "measures": [(label, one.metrics.get(name)) for name, label in _MEASURES.items()],
        }
        for one in versions
    ]
    return {"rows": rows, "measures": list(_MEASURES.values())}


def rollouts(seen: Seen) -> dict[str, Any]:
    """Returns running and ended experiments."""
    return {
        "running": [_experiment(seen, one) for one in seen.running],
        "past": [
            {
                "one": found.experiment,
                "ended": found.ended,
                "why": found.why,
                "looks": len(_looks(seen, found.experiment)),
            }
            for found in reversed(seen.past)
        ],
    }


def rollout(seen: Seen, name: str) -> dict[str, Any] | None:
    """Returns one experiment by its id, over time; None if there is none."""
    ended = {found.experiment.id: found for found in seen.past}
    one = next((one for one in seen.running if one.id == name), None)
    if one is None and name not in ended:
        return None
    experiment = one or ended[name].experiment
    looks = _looks(seen, experiment)
    points = [
        (moment(look["at"], seconds=True), look["estimate"], look["low"], look["high"])
        for look in looks
        if look["low"] is not None
    ]
    history: list[dict[str, str]] = []
    for look in looks:
        for breach in look["breaches"]:
            if all(line["kind"] != breach.partition(":")[0] for line in history):
                history.append({"at": moment(look["at"]), "kind": breach.partition(":")[0], "breach": breach})
    band = plot.band(points, describe="the challenger's rate less the control's, with its interval") if points else ""
    return {
        "experiment": experiment,
        "why": ended[name].why if one is None else "",
        "ended": ended[name].ended if one is None else None,
        "look": looks[-1] if looks else None,
        "looks": len(looks),
        "band": Markup(band),
        "history": history,
        "share": experiment.share(time.time()),
        "arms": (CONTROL, CHALLENGER),
    }


def _experiment(seen: Seen, one: Any) -> dict[str, Any]:
    """Returns a running experiment as its last look has it."""
    looks = _looks(seen, one)
    look = looks[-1] if looks else None
    drawn = ""
    if look is not None and not one.shadow and look["low"] is not None:
        reach = 1.1 * max(abs(look["low"]), abs(look["high"]), 1e-9)
        said = f"difference {look['estimate']:+.4f}, {interval_text(look['low'], look['high'])}"
        drawn = plot.interval(look["estimate"], look["low"], look["high"], reach=reach, describe=said)
    return {
        "one": one,
        "look": look,
        "share": one.share(time.time()),
        "unwatched": look is None or time.time() - look["at"] > _STALE_LOOK_S,
        "drawn": Markup(drawn),
    }


def _looks(seen: Seen, one: Any) -> list[dict[str, Any]]:
    return seen.looks.get(one.id, [])


def letter(filed: Filed) -> dict[str, Any]:
    """Returns a dead letter with the start of its message as text."""
    shown = filed.letter.value[:_SHOWN_BYTES].decode("utf-8", errors="backslashreplace")
    # Control characters are not legible, and some reverse the text around them.
    text = "".join(char if char.isprintable() or char in "\n\t" else f"\\u{ord(char):04x}" for char in shown)
    return {
        "number": filed.number,
        "letter": filed.letter,
        "put_back": filed.put_back,
        "readable": filed.waits or filed.put_back,
        "text": text,
        "cut": filed.letter.size_bytes > _SHOWN_BYTES,
    }


def quality(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns a bundle's measures: the ranker beside its baselines, the share of the new, and its codebook's health."""
    models = metrics.get("quality", {})
    rows = [
        (model, PARTS.get(part, part), found)
        for model, parts in models.items()
        for part, found in parts.items()
        if all(name in found for name in _QUALITY)
    ]
    return {
        "quality": rows,
        "unseen": _unseen(models.get("ranker", {})),
        "codebook": metrics.get("semantic_ids"),
        "drift": metrics.get("drift"),
    }


def placement(bundle: Bundle) -> dict[str, Any]:
    """Returns the position path of a bundle: the log-odds of each value, and the constant of a server."""
    if not bundle.schema.placement:
        return {"placement": [], "constant": None}
    path = bundle.network().placement
    return {"placement": path.curves(), "constant": float(path.reference)}


def tasks(bundle: Bundle) -> dict[str, Any]:
    """Returns the tasks of a bundle with their weights and test quality, and the formula; no task for one label."""
    declared = bundle.dataset.events.tasks
    if declared is None:
        return {"tasks": [], "formula": ""}
    found = bundle.manifest.metrics.get("tasks", {})
    rows = [
        {
            "name": name,
            "judged": name == declared.judge,
            "weight": weight,
            "found": found.get(name, {}).get("all", {"rows": 0, "auc": None, "log_loss": None}),
        }
        for name, weight in declared.weights.items()
    ]
    return {"tasks": rows, "formula": declared.score}


def _unseen(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the test events of items and of users that training never saw: their number, share, and distinct ids."""
    total = parts.get("all", {}).get("rows")
    return [
        {"of": of, "rows": found["rows"], "share": found["rows"] / total, "distinct": found.get("distinct")}
        for part, of in _UNSEEN.items()
        if total and (found := parts.get(part))
    ]


def aggregates(service: RankService, user: str, item: str) -> dict[str, Any]:
    """Returns the aggregates that a ranking of an item for a user reads, as of the newest event of the stream."""
    plan = service.bundle.schema.aggregates
    content: dict[str, Any] = {"rows": [], "as_of": None, "declared": bool(plan.columns), "problem": ""}
    if not plan.columns or not (user or item):
        return content
    try:
        rows, as_of = service.aggregates(user, item)
    except TesseraError as error:
        return content | {"problem": str(error)}
    wanted = [row for row in rows if all((user if part.startswith("user") else item) for part in row.by)]
    newest = None if as_of is None or not service.has_clock else as_of.time / 1e6
    return content | {"rows": [_reading(row) for row in wanted], "as_of": newest}


def declared_features(dataset: Dataset) -> list[dict[str, str]]:
    """Returns the fields of requests and candidates, and the features that expressions make, as rows of a table."""
    fields = [
        {"name": name, "of": scope, "kind": one.type, "from": "" if one.default is None else f"default {one.default}"}
        for scope, own in (("request", dataset.events.request), ("candidate", dataset.events.candidate))
        for name, one in own.items()
    ]
    sources = [source for source in (dataset.items, dataset.users, dataset.events) if source is not None]
    made = [
        {"name": one.name, "of": " and ".join(one.inputs), "kind": one.kind, "from": _declaration(dataset, one.name)}
        for source in sources
        for one in (*source.derived, *source.crossed)
    ]
    return fields + made


def declared_policies(dataset: Dataset) -> list[dict[str, str]]:
    """Returns the policies of a dataset, with their rules in words, as rows of a table."""
    rows = []
    for name, policy in dataset.policies.items():
        rules = ["leaves out consumed items"] if policy.leave_out_consumed else []
        diversity = policy.diversity
        if diversity is not None and diversity.by is not None:
            rules.append(f"diverse by {diversity.by}, weight {diversity.weight:g}")
        if diversity is not None and diversity.column is not None:
            rules.append(f"at most {diversity.most} of a {diversity.column}")
        rules += [f"{boost.filter.key} times {boost.times:g}" for boost in policy.boost]
        rules += [f"{pin.filter.key} at place {pin.position}" for pin in policy.pin]
        if policy.new is not None:
            rules.append(f"{policy.new.share:.0%} of the places for items of at most {policy.new.positives} positives")
        rows.append({"name": name, "rules": "; ".join(rules) or "no rule"})
    return rows


def _declaration(dataset: Dataset, name: str) -> str:
    declared = dataset.features[name]
    return declared.sql or f"{declared.column} by a table of {len(declared.values or {}):,} values"


def _reading(row: Reading) -> dict[str, str]:
    value = "–" if row.value is None else f"{row.value:,.3g}"
    if row.kind == "rate" and row.value is not None:
        value = f"{100 * row.value:.1f} %"
    elif row.kind == "recency" and row.value is not None:
        value = ago(row.value)
    behind = "" if row.count is None else f"{row.count:,.1f}"
    return {"name": row.name, "by": " × ".join(row.by), "kind": row.kind, "horizon": row.horizon, "value": value,
            "count": behind}  # fmt: skip
