"""A profile counts what a dataset holds; a dataset that cannot be used is refused by file, table, column and row."""

import io
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from features.dataset.descriptor import load_dataset
from features.dataset.profile import Novelty, Profile, ValueRange, profile, render
from features.errors import DatasetError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"

DESCRIPTOR = """
name = "shop"
[items]
path = "items.csv"
id = "sku"
text = ["title"]
categorical = { tags = { split = "|" } }
numeric = ["price"]
[users]
path = "users.csv"
id = "user"
categorical = ["country"]
[events]
path = "events.jsonl"
user = "user"
item = "sku"
time = "at"
label = { column = "stars", positive = ">= 4", negative = "<= 2" }
categorical = ["page"]
numeric = ["dwell"]
[split]
by = "time"
"""
ITEMS = "sku,title,tags,price\n1,ab,x|y,1.5\n2,,x,\n3,abcd,,2\n"
USERS = "user,country\nu1,NL\nu2,\n"
EVENTS: list[dict[str, Any]] = [
    {
        "user": f"u{1 + i % 2}",
        "sku": 1 + i % 4,
        "at": f"2024-01-{i + 1:02}",
        "stars": 1 + i % 5,
        "page": "p",
        "dwell": i,
    }
    for i in range(20)
]


def write(
    tmp_path: Path,
    *,
    descriptor: str = DESCRIPTOR,
    items: str = ITEMS,
    users: str = USERS,
    change: dict[int, dict[str, Any]] | None = None,
) -> Path:
    """A dataset in files, `change` altering events by their 0-based row."""
    events = [row | (change or {}).get(index, {}) for index, row in enumerate(EVENTS)]
    (tmp_path / "items.csv").write_text(items)
    (tmp_path / "users.csv").write_text(users)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    path = tmp_path / "shop.toml"
    path.write_text(descriptor)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as refused:
        profile(load_dataset(path))
    return str(refused.value)


def test_a_profile_counts_what_the_tables_hold(tmp_path: Path) -> None:
    found = profile(load_dataset(write(tmp_path, change={3: {"page": None, "user": "u9"}})))
    assert {name: table.rows for name, table in found.tables.items()} == {"items": 3, "users": 2, "events": 20}
    assert found.tables["items"].cardinalities == {"tags": 2}
    assert found.tables["items"].nulls == {"tags": 1, "price": 1, "title": 1}
    assert found.tables["users"].nulls == {"country": 1}
    assert found.tables["events"].nulls == {"page": 1, "dwell": 0}
    assert (found.users, found.items) == (3, 4)
    assert found.span == ValueRange("2024-01-01T00:00:00+00:00", "2024-01-20T00:00:00+00:00")
    assert (found.labels.positives, found.labels.negatives, found.labels.dropped) == (8, 8, 4)
    assert found.text is not None
    assert (found.text.p50, found.text.max, found.text.empty) == (2, 4, 1)
    assert (found.unknown_items, found.unknown_users) == (4, 1)
    assert found.split == {"train": 13, "validation": 1, "test": 2}
    assert (found.unseen_users, found.unseen_items) == (Novelty(0, 0.0, 0), Novelty(0, 0.0, 0))


def test_test_events_of_users_and_items_without_training_events_are_counted(tmp_path: Path) -> None:
    # The last two labelled events are the test part; the one before them is the validation part.
    change: dict[int, dict[str, Any]] = {16: {"sku": 9}, 18: {"user": "u9"}, 19: {"user": "u9", "sku": 9}}
    found = profile(load_dataset(write(tmp_path, change=change)))
    assert found.unseen_users == Novelty(2, 1.0, 1)
    assert found.unseen_items == Novelty(1, 0.5, 1)
    out = io.StringIO()
    render(found, Console(file=out, width=120))
    assert re.search(r"test, user unseen in training +2 +100.0 of test", out.getvalue())
    assert re.search(r"test, item unseen in training +1 +50.0 of test", out.getvalue())


def test_a_profile_is_plain_json(tmp_path: Path) -> None:
    found = profile(load_dataset(write(tmp_path)))
    document = json.loads(json.dumps(found.to_json()))
    assert document["labels"] == {"positives": 8, "negatives": 8, "dropped": 4}
    assert document["tables"]["items"]["cardinalities"] == {"tags": 2}


