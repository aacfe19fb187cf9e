"""The words of the house: docstrings open with a verb or noun, and texts avoid phrases that the glossary replaces."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("features", "models", "streaming", "serving", "tessera", "tests", "examples", "docs", "infra")
SUFFIXES = {".py", ".md", ".html", ".css", ".js", ".lua", ".sh", ".toml", ".yaml", ".yml"}
# Frozen bytes and real files hold the words of others; the glossary and this test name the phrases.
SKIPPED = ("tests/golden/", "tests/realfiles/", "docs/glossary.md", "tests/unit/house/")
OPENING = re.compile(r"(What|Which|How|Where|Who|Whose|Whom|Whether|Of|All that)\b")
MOST_OPENINGS = 0.02
# Method of the runbook's tests, after the label of a block in it.
IDENTIFIERS = re.compile(r"\bmends\\?\(")


@cache
def texts() -> dict[str, str]:
    """Returns the sources and documents of the repository by their relative path."""
    paths = [
        path
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.suffix in SUFFIXES and not set(path.parts) & {".run", "node_modules"}
    ]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    named = {path.relative_to(ROOT).as_posix(): path for path in sorted(paths)}
    return {name: path.read_text() for name, path in named.items() if not name.startswith(SKIPPED)}


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def opened_wrongly(source: str) -> tuple[list[int], int]:
    """Returns the lines of docstrings that open with a question word, and the number of all docstrings."""
    found = list(docstrings(source))
    return [line for line, text in found if OPENING.match(text)], len(found)


def replaced_phrases() -> list[str]:
    """Returns the phrases in backticks of the glossary's last column."""
    rows = (ROOT / "docs" / "glossary.md").read_text().split("| say | not |")[1].splitlines()
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row.rsplit("|", 2)[-2] if "|" in row else "")]


def phrases_in(text: str, phrases: list[str]) -> list[str]:
    """Returns each occurrence of a replaced phrase as "LINE: PHRASE"."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
    lines = IDENTIFIERS.sub("", text).splitlines()
    return [f"{number}: {match[0]}" for number, line in enumerate(lines, 1) for match in pattern.finditer(line)]


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    wrong, total = [], 0
    for name, text in texts().items():
        if name.endswith(".py"):
            lines, count = opened_wrongly(text)
            wrong += [f"{name}:{line}" for line in lines]
            total += count
    assert total > 1_000
    assert len(wrong) <= MOST_OPENINGS * total, wrong


def test_no_text_holds_a_phrase_that_the_glossary_replaces() -> None:
    phrases = replaced_phrases()
    assert len(phrases) > 10
    found = {name: hits for name, text in texts().items() if (hits := phrases_in(text, phrases))}
    assert not found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('"""What a module is."""', [1]),
        ('"""Reads a file."""\n\ndef f():\n    """Whether it is."""', [4]),
        ('"""Whatever. Offers more."""', []),
    ],
)
def test_a_planted_opening_is_found(source: str, lines: list[int]) -> None:
    assert opened_wrongly(source)[0] == lines


def test_a_planted_phrase_is_found() -> None:
    said = 'raise Error("Mend the file;\nencode it anew")\nplace.mends("x")\npath.amended()'
    assert phrases_in(said, replaced_phrases()) == ["1: Mend", "2: anew"]


def test_codespell_finds_no_misspelt_word() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--quiet-level=3", *texts()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
