"""Ids of events that their table lacks, and the id of the table that a person takes for the same.

Files that several systems wrote often differ in spaces, case, leading zeros, or in signs that no screen shows.
"""

from typing import Final

import polars as pl

_UNSEEN: Final = r"[\p{Cf}\p{Cc}]"
# By what ids may differ, in the order in which a message names it.
_FOLDS: Final = {
    "by spaces": lambda text: text.str.strip_chars(),
    "by signs that are not shown": lambda text: text.str.replace_all(_UNSEEN, ""),
    "by the Unicode form of their letters": lambda text: text.str.normalize("NFKC"),
    "by case": lambda text: text.str.to_lowercase(),
    "by leading zeros": lambda text: text.str.strip_chars_start("0"),
}


def few_known(events: pl.DataFrame, table: pl.DataFrame | None, kind: str) -> list[str]:
    """Warns if under half of the events name an item or user that is in its table; returns the warning or nothing.

    Args:
        events: One row per event, with `item_id` or `user_id`.
        table: Catalogue or users table, with the same column; None if there is none.
        kind: item or user.
    """
    name = f"{kind}_id"
    if table is None or name not in events.columns or not events.height:
        return []
    unknown = events.join(table, on=name, how="anti", maintain_order="left")
    if 2 * unknown.height <= events.height:
        return []
    strange, known = alike(unknown[name], table[name]) or (unknown[name].first(), table[name].first())
    return few_known_counted(unknown.height, events.height, kind, strange=strange, known=known)


def few_known_counted(unknown: int, events: int, kind: str, *, strange: object, known: object) -> list[str]:
    """Returns the warning of `few_known` for a number of events, or nothing.

    Args:
        unknown: Events whose item or user is not in its table.
        events: All events.
        kind: item or user.
        strange: An id that is not in the table, the first or one that is alike to `known`.
        known: An id of the table; None without rows.
    """
    if 2 * unknown <= events:
        return []
    place = {"item": "the catalogue", "user": "the users table"}[kind]
    share = f"{100 * (1 - unknown / events):.1f}%"
    why = difference(str(strange), str(known)) if known is not None else ""
    example = f"; {_shown(known)} is in it" if known is not None else ""
    named = f"{'an' if kind == 'item' else 'a'} {kind} that is in {place}"
    return [
        f"only {share} of the events name {named}: {_shown(strange)} is not{example}"
        f"{f', and they differ {why} alone' if why else ''}; write ids alike in all files"
    ]


def alike(strange: pl.Series, known: pl.Series) -> tuple[str, str] | None:
    """Returns the first id of a column that is alike to an id of another column, and that id; None if there is none."""
    one, other = (pl.DataFrame({name: ids.unique(maintain_order=True)}) for name, ids in (("a", strange), ("b", known)))
    both = one.with_columns(_folded("a")).join(other.with_columns(_folded("b")), on="folded", maintain_order="left")
    return both.select("a", "b").row(0) if both.height else None


def difference(one: str, other: str) -> str:
    """Returns by what two ids differ, such as `by case`; "" if they differ by more than one of these."""
    texts = pl.DataFrame({"id": [one, other]})
    return next((why for why, fold in _FOLDS.items() if texts.select(fold(pl.col("id")))["id"].n_unique() == 1), "")


def _folded(name: str) -> pl.Expr:
    text = pl.col(name)
    for fold in _FOLDS.values():
        text = fold(text)
    return text.alias("folded")


def _shown(value: object) -> str:
    """Returns an id in quotes, with escapes for all that a screen may show like another sign."""
    text = str(value)
    plain = text.isascii() and text.isprintable()
    return f"'{text}'" if plain else ascii(text)
