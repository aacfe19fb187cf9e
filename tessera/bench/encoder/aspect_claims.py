"""Claims of `aspects`, judged from the means over the seeds, with each control beside its claim."""

from collections.abc import Iterator
from typing import Any

from tessera.bench.harness.result import Claim, at_least, at_most

Row = dict[str, Any]


def aspect_claims(rows: list[Row]) -> Iterator[Claim]:
    """Yields every claim that the rows can judge."""
    yield from _by_aspect([row for row in rows if row["part"] == "aspects"])
    yield from _shared([row for row in rows if row["part"] == "shared concept"])
    yield from _erased([row for row in rows if row["part"] == "erase"])
    # The best predicted concept first.
    judged = list(dict.fromkeys(row["concept"] for row in rows if row["part"] == "erase"))
    yield from _steered([row for row in rows if row["part"] == "top 20"], judged)


def _by_aspect(rows: list[Row]) -> Iterator[Claim]:
    by = {(row["way"], row["space"]): row for row in rows}
    names = [name for way, name in by if way == "columns hidden" and name != "generic"]
    for way in ("columns hidden", "columns shown"):
        generic = by[way, "generic"]
        for name in names:
            gain = by[way, name][f"{name}_p10"] / max(generic[f"{name}_p10"], 1e-9)
            yield at_least(f"new items, {way}: precision@10 of {name} in its aspect over generic", gain, 1.3)
    for name in names:
        others = [by["columns hidden", other][f"{name}_p10"] for other in names if other != name]
        best = max(others, default=0.0) / max(by["columns hidden", "generic"][f"{name}_p10"], 1e-9)
        yield at_most(f"new items, columns hidden: precision@10 of {name} in another aspect over generic", best, 1.0)


def _shared(rows: list[Row]) -> Iterator[Claim]:
    by = {row["way"]: row["true"] for row in rows}
    yield at_least("top shared concept is truly shared", by["concept head"], 0.80)
    yield at_most("control: the most frequent concept is truly shared", by["most frequent"], by["concept head"])


def _erased(rows: list[Row]) -> Iterator[Claim]:
    by = {(row["concept"], row["way"]): row for row in rows}
    for name in dict.fromkeys(row["concept"] for row in rows):
        before, gated = by[name, "nothing"], by[name, "cluster means, gated"]
        yield at_most(
            f"erase {name}, gated: share among neighbours over before", gated["share"] / before["share"], 0.80
        )
        yield at_least(f"erase {name}, gated: other neighbours kept", gated["kept"], 0.97)
        yield at_most(f"erase {name}, LEACE: AUC of a probe", by[name, "LEACE"]["auc"], 0.68)
        control = by[name, "random subspace"]["share"] / before["share"]
        yield at_least(f"control: {name}, random subspace: share among neighbours over before", control, 0.95)


def _steered(rows: list[Row], judged: list[str]) -> Iterator[Claim]:
    by = {(row["concept"], row["way"]): row for row in rows}
    for name in judged:
        before, avoided = by[name, "nothing"], by[name, "avoid"]
        yield at_most(f"avoid {name}: share in users' top 20 over before", avoided["share"] / before["share"], 0.75)
        yield at_least(f"avoid {name}: others kept", avoided["kept"], 0.88)
        left = by[name, "without, predicted"]["share"] / before["share"]
        target = 0.45 if name == judged[0] else 0.6
        yield at_most(f"without {name}, predicted: share in users' top 20 over before", left, target)
        yield at_most(f"without {name}, declared: share in users' top 20", by[name, "without, declared"]["share"], 0.0)
