"""Warnings of ids that miss their table: the id that was meant is named, with all that a screen does not show."""

import polars as pl
import pytest

from features.value.known_ids import few_known

KNOWN = ["i000", "0108775015", "café", "Blue"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["i009", "i000  "], "'i000  ' is not; 'i000' is in it, and they differ by spaces alone"),
        (["108775015"], "'108775015' is not; '0108775015' is in it, and they differ by leading zeros alone"),
        (["cafe\u0301"], r"'cafe\u0301' is not; 'caf\xe9' is in it, and they differ by the Unicode form of their"),
        (["\ufeffi000"], r"'\ufeffi000' is not; 'i000' is in it, and they differ by signs that are not shown alone"),
        (["BLUE"], "'BLUE' is not; 'Blue' is in it, and they differ by case alone"),
        (["BLUE "], "'BLUE ' is not; 'Blue' is in it; write ids alike"),
        (["other", "x"], "'other' is not; 'i000' is in it; write ids alike"),
    ],
)
def test_an_id_is_shown_beside_the_one_that_was_meant(ids: list[str], said: str) -> None:
    (warning,) = few_known(pl.DataFrame({"item_id": ids}), pl.DataFrame({"item_id": KNOWN}), "item")
    assert "only 0.0% of the events name an item that is in the catalogue" in warning
    assert said in warning


def test_nothing_is_said_if_half_of_the_events_meet_their_table() -> None:
    table = pl.DataFrame({"user_id": KNOWN})
    assert few_known(pl.DataFrame({"user_id": ["i000", "x"]}), table, "user") == []
    assert few_known(pl.DataFrame({"user_id": ["x"]}), None, "user") == []
    (warning,) = few_known(pl.DataFrame({"user_id": ["x"]}), table.clear(), "user")
    assert warning.endswith("'x' is not; write ids alike in all files")