def test_a_rendered_profile_shows_only_nulls_there_are(tmp_path: Path) -> None:
    out = io.StringIO()
    render(profile(load_dataset(write(tmp_path))), Console(file=out, width=120))
    shown = out.getvalue()
    for text in ("items", "users", "p50 2", "1 empty", "2024-01-20", "item not in the catalogue", "country", "price"):
        assert text in shown
    assert "dwell" not in shown
    assert "user not in the users table" not in shown


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'numeric = ["price"]',
            'numreic = ["price"]',
            "shop.toml: [items]: unknown key 'numreic'; the nearest valid name",
        ),
        ('"items.csv"', '"item.csv"', "item.csv: [items] no such file; fix path"),
        ('"events.jsonl"', '"*.jsonl.gz"', "*.jsonl.gz: [events] no file matches"),
        (
            'text = ["title"]',
            'text = ["titel"]',
            "items.csv: [items] column 'titel': does not exist; the nearest existing column is 'title'",
        ),
        (
            '["country"]',
            '["contry"]',
            "users.csv: [users] column 'contry': does not exist; the nearest existing column is 'country'",
        ),
        (
            'time = "at"',
            'time = "art"',
            "events.jsonl: [events] column 'art': does not exist; the nearest existing column is 'at'",
        ),
        ('["dwell"]', '["at"]', "events.jsonl: [events] column 'at', row 1: holds '"),
        ('time = "at"', 'time = "page"', "events.jsonl: [events] column 'page', row 1: 'p' is not a time"),
        (
            'time = "at"',
            'time = { column = "at", unit = "s" }',
            "column 'at', row 1: holds '2024-01-01'; a number of s is expected",
        ),
        ('time = "at"', 'time = { column = "dwell", unit = "iso" }', "column 'dwell', row 1: 0 is not ISO-8601"),
        ('">= 4"', '">= five"', "events.jsonl: [events] column 'stars': holds numbers, but the rule '>= five'"),
        ('">= 4"', '"=> 4"', "shop.toml: [events] label.positive: '=> 4' is not a rule"),
        ('">= 4"', '">= 2"', "column 'stars', row 2: 2 matches both positive"),
        ('">= 4"', '">= 9"', "events.jsonl: [events] column 'stars': there are no positive labels, no row matches"),
        ('"<= 2"', '"< 1"', "events.jsonl: [events] column 'stars': there are no negative labels, no row matches"),
        (
            'positive = ">= 4", negative = "<= 2"',
            'positive = ">= 1"',
            "'stars': there are no negative labels, every row",
        ),
        (
            ', positive = ">= 4", negative = "<= 2"',
            "",
            "column 'stars', row 2: holds 2, but a label without rules is 0 or 1",
        ),
        (
            'by = "time"',
            'by = "time"\ntrain = 0.98\nvalidation = 0.01\ntest = 0.01',
            "shop.toml: [split] by = 'time' leaves no event for",
        ),
    ],
)
def test_a_descriptor_that_does_not_fit_its_files_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in DESCRIPTOR
    assert said in refusal(write(tmp_path, descriptor=DESCRIPTOR.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({4: {"dwell": "long"}}, "column 'dwell', row 5: holds 'long'; a number is expected"),
        ({6: {"at": "yesterday"}}, "column 'at', row 7: 'yesterday' is not a time; write ISO-8601"),
        ({6: {"at": "2024-02-30"}}, "column 'at', row 7: '2024-02-30' is not a time"),
        ({6: {"at": None}}, "column 'at', row 7: the event has no time"),
        ({2: {"user": None}}, "column 'user', row 3: the id is null"),
        ({2: {"sku": None}}, "column 'sku', row 3: the id is null"),
        ({2: {"stars": "many"}}, "column 'stars', row 3: holds 'many'; the rule '>= 4' compares with a number"),
    ],
)
def test_a_bad_value_in_an_event_is_refused_by_row_and_value(
    tmp_path: Path, change: dict[int, dict[str, Any]], said: str
) -> None:
    assert f"{tmp_path / 'events.jsonl'}: [events] {said}" in refusal(write(tmp_path, change=change))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (ITEMS + "2,z,,1\n", "column 'sku', row 4: id '2' is also in row 2 of items.csv"),
        (ITEMS + ",z,,1\n", "column 'sku', row 4: the id is null"),
        (ITEMS + "4,z,,cheap\n", "column 'price', row 4: holds 'cheap'; a number is expected"),
        (ITEMS + "4,z\n", "row 4: holds 2 fields, 4 expected"),
    ],
)
def test_a_bad_value_in_an_item_is_refused_by_row_and_value(tmp_path: Path, items: str, said: str) -> None:
    assert f"{tmp_path / 'items.csv'}: [items] {said}" in refusal(write(tmp_path, items=items))


