"""The version of the code behind a result changes with the code that decides it, and with nothing else."""

import io
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

import tessera.pipeline.run
from features.dataset.descriptor import load_dataset
from tessera import code_version as version
from tessera.code_version import code_version


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    sources = {
        "features/__init__.py": "",
        "features/frame.py": "ROWS = 1\n",
        "features/column.py": "WIDTH = 1\n",
        "models/__init__.py": "",
        "models/train.py": "def train():\n    from features import frame\n    return frame.ROWS\n",
        "serving/__init__.py": "",
        "serving/api.py": "import models.train\n",
        "tessera/__init__.py": "",
        "tessera/run.py": "import os\nfrom models.train import train\n",
        "tessera/run.sql": "select 1\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def edited(tree: Path, name: str, module: str = "tessera.run") -> bool:
    """Returns whether an edit of one file changes the version of a module."""
    before = code_version(module, root=tree)
    path = tree / name
    path.write_bytes(path.read_bytes() + b"\n-- edited")
    code_version.cache_clear()
    if path.suffix == ".py":
        path.write_bytes(path.read_bytes().replace(b"-- edited", b"# edited"))
    return code_version(module, root=tree) != before


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tessera/run.py", True),
        ("models/train.py", True),
        ("features/frame.py", True),
        ("tessera/run.sql", True),
        ("features/column.py", False),
        ("serving/api.py", False),
    ],
)
def test_an_edit_counts_where_imports_reach(tree: Path, name: str, changes: bool) -> None:
    assert edited(tree, name) == changes


def test_another_release_of_a_library_counts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {"numpy": "1.0"}
    monkeypatch.setattr(version, "LIBRARIES", tuple(releases))
    monkeypatch.setattr(version.metadata, "version", releases.__getitem__)
    code_version.cache_clear()
    old = code_version("tessera.run", root=tree)
    releases["numpy"] = "1.1"
    code_version.cache_clear()
    assert old != code_version("tessera.run", root=tree)


def test_a_module_that_is_not_there_is_an_error(tree: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"tessera\.walk"):
        code_version("tessera.walk", root=tree)


def test_the_code_of_a_run_is_what_its_stages_call() -> None:
    reached = {path.as_posix() for path in version._reached("tessera.pipeline.run", version._ROOT)}
    for name in ("features/frame.py", "features/content/lsa.py", "models/ranker/train.py", "models/table/unified.py"):
        assert any(path.endswith(name) for path in reached), name
    assert not any("/tessera/pages/console/" in path or "/streaming/" in path for path in reached)


def test_changed_code_does_the_stages_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = {"user": ["a", "b"] * 50, "item": ["1", "2", "3", "4"] * 25, "label": [0, 1] * 50}
    pl.DataFrame(visits).write_parquet(tmp_path / "e.parquet")
    (tmp_path / "s.toml").write_text(
        'name = "s"\n[events]\npath = "e.parquet"\nuser = "user"\nitem = "item"\nlabel = {column = "label"}\n'
        '[split]\nby = "random"\n'
    )

    def executed() -> list[str]:
        console = Console(file=io.StringIO())
        options = tessera.pipeline.run.RunOptions()
        dataset = load_dataset(tmp_path / "s.toml")
        out = tmp_path / "out"
        result = tessera.pipeline.run.run(dataset, out, options, console=console, registry=None, until="frame")
        return list(result.executed)

    assert executed() == ["frame"]
    assert executed() == []
    monkeypatch.setattr(tessera.pipeline.run, "code_version", lambda module: "of an edited frame builder")
    assert executed() == ["frame"]
