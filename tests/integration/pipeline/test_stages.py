"""A stage runs again for what it reads and for nothing else, and the files of a dataset are read once a run."""

import io
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import features.dataset.tables
from features.dataset.descriptor import load_dataset
from models.bundle.bundle import load_bundle
from models.ranker.train import TrainConfig
from models.registry.registry import Registry
from tessera.pipeline.options import RunOptions, known_choices, load_options
from tessera.pipeline.run import RunResult, run
from tests.build import SMALL_NETWORK

BASE = Path(__file__).parents[2] / "realfiles" / "base"
SMALL = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=4,
    levels=2,
    codes=4,
    training=TrainConfig(max_epochs=1, network=SMALL_NETWORK),
)


def go(place: Path, options: RunOptions, *, until: str = "publish", registry: Registry | None = None) -> RunResult:
    dataset = load_dataset(place / "base.toml")
    console = Console(quiet=True)
    return run(dataset, place / "out", options, console=console, registry=registry, until=until)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset and its finished run, to copy."""
    place = tmp_path_factory.mktemp("finished") / "data"
    shutil.copytree(BASE, place)
    go(place, SMALL)
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"gates.auc": 1.0, "runner_options": "--direct_num_workers=1"}, None),
        ({"encoder_dim": 3}, "encode"),
        ({"codes": 3}, "assign"),
        ({"quantizer_options": "{iterations = 3}"}, "assign"),
        ({"tokens": "unigram"}, "frame"),
        ({"history_length": 5}, "frame"),
        ({"table.dim": 8}, "choose"),
        ({"training.precision": "bfloat16", "ranker.content": 8}, "choose"),
    ],
)
def test_an_option_does_again_the_stages_that_read_it(place: Path, change: dict[str, Any], first: str | None) -> None:
    pairs = [f"{name}={value}" for name, value in change.items()]
    base = load_dataset(place / "base.toml").model_copy(update={"run": TABLE})
    assert load_options(base) == SMALL
    result = go(place, load_options(base, pairs), until="train")
    stages = ("encode", "assign", "frame", "choose", "train")
    assert tuple(result.executed) == (stages[stages.index(first) :] if first else ())
    assert tuple(result.again) == tuple(result.executed)
    if first:
        assert [reason.split()[0] for reason in result.again[first]] == list(change)
        followers = list(zip(result.again, list(result.again.values())[1:], strict=False))
        assert [reasons[-1] for _, reasons in followers] == [f"{before} ran again" for before, _ in followers]


TABLE = {
    "quantizer": "residual-kmeans",
    "encoder_dim": 4,
    "levels": 2,
    "codes": 4,
    "training": {"max_epochs": 1},
    "ranker": {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(SMALL_NETWORK).items()
        if f"ranker.{name}" in known_choices()
    },
}


def test_a_file_does_again_the_stages_that_read_it(place: Path) -> None:
    events = place / "events.csv"
    events.write_text(events.read_text() + "u004,i000,1700000001,1\n")
    assert go(place, SMALL, until="frame").again == {"frame": ["events.csv changed"]}
    items = place / "items.csv"
    items.write_text(items.read_text().replace("green tea", "black tea"))
    again = go(place, SMALL, until="frame").again
    assert again == {
        "encode": ["items.csv changed"],
        "assign": ["encode ran again"],
        "frame": ["items.csv changed", "assign ran again"],
    }


def test_a_column_that_is_no_text_leaves_the_vectors_alone(place: Path) -> None:
    descriptor = place / "base.toml"
    descriptor.write_text(
        descriptor.read_text().replace('text = ["title"]', 'text = ["title"]\nfilterable = ["title"]')
    )
    again = go(place, SMALL, until="frame").again
    assert again == {"frame": ['descriptor: items.filterable [] → ["title"]']}


def test_the_bundle_records_the_choices_that_made_it(place: Path) -> None:
    choices = load_bundle(place / "out" / "publish" / "bundle").manifest.choices
    assert choices["quantizer"] == "residual-kmeans"
    assert (choices["levels"], choices["codes"], choices["table.dim"]) == (2, 4, 16)
    assert not [name for name in choices if name.startswith(("gates", "runner"))]


def test_a_warm_start_says_which_choices_are_others(place: Path) -> None:
    said = io.StringIO()
    warm = replace(SMALL, warm_start=place / "out", seed=1, training=replace(SMALL.training, batch=64))
    dataset = load_dataset(place / "base.toml")
    console = Console(file=said, width=400)
    result = run(dataset, place / "warm", warm, console=console, registry=None, until="publish")
    assert f"warm start: other choices than {place / 'out'}: seed 0 → 1; training.batch 512 → 64" in said.getvalue()
    # The encoder was taken over, so the choice of another had no part in it.
    assert result.bundle is not None
    assert "encoder" not in result.bundle.manifest.choices
    again = go(place, replace(SMALL, table=replace(SMALL.table, dim=8)), until="train")
    assert list(again.again) == ["choose", "train"]
    moved = run(
        dataset,
        place / "warm",
        replace(warm, table=replace(SMALL.table, dim=8)),
        console=console,
        registry=None,
        until="train",
    )
    assert moved.again["train"] == ["table.dim 16 → 8", "the warm start's train ran again"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each table was read from its files."""
    counted: Counter[str] = Counter()
    load = features.dataset.tables.load

    def counting(*arguments: Any, table: str, **options: Any) -> Any:
        counted[table] += 1
        return load(*arguments, table=table, **options)

    monkeypatch.setattr(features.dataset.tables, "load", counting)
    return counted


# MLflow asks SQLAlchemy for a loader strategy that the next SQLAlchemy drops.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
def test_a_run_reads_each_table_once_and_a_finished_one_reads_none(tmp_path: Path, reads: Counter[str]) -> None:
    place = Path(shutil.copytree(BASE, tmp_path / "data"))
    registry = Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", artifacts=tmp_path / "mlflow")
    result = go(place, SMALL, registry=registry)
    assert result.release is not None
    assert reads == {"items": 1, "events": 1}
    reads.clear()
    assert go(place, SMALL, registry=registry).executed == {}
    assert reads == {}
