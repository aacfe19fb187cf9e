"""The console shows quality by item and by user, and a dash where a measure does not exist."""

from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from features.dataset.descriptor import Dataset
from models.ranker.evaluate import Quality
from tessera.pages.console import view
from tessera.pages.console.sources import candidate_sources

KNOWN = asdict(Quality(900, 0.4, 0.8123, 0.5, 0.02, 0.9, distinct=70))
FEW = asdict(Quality(100, 0.05, None, 0.2, 0.04, None, distinct=6))
PARTS = {
    "all": asdict(Quality(1_000, 0.4, 0.8011, 0.5, 0.02, 0.9)),
    "known": KNOWN,
    "unseen": FEW,
    "known_users": KNOWN,
    "unseen_users": FEW,
}


def page(metrics: dict[str, Any], more: dict[str, Any] | None = None) -> str:
    pages = Environment(
        loader=PackageLoader("tessera.pages.console"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"moment": view.moment, "count": view.count, "ratio": view.ratio}
    found: str = pages.get_template("health.html").render(
        pages=(), here="", bundle="b-1", model="shop", away={}, now=0.0, insight=None, why="",
        **{"placement": [], "constant": None, "declared": [], "policies": [], "sources": [], "tasks": [], "formula": ""}
        | view.quality(metrics)
        | dict(more or {}),
    )  # fmt: skip
    return found


def test_the_page_of_health_lists_fields_and_expressions() -> None:
    described = {
        "name": "d",
        "source": "d.toml",
        "items": {"path": "i.csv", "id": "item", "numeric": ["price"], "categorical": ["genre"]},
        "events": {
            "path": "e.csv",
            "user": "user",
            "item": "item",
            "label": {"column": "y"},
            "request": {"device": {"type": "category", "default": "web"}},
            "candidate": {"price_now": {"type": "number"}},
        },
        "split": {"by": "random"},
        "features": {
            "discount": {"sql": "event.price_now / item.price"},
            "area": {"column": "item.genre", "values": {"a": "b"}},
        },
    }
    rows = view.declared_features(Dataset.model_validate(described))
    assert [(row["name"], row["of"], row["kind"]) for row in rows] == [
        ("device", "request", "category"),
        ("price_now", "candidate", "number"),
        ("area", "item", "categorical"),
        ("discount", "event and item", "numeric"),
    ]
    shown = page({}, {"declared": rows})
    assert "<td>device</td><td>request</td><td>category</td><td>default web</td>" in shown
    assert "event.price_now / item.price" in shown
    assert "item.genre by a table of 1 values" in shown
    assert "Fields and expressions" not in page({})


def test_the_health_page_lists_the_policies_of_a_dataset_with_their_rules() -> None:
    recent = {"column": "year", "gte": 2020}
    described = {
        "name": "shop",
        "source": "shop.toml",
        "items": {"path": "i.csv", "id": "item", "text": ["title"], "filterable": ["year"]},
        "events": {"path": "e.csv", "user": "user", "item": "item", "label": {"column": "y"}},
        "split": {"by": "random"},
        "policies": {
            "home": {
                "leave_out_consumed": True,
                "diversity": {"by": "content", "weight": 0.3, "column": "year", "most": 2},
                "boost": [{"filter": recent, "times": 1.5}],
                "pin": [{"filter": recent, "position": 2}],
                "new": {"share": 0.1},
            },
            "plain": {},
        },
    }
    rows = view.declared_policies(Dataset.model_validate(described))
    assert [row["name"] for row in rows] == ["home", "plain"]
    assert rows[0]["rules"].split("; ") == [
        "leaves out consumed items",
        "diverse by content, weight 0.3",
        "at most 2 of a year",
        '{"column":"year","gte":2020} times 1.5',
        '{"column":"year","gte":2020} at place 2',
        "10% of the places for items of at most 0 positives",
    ]
    assert rows[1]["rules"] == "no rule"
    shown = page({}, {"policies": rows})
    assert "<h2>Policies</h2>" in shown
    assert "<td>home</td><td>leaves out consumed items; diverse" in shown
    assert "Policies" not in page({})


def test_the_page_of_health_shows_the_sources_of_candidates() -> None:
    without = candidate_sources({"base": 10, "lexical": 5}, {})
    assert [one["name"] for one in without] == ["content", "popular"]
    rows = candidate_sources({"base": 2_000, "towers": 5_000}, {"towers": 3.0, "both": 1.0})
    shown = page({}, {"sources": rows})
    assert "<h2>Sources of candidates</h2>" in shown
    assert (
        '<td>towers</td><td class="number">5,000</td><td class="number">3</td><td class="number">75.0 %</td>' in shown
    )
    assert (
        '<td>content</td><td class="number">2,000</td><td class="number">0</td><td class="number">0.0 %</td>' in shown
    )
    assert '<td>popular</td><td class="number">–</td>' in shown


def test_the_page_of_the_test_data_shows_unseen_users_and_a_dash_for_no_auc() -> None:
    shown = page({"quality": {"ranker": PARTS}})
    assert shown.count("10.0 %</b>") == 2
    assert "of users unseen in training" in shown
    assert "100 events, 6 users" in shown
    (row,) = (line for line in shown.splitlines() if "<td>unseen users</td>" in line)
    assert '<td class="number">100</td><td class="number">–</td><td class="number">0.2000</td>' in row


def test_the_metrics_of_an_earlier_release_show_the_items_alone() -> None:
    earlier = {
        part: {name: value for name, value in PARTS[part].items() if name != "distinct"}
        for part in ("all", "known", "unseen")
    }
    shown = page({"quality": {"ranker": earlier}})
    assert "of items unseen in training" in shown
    assert "users" not in shown
    assert view.quality({})["unseen"] == []


def test_tasks_are_a_table_with_the_formula() -> None:
    tasks = [
        {"name": "buy", "judged": False, "weight": 2.0, "found": {"rows": 1280, "auc": 0.81, "log_loss": 0.3}},
        {"name": "click", "judged": True, "weight": 1.0, "found": {"rows": 1600, "auc": None, "log_loss": 0.5}},
    ]
    shown = page({}, {"tasks": tasks, "formula": "click * buy ** 0.5 <b>"})
    assert "click (judged)" in shown
    assert "<code>click * buy ** 0.5 &lt;b&gt;</code>" in shown
    assert "<h2>Tasks</h2>" not in page({})


def test_the_position_path_is_a_table_where_a_bundle_has_one() -> None:
    rows = [{"column": "position", "value": "0", "logit": 1.25}, {"column": "surface", "value": "<b>", "logit": -0.5}]
    shown = page({}, {"placement": rows, "constant": -0.75})
    assert "<td>position</td><td>0</td>" in shown
    assert "+1.250" in shown
    assert "<td>&lt;b&gt;</td>" in shown
    assert "the constant -0.750 that a server adds" in shown
    assert "Where items are shown" not in page({})


def test_a_version_shows_its_auc_for_new_users() -> None:
    assert "unseen_users.auc" in view._MEASURES
