"""A descriptor is read as written, and refused with the table, the key and the remedy when it cannot be."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from features.dataset.descriptor import Dataset, Events, Items, load_dataset
from features.dataset.label import Label, parse_rule
from features.dataset.split import Split
from features.errors import DatasetError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"

GOOD = """
name = "shop"
[items]
path = "items.parquet"
id = "sku"
text = ["title"]
categorical = { tags = { split = "|" }, brand = {} }
numeric = ["price"]
[users]
path = "users.csv"
id = "user"
categorical = ["country"]
[events]
path = "events/*.jsonl.gz"
user = "user"
item = "sku"
time = "at"
label = { column = "kind", positive = "== buy" }
[split]
by = "time"
"""


def load(tmp_path: Path, text: str) -> Dataset:
    path = tmp_path / "shop.toml"
    path.write_text(text)
    return load_dataset(path)


def test_a_descriptor_is_read_as_written(tmp_path: Path) -> None:
    dataset = load(tmp_path, GOOD)
    assert dataset.items is not None
    assert dataset.users is not None
    assert dataset.items.categorical["tags"].split == "|"
    assert dataset.items.categorical["brand"].split is None
    assert list(dataset.users.categorical) == ["country"]
    assert dataset.events.time is not None
    assert (dataset.events.time.column, dataset.events.time.unit) == ("at", None)
    assert (dataset.split.train, dataset.split.validation, dataset.split.test, dataset.split.seed) == (0.8, 0.1, 0.1, 0)
    assert [table.kind for table in (dataset.items, dataset.users, dataset.events)] == ["parquet", "csv", "jsonl"]
    assert dataset.directory == tmp_path
    assert dataset.has_content


def test_content_needs_items_with_text(tmp_path: Path) -> None:
    assert not load(tmp_path, GOOD.replace('text = ["title"]\n', "")).has_content


def test_a_dataset_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path, GOOD).name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('by = "time"', 'by = "time"\nsead = 1', ["[split]", "unknown key 'sead'", "'seed'"]),
        ("[users]", "[usres]", ["unknown key 'usres'", "'users'"]),
        ("positive =", "postive =", ["[events] label", "unknown key 'postive'", "'positive'"]),
        ('split = "|"', 'splt = "|"', ["[items] categorical.tags", "unknown key 'splt'", "'split'"]),
        ('id = "sku"', "", ["[items] id", "is missing"]),
        ('by = "time"', 'by = "tme"', ["[split] by", "'time'", "got 'tme'"]),
        ('by = "time"', 'by = "time"\ntrain = 0.9', ["[split]", "must be 1, got 1.1"]),
        ('"== buy"', '"= buy"', ["[events] label.positive", "'= buy' is not a rule", ">= 4"]),
        ('column = "kind", ', "", ["[events] label", 'column = "..."']),
        ("label = {", 'label = "kind" # {', ["[events] label", "expected a table, { KEY = VALUE", "got 'kind'"]),
        ('positive = "== buy"', 'negative = "== buy"', ["[events] label", "needs positive too"]),
        ('positive = "== buy"', "implicit = true", ["[events] label", 'needs positive = "..."']),
        ('positive = "== buy"', 'positive = "== a", negative = "== b", implicit = true', ["[events] label", "draws"]),
        ('time = "at"', 'time = "at"\norder = "at"', ["[events]", "time and order"]),
        ('time = "at"', "", ["[split]", "needs time in [events]"]),
        ('item = "sku"\n', "", ["[items] needs item", "[events]"]),
        ('user = "user"\n', "", ["[users] needs user", "[events]"]),
        ("users.csv", "users.dat", ["[users]", "'users.dat'", "format ="]),
        ("users.csv", 'users.csv"\nheader = false\nseparator = "\\t', ["[users]", "needs columns"]),
        ('id = "sku"', 'id = "sku"\ncolumns = ["sku"]', ["[items]", "format is parquet", "remove columns"]),
        ('numeric = ["price"]', 'numeric = ["brand"]', ["[items]", "'brand' more than once"]),
        ('["country"]', '["country", "country"]', ["[users]", "'country' more than once"]),
        ('["country"]', '["user_id"]', ["[users]", "'user_id' cannot be a feature", "rename"]),
        ('numeric = ["price"]', 'filterable = ["text"]', ["[items]", "'text' cannot be filterable"]),
        ('name = "shop"', 'name = "../shop"', ["name:", "got '../shop'"]),
        ('name = "shop"', 'name = "shop"\nsource = "x"', ["unknown key 'source'"]),
        ('name = "shop"', "name = shop", ["is not TOML", "line 2"]),
    ],
)
def test_an_unusable_descriptor_is_refused_with_table_key_and_remedy(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    assert old in GOOD
    with pytest.raises(DatasetError) as refused:
        load(tmp_path, GOOD.replace(old, new))
    for part in [str(tmp_path / "shop.toml"), *said]:
        assert part in str(refused.value)


def test_everything_wrong_with_a_descriptor_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        load(tmp_path, GOOD.replace('id = "sku"', "").replace('by = "time"', 'by = "tme"'))
    assert len(str(refused.value).splitlines()) == 2


def test_a_missing_descriptor_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.toml"):
        load_dataset(tmp_path / "nowhere.toml")


def test_implicit_negatives_need_items() -> None:
    with pytest.raises(ValidationError, match="need item"):
        Events(path="e.csv", label=Label(implicit=True))


def test_leave_one_out_needs_users(tmp_path: Path) -> None:
    events = Events(path="e.csv", label=Label(column="y"))
    with pytest.raises(ValidationError, match="needs user"):
        Dataset(name="d", events=events, split=Split(by="leave-one-out"), source=tmp_path / "d.toml")


def test_unknown_keys_are_refused_in_python_too() -> None:
    with pytest.raises(ValidationError, match="'filterable'"):
        Items(path="i.csv", id="id", filterabel=("x",))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "op", "value"),
    [(">= 4", ">=", 4.0), ("<2", "<", 2.0), ("!= add to cart", "!=", "add to cart"), ("== '1'", "==", "1")],
)
def test_a_rule_compares_with_a_number_or_a_string(text: str, op: str, value: float | str) -> None:
    rule = parse_rule(text)
    assert (rule.op, rule.value) == (op, value)


@pytest.mark.parametrize("text", ["", "4", ">=", "=> 4", "4 <"])
def test_what_is_not_a_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="OP VALUE"):
        parse_rule(text)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared development data")
@pytest.mark.parametrize("name", ["ml1m", "beauty", "criteo"])
def test_the_example_descriptors_load(name: str) -> None:
    dataset = load_dataset(SHARED / f"{name}.toml")
    assert dataset.name == name
    assert dataset.has_content == (name != "criteo")


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", r"shop.toml is UTF-16; save it as UTF-8"),
        ("latin-1", r"shop.toml: line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_descriptor_that_is_not_utf_8_is_named_with_its_remedy(tmp_path: Path, encoding: str, said: str) -> None:
    path = tmp_path / "shop.toml"
    path.write_bytes('name = "shop"\n# caf\u00e9\n'.encode(encoding))
    with pytest.raises(DatasetError, match=said):
        load_dataset(path)
