"""Building blocks of the reports: text in, escaped HTML out.

Only `content` and `drawing` are HTML already. Every other argument is text and is escaped, so no title adds markup.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page whose body is HTML, in UTF-8 and in the style of all pages, and the directories above it."""
    style = resources.files("tessera.pages").joinpath("report.css").read_text(encoding="utf-8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def section(heading: str, *content: str) -> str:
    """Returns content, already HTML, under a heading."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>"


def cards(*content: str) -> str:
    """Returns cards side by side, if there is room."""
    return '<div class="cards">\n' + "\n".join(content) + "\n</div>"


def card(heading: str, content: str) -> str:
    """Returns a box with a heading."""
    return f'<div class="card"><h3>{escape(heading)}</h3>{content}</div>'


def figure(heading: str, drawing: str, caption: str) -> str:
    """Returns a plot and one sentence that explains it."""
    return (
        f'<figure class="card"><h3>{escape(heading)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption></figure>'
    )


def caption(text: str) -> str:
    """Returns a small remark."""
    return f'<p class="about">{escape(text)}</p>'


def none(text: str) -> str:
    """Returns a note that something is missing."""
    return f'<p class="none">{escape(text)}</p>'


def table(columns: Sequence[str], body: Iterable[Sequence[str]], *, strong: str = "") -> str:
    """Returns a table. Columns named with > hold numbers; a row of one cell is a heading; `strong` marks rows."""
    kinds = [' class="number"' if name.startswith(">") else "" for name in columns]
    names = [escape(name.removeprefix(">")) for name in columns]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, kinds, strict=True))
    lines = []
    for row in body:
        if len(row) == 1:
            lines.append(f'<tr><th colspan="{len(columns)}">{escape(row[0])}</th></tr>')
        else:
            cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
            lines.append(f'<tr class="strong">{cells}</tr>' if row[0] == strong else f"<tr>{cells}</tr>")
    header = f"<thead><tr>{head}</tr></thead>" if any(names) else ""
    return f"<table>{header}<tbody>{''.join(lines)}</tbody></table>"


def ranked(items: Sequence[tuple[str, str, float]], marked: str) -> str:
    """Lists (id, title, score), best first, with the item `marked` highlighted."""
    lines = []
    for id_, title, score in items:
        kind = ' class="strong"' if id_ == marked else ""
        lines.append(f"<li{kind}>{escape(title)} <small>{escape(id_)} · {score:.4f}</small></li>")
    return f"<ol>{''.join(lines)}</ol>"
