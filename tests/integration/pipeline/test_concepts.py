"""Commands about concepts: a concept of examples is kept, listed, erased by a view, and refused if it is empty."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from features.content.chain import load_view
from features.errors import DatasetError
from models.encoder.meaning.concepts import load_concepts
from tessera.cli.main import app
from tests.integration.world import World


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    for stage in ("encode", "frame"):
        shutil.copytree(world.directory / stage, directory / stage)
    return directory


def _concept(*words: str) -> Any:
    return CliRunner().invoke(app, ["encoder", "concept", *words])


def test_a_concept_of_items_and_texts_is_kept_listed_and_erased_by_a_view(world: World, run: Path) -> None:
    baking = [
        row["item_id"]
        for row in world.bundle.items.iter_rows(named=True)
        if row["listed"] and "cooking" in (row["topic"] or [])
    ]
    items = ",".join(baking[:4])
    added = _concept(
        "add", str(run), "home cooking", "--items", items, "--text", "a loaf of bread in the oven", "--json"
    )
    assert added.exit_code == 0, added.output
    assert json.loads(added.stdout)["examples"] == 5
    (listed,) = json.loads(_concept("list", str(run), "--json").stdout)
    assert (listed["concept"], listed["head"], listed["column"]) == ("home cooking", "home-cooking", "")
    erased = _concept("erase", str(run), "home cooking", "--view", "no-cooking", "--json")
    assert erased.exit_code == 0, erased.output
    view = load_view(run / "views" / "no-cooking")
    assert view.id == json.loads(erased.stdout)["id"]
    assert view.source == load_concepts(run / "concepts" / "home-cooking").source
    assert "home cooking" in _concept("list", str(run)).stdout


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["add", "own", "--items", "nothing-of-this"], "concept 'own': item 'nothing-of-this' is unknown"),
        (
            ["add", "own", "--text", "shutter print", "--text", "species season"],
            "concept 'own': 2 examples have content, expected 3 to 10",
        ),
        (["add", "own"], "concept 'own' is empty"),
        (["add", "../own", "--text", "bread"], "a name is letters"),
        (["erase", "own", "--view", "v"], "has no concepts"),
        (["erase", "own", "--view", "base"], "view 'base': expected"),
    ],
)
def test_faults_are_refused_by_name(run: Path, words: list[str], fault: str) -> None:
    refused = _concept(words[0], str(run), *words[1:])
    assert isinstance(refused.exception, DatasetError)
    assert fault in str(refused.exception)
