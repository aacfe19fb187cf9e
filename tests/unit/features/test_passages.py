"""Sentences and passages hold every word of a text once, in order."""

import pytest

from features.content.passages import passages, sentences

TEXT = 'Dr. No lives. He said "I will not go home!" Then he left, at 3.5 miles an hour. Fine.\nA new line begins here.'


def test_a_sentence_ends_at_its_mark_and_a_short_one_joins_the_one_before() -> None:
    assert sentences(TEXT) == [
        "Dr. No lives.",
        'He said "I will not go home!"',
        "Then he left, at 3.5 miles an hour. Fine.",
        "A new line begins here.",
    ]
    assert sentences("我看了电影。他没有看。") == ["我看了电影。 他没有看。"]
    assert sentences("") == sentences(" \n ") == []


@pytest.mark.parametrize("words", [1, 3, 5, 100])
def test_passages_hold_every_word_in_order_and_keep_to_their_length(words: int) -> None:
    found = passages(TEXT, words)
    assert " ".join(found).split() == TEXT.split()
    assert max(len(passage.split()) for passage in found) <= words
    # A longer sentence begins a passage of its own, so no two neighbours would fit into one.
    assert len(found) == 1 or words < len(TEXT.split())
