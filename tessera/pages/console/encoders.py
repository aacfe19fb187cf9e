"""Content of the console's pages on encoders: the report, upgrades to another encoder, and concepts."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from models.bundle.bundle import Bundle
from models.encoder.meaning.concepts import described
from models.encoder.meaning.shown_matches import matches, typical_items
from models.ranker.loading import content_vectors
from tessera.pages import svg
from tessera.pages.encoder_page import sections

_WHY = {
    "codes": "of all maps it keeps the most whole Semantic IDs",
    "gain": "of all maps it finds the most co-liked items in the old index",
    "both": "of all maps it has the greatest sum of whole Semantic IDs kept and co-liked items found",
}
_MEASURES = {
    "first_codes": "first codes kept",
    "whole_ids": "whole Semantic IDs kept",
    "task": "co-liked items found, of the old encoder's",
}
_TITLE = 80
_SHOWN = 0.05


def report(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the sections of a report; none if the version has no report."""
    if document is None:
        return {"parts": []}
    return {"parts": [one._replace(drawing=Markup(one.drawing)) for one in sections(document)]}


def upgrades(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns each upgrade: its maps as drawing and rows, the chosen map with the reason, and the re-embedding."""
    return {"upgrades": [_upgrade(name, found) for name, found in sorted(documents.items())]}


def _upgrade(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    chosen, tried = found["map"], found["tried"]
    measures = list(dict.fromkeys(measure for row in tried for measure in row if measure != "kind"))
    progress = found.get("reembedding")
    return {
        "name": name,
        "chosen": chosen,
        "why": _WHY.get(chosen["aim"], ""),
        "drawn": Markup(_drawn(tried, chosen["kind"])),
        "measures": measures,
        "rows": [{"kind": row["kind"], "cells": [row.get(measure) for measure in measures]} for row in tried],
        "seconds": found["reembed_seconds"],
        "items": found["items"],
        "done": progress["done"] if progress else 0,
        "space": progress["space"] if progress else chosen["target"],
    }


def _drawn(tried: Sequence[Mapping[str, Any]], chosen: str) -> str:
    groups = [
        (
            label,
            [
                svg.Row(row["kind"], row.get(measure), "–" if row.get(measure) is None else f"{row[measure]:.3f}",
                        strong=row["kind"] == chosen)
                for row in tried
            ],
        )
        for measure, label in _MEASURES.items()
        if any(row.get(measure) is not None for row in tried)
    ]  # fmt: skip
    if not groups:
        return ""
    end = max(1.0, *(row.value or 0.0 for _, rows in groups for row in rows))
    ticks = [(at, f"{at:g}") for at in svg.nice_ticks(end)]
    return svg.rows(groups, describe="What each map keeps; the chosen map is strong", low=0, high=end, ticks=ticks)


class ConceptPage:
    """Concepts of a bundle with typical items and explained matches.

    Args:
        bundle: Bundle that may have concepts.
    """

    def __init__(self, bundle: Bundle) -> None:
        head = bundle.concepts
        self.rows: list[dict[str, Any]] = []
        self.matches: list[dict[str, Any]] = []
        self.drawn = Markup("")
        if head is None:
            return
        items, vectors = bundle.items, content_vectors(bundle.items)
        ids = items["item_id"].to_list()
        texts = items["text"].fill_null("").to_list() if "text" in items.columns else [""] * items.height
        titles = [_short(text) or name for name, text in zip(ids, texts, strict=True)]
        typical = typical_items(head, vectors)
        self.rows = [row | {"typical": [titles[at] for at in typical[row["concept"]]]} for row in described(head)]
        self.matches = [
            {
                "item": titles[one.item],
                "near": titles[one.near],
                "shared": [pair for pair in one.shared if pair[1] >= _SHOWN],
            }
            for one in matches(head, vectors)
        ]
        self.drawn = Markup(_aucs(self.rows))


def _aucs(rows: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted((row for row in rows if row["auc"] is not None), key=lambda row: -row["auc"])
    if not ordered:
        return ""
    drawn = [svg.Row(row["concept"], row["auc"], f"{row['auc']:.3f}", strong=True) for row in ordered]
    ticks = [(at, f"{at:g}") for at in (0.5, 0.75, 1.0)]
    return svg.rows([("", drawn)], describe="AUC of each concept on held-out items", low=0.5, high=1.0, ticks=ticks)


def _short(text: str) -> str:
    line = text.partition("\n")[0].strip()
    return line if len(line) <= _TITLE else line[: _TITLE - 1] + "…"