def test_duplicate_users_are_refused_with_both_rows(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, users=USERS + "u1,DE\n"))
    assert f"{tmp_path / 'users.csv'}: [users] column 'user', row 3: id 'u1' is also in row 1 of users.csv" in said


def test_a_row_is_numbered_within_its_own_file(tmp_path: Path) -> None:
    path = write(tmp_path, descriptor=DESCRIPTOR.replace('"items.csv"', '"items-*.csv"'))
    (tmp_path / "items-1.csv").write_text(ITEMS)
    (tmp_path / "items-2.csv").write_text("sku,title,tags,price\n4,x,,\n2,x,,\n")
    said = refusal(path)
    assert f"{tmp_path / 'items-2.csv'}: [items] column 'sku', row 2: id '2' is also in row 2 of items-1.csv" in said


def test_a_time_in_the_wrong_unit_is_refused_instead_of_wrapping(tmp_path: Path) -> None:
    descriptor = DESCRIPTOR.replace('time = "at"', 'time = { column = "at", unit = "s" }')
    change = {index: {"at": 1_706_702_400_000 + index} for index in range(20)}
    said = refusal(write(tmp_path, descriptor=descriptor, change=change))
    assert "column 'at', row 1: 1706702400000 s is beyond the year 9999; fix the value, or the unit" in said


def test_a_column_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, descriptor=DESCRIPTOR.replace("items.csv", "items.parquet"))
    frame = pl.DataFrame({"sku": [1], "title": [{"en": "x"}], "tags": ["a"], "price": [1.0]})
    frame.write_parquet(tmp_path / "items.parquet")
    assert "items.parquet: [items] column 'title': holds values of type Struct" in refusal(path)


def test_every_user_too_short_for_leave_one_out_is_refused(tmp_path: Path) -> None:
    change = {index: {"user": f"x{index}"} for index in range(20)}
    path = write(tmp_path, descriptor=DESCRIPTOR.replace('by = "time"', 'by = "leave-one-out"'), change=change)
    assert "[split] by = 'leave-one-out' leaves no event for validation, of 16" in refusal(path)


def test_implicit_feedback_needs_no_negatives(tmp_path: Path) -> None:
    descriptor = DESCRIPTOR.replace('column = "stars", positive = ">= 4", negative = "<= 2"', "implicit = true")
    found = profile(load_dataset(write(tmp_path, descriptor=descriptor)))
    assert (found.labels.positives, found.labels.negatives, found.labels.dropped) == (20, 0, 0)


def shared(name: str) -> Profile:
    if not SHARED.exists():
        pytest.skip("needs the shared development data")
    return profile(load_dataset(SHARED / f"{name}.toml"))


def test_ml1m_is_explicit_with_texts_users_and_a_clock() -> None:
    found = shared("ml1m")
    assert {name: table.rows for name, table in found.tables.items()} == {
        "items": 3883,
        "users": 6040,
        "events": 487650,
    }
    assert sum(found.split.values()) == found.labels.positives + found.labels.negatives == 487650 - found.labels.dropped
    assert found.tables["items"].cardinalities == {"genres": 18}
    assert found.span is not None
    assert found.span.first < "2001" < found.span.last
    assert (found.unknown_items, found.unknown_users) == (0, 0)


def test_beauty_is_implicit_and_ordered() -> None:
    found = shared("beauty")
    assert (found.users, found.items, found.span) == (22363, 12101, None)
    assert found.split == {"train": 198502 - 2 * 22363, "validation": 22363, "test": 22363}


def test_criteo_is_events_alone() -> None:
    found = shared("criteo")
    assert list(found.tables) == ["events"]
    assert (found.users, found.items, found.text) == (None, None, None)
    assert found.split == {"train": 8000, "validation": 1000, "test": 1000}
    assert len(found.tables["events"].cardinalities) == 26
