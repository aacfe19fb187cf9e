"""The console's pages on encoders: rows with their control, the chosen map with its reason, and escaped names."""

from typing import Any

import numpy as np
import pytest
from jinja2 import Environment, PackageLoader, StrictUndefined

from features.content.encoder import unit
from models.encoder.meaning.concept_fit import fit_column
from models.encoder.meaning.shown_matches import matches, typical_items
from tessera.pages.console import encoders, view

SPACE = {"run": "out", "dim": 4, "recall_new": 0.25, "recall_later": None, "concepts": 0.9}
REPORT = {
    "spaces": [SPACE | {"space": "<base>"}, SPACE | {"space": "random vectors", "recall_new": 0.01}],
    "search": [],
    "encoders": [{"run": "out", "encoder": "lsa-1", "items_per_s": 10.0}],
}
UPGRADE = {
    "map": {"source": "new", "target": "old", "kind": "ridge", "aim": "codes", "pairs": 1000, "fidelity": {}},
    "tried": [{"kind": "none", "task": 0.4}, {"kind": "ridge", "task": 0.9, "whole_ids": 0.7}],
    "items": 400,
    "seconds_an_item": 0.1,
    "reembed_seconds": 40.0,
    "errors": {},
}


def page(name: str, **content: Any) -> str:
    pages = Environment(loader=PackageLoader("tessera.pages.console"), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"moment": view.moment, "count": view.count, "ratio": view.ratio, "ago": view.ago}
    return str(
        pages.get_template(f"{name}.html").render(
            pages=(), here="", bundle="b-1", model="shop", away={}, now=0.0, **content
        )
    )


def test_a_report_shows_every_space_beside_its_control_and_escapes_names() -> None:
    shown = page("encoder", **encoders.report(REPORT))
    assert "<base>" not in shown
    assert shown.count("&lt;base&gt;") >= 2
    assert "random vectors" in shown
    assert "Too few texts have a title and a body." in shown
    assert "Passages" not in shown
    assert "has no report" in page("encoder", **encoders.report(None))


def test_an_upgrade_names_the_chosen_map_its_reason_and_the_progress() -> None:
    progress = {"done": 256, "items": 400, "space": "old", "finished": False}
    shown = page("upgrades", **encoders.upgrades({"smaller": UPGRADE | {"reembedding": progress}}))
    assert '<tr class="strong"><td>ridge</td>' in shown
    assert "it keeps the most whole Semantic IDs" in shown
    assert '<progress max="400" value="256"' in shown
    fresh = page("upgrades", **encoders.upgrades({"smaller": UPGRADE}))
    assert '<progress max="400" value="0"' in fresh
    assert "No upgrade of this version" in page("upgrades", **encoders.upgrades({}))


def test_matches_are_explained_by_the_concept_that_both_carry() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(2, 6, dtype=np.float32)
    kinds = np.arange(80) % 2
    vectors = unit(centres[kinds] + 0.1 * rng.normal(size=(80, 6)))
    values: list[list[str] | None] = [["red"] if kind else ["blue"] for kind in kinds]
    head = fit_column(vectors, values, column="colour", source="x", seed=0)
    found = matches(head, vectors)
    assert len(found) == 8
    for match in found:
        assert match.item != match.near
        assert match.shared[0][0] == ("red" if kinds[match.item] else "blue")
    typical = typical_items(head, vectors)
    assert {name: {int(kinds[row]) for row in rows} for name, rows in typical.items()} == {"red": {1}, "blue": {0}}
    assert typical["red"] != pytest.approx(typical["blue"])
