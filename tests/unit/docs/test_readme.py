"""The README fits on a few screens, and its code, links, tree and figures are true."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from tessera import AsyncClient, Client, load_dataset
from tessera.pipeline.options import load_options

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARY, SERVICE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len([line for line in LIBRARY.splitlines() if line]) <= 12
    assert len([line for line in SERVICE.splitlines() if line]) <= 8


def calls(code: str, owner: str) -> list[ast.Call]:
    """Calls of the methods of a name."""
    return [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == owner
    ]


def test_the_clients_calls_in_the_readme_fit_the_client() -> None:
    found = calls(SERVICE, "tessera")
    assert len(found) >= 5
    for call in found:
        assert isinstance(call.func, ast.Attribute)
        for client in (Client, AsyncClient):
            signature = inspect.signature(getattr(client, call.func.attr))
            signature.bind(None, *call.args, **{word.arg: word.value for word in call.keywords if word.arg})


def test_the_descriptor_in_the_readme_is_valid(tmp_path: Path) -> None:
    (descriptor,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    path = tmp_path / "shop.toml"
    path.write_text(descriptor, encoding="utf-8")
    dataset = load_dataset(path)
    assert dataset.has_content
    assert load_options(dataset).quantizer == "residual-kmeans"


def named_folders(readme: str) -> set[str]:
    """Folders of the tree in the README."""
    (tree,) = re.findall(r"^```\n(features/.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE))


def test_the_tree_names_the_folders_that_there_are() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.partition("/")[0] for path in listed.splitlines() if "/" in path and not path.startswith(".")}
    assert named_folders(README) == folders


def test_links_lead_somewhere() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def figures(markdown: str) -> list[str]:
    """Cells of the table of measured figures, one row each."""
    section = markdown.partition("## Measured\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| (?!figure|--)(.*) \|$", section, flags=re.MULTILINE)


def strange_figures(markdown: str) -> list[str]:
    """Figures of the table that the page of benchmarks does not have."""
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    known = set(re.findall(r"[\d.]+\d", benchmarks))
    measured = [row.partition(" | ")[2] for row in figures(markdown)]
    return [figure for row in measured for figure in re.findall(r"\.\d{3}|\d+\.\d|\d{2,}", row) if figure not in known]


def test_the_figures_are_those_of_the_page_of_benchmarks() -> None:
    assert len(figures(README)) == 6
    assert strange_figures(README) == []


@pytest.mark.parametrize(("known", "changed"), [(".830", ".831"), ("9.3 times", "97.3 times")])
def test_a_figure_that_differs_is_found(known: str, changed: str) -> None:
    assert README.count(known) == 1
    assert strange_figures(README.replace(known, changed)) == [changed.removesuffix(" times")]


def test_a_folder_that_is_missing_is_found() -> None:
    shorter = re.sub(r"^serving/ .*\n", "", README, flags=re.MULTILINE)
    assert named_folders(shorter) == named_folders(README) - {"serving"}
