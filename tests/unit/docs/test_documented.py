"""Everything that a user can type, set, read or import is documented."""

import ast
import inspect
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from features.dataset.descriptor import Dataset
from features.value.filter import Filter
from infra.docs.reference import PARTS, command_line, configuration, library, markdown, metrics
from serving.metrics import Metrics
from serving.skew.metrics import SkewMetrics
from streaming.metrics import StreamMetrics
from tessera.cli.bench import NAMES
from tessera.pipeline.options import known_choices

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
COMMANDS = dict(command_line.walk())
VARIABLE = re.compile(r"(TESSERA|MLFLOW|OTEL)(_[A-Z]+)+_?")


def page(name: str) -> str:
    """The source of a page of the site."""
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_generated_part_has_a_place_on_a_page_and_the_pages_ask_for_no_other() -> None:
    asked = [
        name
        for path in DOCS.rglob("*.md")
        for name in re.findall(r"^<!-- generated: (\S+) -->$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert sorted(asked) == sorted(PARTS)


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_its_arguments_and_its_options_say_what_they_are_for(path: str) -> None:
    assert undocumented_parameters(COMMANDS[path]) == []
    section = command_line.commands().partition(f"## {path}\n")[2].partition("\n## ")[0]
    missing = [name for one in command_line.options(COMMANDS[path]) for name in one.opts if f"`{name}`" not in section]
    assert missing == []


def undocumented_parameters(command: Any) -> list[str]:
    """Names of the command, its arguments and its options that have no help."""
    parameters = [*command_line.arguments(command), *command_line.options(command)]
    return [one.name for one in (command, *parameters) if not (one.help or "").strip()]


def variables(source: str) -> set[str]:
    """Names of environment variables that a module's texts hold."""
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and VARIABLE.fullmatch(text)}


def test_every_setting_is_on_the_page_of_settings() -> None:
    modules = [
        path for package in ("serving", "streaming", "models", "tessera") for path in (ROOT / package).rglob("*")
    ]
    read = set().union(*(variables(path.read_text(encoding="utf-8")) for path in modules if path.suffix == ".py"))
    assert {"TESSERA_HOME", "MLFLOW_TRACKING_URI"} <= read
    documented = page("reference/settings.md")
    assert sorted(name for name in read if f"`{name}" not in documented) == []


def test_every_extra_is_on_the_page_of_installation() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    parts = {"model", "online", "fit", "dev"}
    assert parts < extras
    documented = page("start/install.md")
    assert sorted(name for name in extras - parts if f"`tessera[{name}]`" not in documented) == []


def tables(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The class and all classes of tables inside it."""
    yield kind
    for field in kind.model_fields.values():
        for inner in _classes(field.annotation):
            yield from tables(inner)


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    # A filter is a value, with a language of its own, and holds filters.
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Filter:
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _classes(inner)


def test_every_table_of_the_descriptor_has_a_section_and_every_key_a_meaning() -> None:
    assert set(tables(Dataset)) <= {kind for _, kind, _ in configuration.SECTIONS}
    assert [key for _, kind, base in configuration.SECTIONS for key in keys_without_meaning(kind, base)] == []


def test_every_choice_of_a_run_has_a_meaning_on_the_page() -> None:
    table = configuration.run_table()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == len(known_choices())
    assert [row[0] for row in rows if not row[3].strip(" |")] == []


def keys_without_meaning(kind: type, base: type | None = None) -> list[str]:
    """Keys that the docstring of their class does not explain."""
    told = configuration.meanings(kind)
    return [f"{kind.__name__}.{key}" for key in configuration.keys(kind, base) if not told.get(key)]


@pytest.mark.parametrize(
    ("registry", "part"),
    [
        (Metrics().registry, metrics.serving),
        (StreamMetrics().registry, metrics.stream),
        (SkewMetrics().registry, metrics.skew),
    ],
)
def test_every_metric_says_what_it_counts(registry: CollectorRegistry, part: Any) -> None:
    found = metrics.collected(registry)
    assert len(found) > 3
    assert [name for name, _, _, about in found if not about.strip()] == []
    # A page of metrics has no family that the reference lacks.
    exposed = {family.name for family in registry.collect()}
    assert [name for name in exposed if f"`{name}`" not in part() and f"`{name}_total`" not in part()] == []


def undocumented_names(found: Any) -> list[str]:
    """The name, and its parameters, if the docstring lacks them."""
    told = inspect.getdoc(found) or ""
    if not told:
        return [found.__name__]
    if not inspect.isfunction(found):
        return []
    return [f"{found.__name__}({name})" for name in inspect.signature(found).parameters if f"{name}:" not in told]


def test_every_public_name_is_in_the_python_reference_with_its_parameters() -> None:
    import tessera

    public = dict(library.public())
    assert set(public) == {name for name in tessera.__all__ if not name.startswith("__")}
    assert [told for name in public for told in undocumented_names(getattr(tessera, name))] == []
    assert [name for name in public if f"heading: tessera.{name}\n" not in library.names()] == []


def test_every_benchmark_has_a_section_with_its_command() -> None:
    text = page("benchmarks.md")
    missing = [name for name in NAMES if f"\n### {name}\n" not in text or f"\ntessera bench {name}" not in text]
    assert missing == []


def test_cells_keep_pipes_and_signs_of_markdown() -> None:
    assert markdown.code("a | b") == "<code>a &#124; b</code>"
    assert markdown.text("one_two | `a_b` <c>") == r"one\_two \| `a_b` &lt;c&gt;"
    assert markdown.table(["x"], [["1\n2"]]) == "| x |\n| -- |\n| 1 2 |"


def test_what_is_undocumented_is_found() -> None:
    class Table(BaseModel):
        """A table.

        Attributes:
            known, other: Two keys
                with one meaning.
        """

        known: int
        other: int
        forgotten: int

    def public(given: int, forgotten: int) -> None:
        """Does.

        Args:
            given: A number.
        """

    class Silent:
        name, help = "silent", " "
        params = ()

    assert configuration.meanings(Table) == dict.fromkeys(("known", "other"), "Two keys with one meaning.")
    assert keys_without_meaning(Table) == ["Table.forgotten"]
    assert undocumented_names(public) == ["public(forgotten)"]
    assert undocumented_parameters(Silent) == ["silent"]
    assert variables('environment.get("TESSERA_NEW", "")') == {"TESSERA_NEW"}
