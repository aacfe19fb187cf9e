"""What the README shows can be done: its Python parses, calls what there is, and its commands and options exist."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from serving.client import AsyncClient, Client
from tessera.cli.bench import NAMES
from tessera.cli.main import app

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^(?:\.venv/bin/)?tessera ([^#\n]*[^#\s])", README, flags=re.MULTILINE)))


def test_the_clients_calls_in_the_readme_fit_the_client() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    calls = [
        node
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "tessera"
    ]
    assert len(calls) >= 6
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        for client in (Client, AsyncClient):
            signature = inspect.signature(getattr(client, call.func.attr))
            signature.bind(None, *call.args, **{word.arg: word.value for word in call.keywords if word.arg})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_the_readme_exists_with_its_options(line: str) -> None:
    words = line.split()
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in words if word.startswith("--")} <= options, line
    if command.name == "bench":
        assert words[0] in NAMES


def test_every_benchmark_is_in_the_readme() -> None:
    named = set(re.findall(r"[`\w-]+", README))
    missing = [name for name in NAMES if name not in {word.strip("`") for word in named}]
    assert not missing
