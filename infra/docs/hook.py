"""Prepares the pages for MkDocs: navigation of the decisions, links into the repository, and generated parts.

MkDocs calls the functions by their names. A page asks for a generated part by the line `<!-- generated: NAME -->`.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^( *)(```+|~~~+)([\w-]*)(.*)$")
_ITEM = re.compile(r"^ *([-*]|\d+\.) ")
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)")
_GENERATED = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_COPIED = "repository"
# Pages whose source stands at the top of the repository; the README's place is taken by the start page.
_TOP_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_SITE_PAGES = {"README.md": "index.md", **_TOP_PAGES}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages that match a pattern of the navigation, and lets the generated parts import the code."""
    sys.path.insert(0, str(ROOT))
    config.nav = [_listed(entry, Path(config.docs_dir)) for entry in config.nav or []]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the repository's files to which pages link, so that the links work in the site."""
    for path in sorted(_linked(Path(config.docs_dir))):
        files.append(File.generated(config, f"{_COPIED}/{path}", content=(ROOT / path).read_bytes()))
    for path, page in _TOP_PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translates GitHub's Markdown to Python-Markdown's and writes the generated parts."""
    return _generated(_outside_links(plain(markdown), page.file.src_uri))


def _listed(entry: Any, docs: Path) -> Any:
    """Replaces a pattern in the navigation (`adr/*.md`) by the pages that match."""
    if not isinstance(entry, dict):
        return entry
    ((title, target),) = entry.items()
    if isinstance(target, list):
        return {title: [_listed(each, docs) for each in target]}
    if "*" not in target:
        return entry
    return {title: [path.relative_to(docs).as_posix() for path in sorted(docs.glob(target))]}


def _linked(docs: Path) -> set[str]:
    """Paths in the repository, outside the docs folder, to which pages link."""
    found = set()
    for page in docs.rglob("*.md"):
        for match in _LINK.finditer(page.read_text(encoding="utf-8")):
            path = (page.parent / match[2]).resolve()
            if path.is_file() and not path.is_relative_to(docs):
                found.add(path.relative_to(ROOT).as_posix())
    return found - set(_SITE_PAGES)


def _outside_links(markdown: str, page: str) -> str:
    """Links to the repository's files lead to the copies in the site."""

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[2]))
        if path.startswith("docs/"):
            return match[0]
        up = "../" * page.count("/")
        return match[1] + up + _SITE_PAGES.get(path, f"{_COPIED}/{path}")

    return _LINK.sub(moved, markdown)


def plain(markdown: str) -> str:
    """Fences without test instructions (`sh fails`), and a blank line before each list that interrupts a paragraph."""
    lines: list[str] = []
    fence = ""
    for line in markdown.split("\n"):
        match = _FENCE.match(line)
        if fence:
            if match and match[2].startswith(fence) and not match[3]:
                fence = ""
        elif match:
            fence = match[2]
            line = match[1] + match[2] + match[3]
        elif _ITEM.match(line) and lines and lines[-1].strip() and not _in_list(lines):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _in_list(lines: list[str]) -> bool:
    """Returns whether the last paragraph began as a list item."""
    for line in reversed(lines):
        if _ITEM.match(line):
            return True
        if not line.strip() or not line.startswith(" "):
            return False
    return False


def _generated(markdown: str) -> str:
    def part(match: re.Match[str]) -> str:
        from infra.docs.reference import PARTS

        if match[1] not in PARTS:
            raise PluginError(f"no generated part named {match[1]!r}; there are: {', '.join(PARTS)}")
        return PARTS[match[1]]()

    return _GENERATED.sub(part, markdown)
