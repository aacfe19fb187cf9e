"""The docs site builds without a warning, and a browser needs no other server to show it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infra.docs.docstrings import split_names
from infra.docs.hook import plain

ROOT = Path(__file__).parents[3]
# Elements that a browser fetches by itself; a link is fetched only when a reader follows it.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "form": "action"}
FETCHED_BY_CSS = re.compile(r"(?:@import\s+|url\()[\"']?(?:https?:)?//")


class Assets(HTMLParser):
    """Collects the addresses that a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in {"canonical", "next", "prev"}:
            return
        if tag in FETCHED:
            self.addresses.append(values.get(FETCHED[tag]) or "")


def external_assets(html: str) -> list[str]:
    """Addresses on other servers that a browser fetches for this page."""
    parser = Assets()
    parser.feed(html)
    return [address for address in parser.addresses if re.match(r"(https?:)?//", address)]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Builds a site as `make docs` does; with `--quiet` MkDocs would not count its warnings."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_other_server(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    fetched = {str(page): external_assets(page.read_text(encoding="utf-8")) for page in pages}
    assert {page: addresses for page, addresses in fetched.items() if addresses} == {}
    styles = [path for path in tmp_path.rglob("*.css") if FETCHED_BY_CSS.search(path.read_text(encoding="utf-8"))]
    assert styles == []
    # Lists and tables that Markdown does not recognise stay text.
    text = {page: re.sub(r"<pre.*?</pre>|<code>.*?</code>", "", page.read_text(), flags=re.DOTALL) for page in pages}
    assert [page for page, html in text.items() if re.search(r"<p>\s*\||\n\s*[-*] \w|\|--", html)] == []


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("[lost](nowhere.md)", "'nowhere.md', but the target is not found"),
        ("[lost](index.md#nowhere)", "no such anchor"),
        ("<!-- generated: nothing -->", "no generated part named 'nothing'"),
    ],
)
def test_a_link_or_a_part_that_leads_nowhere_fails_the_build(page: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{page}\n", encoding="utf-8")
    config = f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: [{ROOT / 'infra/docs/hook.py'}]\nplugins: [search]\n"
    config += "docs_dir: docs\nextra_css: []\nextra: {polyfills: []}\nnav: [index.md]\n"
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert fault in done.stdout + done.stderr


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="" src="http://example/x.png">',
    ],
)
def test_an_asset_of_another_server_is_found(html: str) -> None:
    assert external_assets(html)
    assert not external_assets(html.replace("https:", "").replace("http:", "").replace("//", "assets/"))


def test_a_list_that_interrupts_a_paragraph_gets_its_blank_line() -> None:
    assert plain("Decisions\n- one\n  more\n- two\n") == "Decisions\n\n- one\n  more\n- two\n"


def test_fences_lose_the_instructions_of_the_guides_and_keep_their_text() -> None:
    assert plain("```sh fails\nfalse\n- no list\n```\n```text exact\n1\n```") == (
        "```sh\nfalse\n- no list\n```\n```text\n1\n```"
    )


def test_an_entry_that_names_several_attributes_becomes_one_entry_each() -> None:
    told = "Attributes:\n    title, detail: What is wrong,\n        and why.\n    field: The place."
    assert split_names(told) == (
        "Attributes:\n    title: What is wrong,\n        and why.\n    detail: What is wrong,\n        and why.\n"
        "    field: The place."
    )
