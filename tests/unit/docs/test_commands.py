"""Every command that README, CONTRIBUTING and the pages show exists, with the options that are shown."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from infra.docs.reference.command_line import options, walk
from tessera.cli.bench import NAMES
from tessera.cli.main import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(?:sh|bash)?(?: \w+)?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z_…]+|\[[A-Z_]+\]")
# Of other programs.
FOREIGN = {"--strict", "--quiet", "--direct_num_workers"}
ENDS = re.compile(r"[|&;<>]|\d?>+.*|\)")


def shown(markdown: str) -> Iterator[str]:
    """Yields the commands in blocks and in the text, without `tessera` itself."""
    for block in BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").split("\n"):
            yield from re.findall(r"(?:^|[=(]|\S=\S+ |&& |; )(?:\.venv/bin/)?tessera ([^#\n]+)", line)
    for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", markdown)):
        yield from re.findall(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?tessera (.+)", code)


def refused(line: str) -> str:
    """Says what does not exist of a command; "" if all of it does."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        if ENDS.fullmatch(word):
            words = words[:place]
            break
    command: Any = typer.main.get_command(app)
    known = {"--help"}
    while words and hasattr(command, "list_commands"):
        known |= {option for parameter in command.params for option in parameter.opts}
        if words[0].startswith("-"):
            if words.pop(0) not in known:
                return f"no option {words[0]}"
            continue
        if PLACEHOLDER.fullmatch(words[0]):
            return ""
        found = command.get_command(typer.Context(command), words[0])
        if found is None:
            return f"no command {words[0]}"
        command = found
        words.pop(0)
    known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"no option {word}"
    if command.name == "bench" and words and words[0] not in NAMES and not PLACEHOLDER.fullmatch(words[0]):
        return f"no benchmark {words[0]}"
    return ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_shows_only_commands_and_options_that_exist(path: Path) -> None:
    found = [f"tessera {line}: {why}" for line in shown(path.read_text(encoding="utf-8")) if (why := refused(line))]
    assert found == []


def bare_options(markdown: str) -> set[str]:
    """Options that the text names without their command, such as `--share`."""
    codes = re.findall(r"`(--[a-z][\w-]*)[^`\n]*`", FENCED.sub("", markdown))
    return set(codes) - FOREIGN


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent.name != "adr"], ids=lambda path: path.stem)
def test_an_option_that_is_named_alone_belongs_to_some_command(path: Path) -> None:
    known = {name for _, command in walk() for one in options(command) for name in (*one.opts, *one.secondary_opts)}
    assert sorted(bare_options(path.read_text(encoding="utf-8")) - known - {"--verbose", "--help"}) == []


def test_the_pages_show_most_of_the_commands() -> None:
    lines = [line for path in PAGES for line in shown(path.read_text(encoding="utf-8"))]
    assert len(lines) > 100
    assert {"run", "serve", "stream", "rollout"} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize(
    ("markdown", "why"),
    [
        ("```\ntessera rnu shop.toml\n```\n", "no command rnu"),
        ("```sh fails\ntessera run shop.toml --sede 3 2> log &\n```\n", "no option --sede"),
        ("Use `tessera rollout stat`.", "no command stat"),
        ("```\nTESSERA_HOME=x .venv/bin/tessera bench sped\n```\n", "no benchmark sped"),
    ],
)
def test_a_command_that_does_not_exist_is_found(markdown: str, why: str) -> None:
    (line,) = shown(markdown)
    assert refused(line) == why


def test_an_option_that_is_named_alone_is_found() -> None:
    assert bare_options("Give it `--shrae .1`.\n```\n--in-a-block\n```\n") == {"--shrae"}
