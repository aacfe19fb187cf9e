"""Markdown of tables and of text that is not Markdown."""

import html
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; cells are Markdown."""
    lines = [head, ["--"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') or ' ' for cell in line)} |" for line in lines)


def text(plain: object) -> str:
    """Escapes text for a cell; pairs of backticks stay code."""
    pieces = str(plain).split("`")
    for place in range(0, len(pieces), 2):
        escaped = html.escape(pieces[place], quote=False)
        for sign in "*_[]":
            escaped = escaped.replace(sign, f"\\{sign}")
        pieces[place] = escaped
    return "`".join(pieces).replace("|", "\\|")


def code(plain: object) -> str:
    """Returns text as code for a cell; a pipe would end the cell, and an escaped pipe keeps its backslash in code."""
    if "|" not in str(plain):
        return f"`{plain}`"
    return f"<code>{html.escape(str(plain), quote=False).replace('|', '&#124;')}</code>"
