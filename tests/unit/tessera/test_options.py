"""The `[run]` table and `--set`: one vocabulary, checked the same way, refused with the nearest name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.dataset.descriptor import Dataset, Events, load_dataset
from features.dataset.label import Label
from features.dataset.split import Split
from features.errors import DatasetError, TesseraError
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.registry.gate import Gates
from models.table.default_schema import TableOptions
from tessera.pipeline.options import RunOptions, known_choices, load_options, parse_bytes


def dataset(run: dict[str, Any] | None = None) -> Dataset:
    events = Events(path="e.parquet", label=Label(column="y"))
    return Dataset(name="d", events=events, split=Split(by="order"), run=run or {}, source=Path("/d/shop.toml"))


WRITTEN = {
    "seed": 3,
    "encoder_options": {"lsa": {"fields": ["title", "tags"]}},
    "quantizer": "residual-kmeans",
    "quantizer_options": {"iterations": 4},
    "levels": 2,
    "table": {"budget": "2MB", "chunks": {"item.brand": 4}, "exact": ["country"], "history": "attention"},
    "ranker": {"hidden": [32, 16]},
    "training": {"max_epochs": 2, "dropout": {"item": 0.1}},
    "gates": {"latency": 10},
    "runner_options": ["--direct_num_workers=2"],
}
MEANT = RunOptions(
    seed=3,
    encoder_options={"lsa": {"fields": ["title", "tags"]}},
    quantizer="residual-kmeans",
    quantizer_options={"iterations": 4},
    levels=2,
    table=TableOptions(budget=2_000_000, chunks={"item.brand": 4}, exact=("country",), history="attention"),
    training=replace(
        TrainConfig(max_epochs=2, network=NetworkConfig(hidden=(32, 16))),
        dropout=replace(TrainConfig().dropout, item=0.1),
    ),
    gates=Gates(latency=10.0),
    runner_options=("--direct_num_workers=2",),
)


def test_without_a_table_everything_is_the_default() -> None:
    assert load_options(dataset()) == RunOptions()


def test_the_table_means_what_the_same_options_in_python_mean() -> None:
    assert load_options(dataset(WRITTEN)) == MEANT


def test_the_same_values_given_to_set_mean_the_same() -> None:
    given = [
        "seed=3",
        'encoder_options.lsa.fields=["title", "tags"]',
        "quantizer=residual-kmeans",
        "quantizer_options.iterations=4",
        "levels=2",
        "table.budget=2MB",
        "table.chunks.item.brand=4",
        "table.exact=country",
        "table.history=attention",
        "ranker.hidden=32,16",
        "training.max_epochs=2",
        "training.dropout.item=0.1",
        "gates.latency=10",
        "runner_options=--direct_num_workers=2",
    ]
    assert load_options(dataset(), given) == MEANT


@pytest.mark.parametrize(
    ("kind", "pooling"), [("dcn-v2", "mean"), ("deepfm", "mean"), ("din", "attention"), ("self-attention", "attention")]
)
def test_a_network_of_sequences_gets_the_history_item_by_item(kind: str, pooling: str) -> None:
    found = load_options(dataset(), [f"ranker.kind={kind}"])
    assert found.shape.history == found.choices()["table.history"] == pooling
    chosen = load_options(dataset(), [f"ranker.kind={kind}", "table.history=attention"])
    assert chosen.shape.history == "attention"


def test_set_overrides_one_value_and_keeps_the_rest_of_its_table() -> None:
    found = load_options(dataset(WRITTEN), ["table.chunks.user_id=2", "table.budget=auto", "seed=4", "seed=5"])
    assert found.table == replace(MEANT.table, chunks={"item.brand": 4, "user_id": 2}, budget=None)
    assert found.seed == 5


def test_every_choice_survives_being_written_and_read() -> None:
    nested: dict[str, Any] = {}
    for name, value in MEANT.choices().items():
        *above, last = [name] if name in ("encoder_options", "quantizer_options", "runner_options") else name.split(".")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
        place[last] = "auto" if value is None else value
    assert load_options(dataset(nested)) == MEANT
    assert set(MEANT.choices()) == set(known_choices())


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (
            {"quantiser": "rqvae"},
            "quantiser: unknown key; the nearest valid name is 'quantizer' (valid: seed, encoder,",
        ),
        ({"table": {"budgt": 1}}, "table.budgt: unknown key; the nearest valid name is 'table.budget' (valid: table."),
        ({"admission": 2}, "admission: unknown key; the nearest valid name is 'table.admission'"),
        ({"precision": "auto"}, "precision: unknown key; the nearest valid name is 'training.precision'"),
        ({"training": {"seed": 1}}, "training.seed: unknown key; the nearest valid name is 'seed'"),
        ({"table": 3}, "table: is a table; name one of its keys: table.dim"),
        ({"table": {"dim": 7}}, "table.dim: expected a multiple of 4, got 7"),
        ({"table": {"budget": "2QB"}}, "table.budget: expected bytes, like 1500000, 1.5MB or 2MiB"),
        ({"seed": -1}, "seed: expected 0 to 2147483648, got -1"),
        ({"levels": 17}, "levels: expected 1 to 16, got 17"),
        ({"seed": "3"}, "seed: expected a whole number, got '3'"),
        ({"codes": "many"}, "codes: expected a whole number or auto, got 'many'"),
        ({"tokens": "words"}, "tokens: expected one of prefix, unigram"),
        ({"encoder": "bert"}, "encoder: expected one of lsa, sentence-transformers"),
        ({"encoder": ["lsa", "bert"]}, "got 'bert'"),
        ({"encoder": "chain"}, "got 'chain'"),
        ({"reads": ["id", "price"]}, "reads: expected "),
        ({"quantizer": "k-means"}, "quantizer: expected one of rqvae, residual-kmeans, balanced-kmeans, got 'k-means'"),
        ({"quantizer_options": {"stps": 3}}, "quantizer: no option 'stps'"),
        ({"encoder_options": {"lsa": {"fieldz": ["a"]}}}, "encoder_options: lsa: no option 'fieldz'; the nearest is"),
        ({"encoder_options": {"static": {}}}, "encoder_options: 'static' is no part of the encoder 'lsa'"),
        ({"gates": {"auc": "much"}}, "gates.auc: expected a number, got 'much'"),
        ({"gates": {"speed": 1}}, "gates.speed: unknown key"),
        ({"gates": {"encoder": {"recal_new": 0.1}}}, "gates.encoder.recal_new: no such measure; the nearest is"),
        ({"gates": {"encoder": {"recall_new": -0.1}}}, "gates.encoder.recall_new: expected the largest drop"),
        ({"gates": {"skew": {"alarm": 0}}}, "gates.skew.alarm: no such measure; the nearest is 'alarms'"),
        (
            {"table": {"history": "mean"}, "ranker": {"kind": "din"}},
            "table.history: the ranker din reads a sequence, and 'mean' leaves none",
        ),
        (
            {"ranker": {"kind": "dlrm", "hidden": [8]}},
            "ranker.hidden: only dcn-v2 has it; the settings of dlrm stand in",
        ),
        ({"gates": {"skew": {"psi": -1}}}, "gates.skew.psi: expected the largest value, 0 or more, got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_key_and_remedy(run: dict[str, Any], said: str) -> None:
    with pytest.raises(TesseraError) as refused:
        load_options(dataset(run))
    assert str(refused.value).startswith("/d/shop.toml: [run]")
    assert said in str(refused.value)


def test_all_that_is_wrong_with_the_table_is_said_at_once() -> None:
    with pytest.raises(DatasetError) as refused:
        load_options(dataset({"sed": 1, "table": {"dim": 7}}))
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("table.budget=2QB", "--set table.budget=2QB: expected bytes"),
        ("table.dim=wide", "--set table.dim=wide: expected a whole number, got 'wide'"),
        ("table.content=maybe", "--set table.content=maybe: expected true or false or auto, got 'maybe'"),
        ("gates.speed=1", "--set gates.speed=1: unknown key; the nearest valid name is"),
        ("quantizer_options.stps=3", "--set quantizer_options.stps=3: quantizer: no option 'stps'"),
        ("seed", "--set seed: expected NAME=VALUE"),
        ("=3", "--set =3: expected NAME=VALUE"),
    ],
)
def test_a_wrong_override_names_itself(pair: str, said: str) -> None:
    with pytest.raises(TesseraError) as refused:
        load_options(dataset(), [pair])
    assert said in str(refused.value)


def test_options_made_in_python_are_checked_too() -> None:
    with pytest.raises(TesseraError, match=r"^levels: expected 1 to 16, got 17$"):
        RunOptions(levels=17)
    with pytest.raises(TesseraError, match=r"^table\.dim: expected a multiple of 4, got 7$"):
        RunOptions(table=TableOptions(dim=7))


def test_the_descriptor_hands_the_table_on_and_refuses_it_where_it_is_none(tmp_path: Path) -> None:
    text = (
        'name = "d"\n[events]\npath = "e.csv"\nlabel = {column = "y"}\n[split]\nby = "order"\n'
        '[run]\nquantizer = "x"\n[run.any]\nthing = 1\n'
    )
    (tmp_path / "d.toml").write_text(text)
    assert load_dataset(tmp_path / "d.toml").run == {"quantizer": "x", "any": {"thing": 1}}
    (tmp_path / "d.toml").write_text("run = 3\n" + text.split("[run]")[0])
    with pytest.raises(DatasetError, match=r"d\.toml: \[run\]: .*; got 3"):
        load_dataset(tmp_path / "d.toml")
    (tmp_path / "d.toml").write_text(text.replace("[run", "[runs"))
    with pytest.raises(DatasetError, match="unknown key 'runs'; the nearest valid name is 'run'"):
        load_dataset(tmp_path / "d.toml")


@pytest.mark.parametrize(("text", "size"), [("1500", 1500), ("1.5MB", 1_500_000), ("2 MiB", 2 << 20), ("1kb", 1000)])
def test_sizes_are_read_in_both_kinds_of_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_encoders_side_by_side_are_a_list_or_joined() -> None:
    names = "lsa+sentence-transformers"
    assert load_options(dataset({"encoder": ["lsa", "sentence-transformers"]})).encoder == names
    assert load_options(dataset({}), [f"encoder={names}"]).encoder == names


def test_parts_of_an_item_are_chosen_or_given() -> None:
    assert load_options(dataset({})).reads is None
    assert load_options(dataset({"reads": "auto"})).reads is None
    assert load_options(dataset({"reads": ["id", "content"]})).reads == ("id", "content")
    assert load_options(dataset({}), ["reads=id,code"]).reads == ("id", "code")
