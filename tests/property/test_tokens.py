"""Laws of tokens: no span shares one with another, none is lost, and a saved tokenizer gives the same ones."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.tokens import (
    DESCRIPTION,
    SCHEMES,
    Scheme,
    Tokenizer,
    fit_tokenizer,
    load_tokenizer,
    prefix_numbers,
)

LEVELS, CODES = 3, 8


def codes_of(count: int, *, levels: int = LEVELS, codes: int = CODES, seed: int = 0) -> NDArray[np.uint16]:
    """Codes of a catalogue: deep ones depend on the first, as a residual quantizer's do."""
    rng = np.random.default_rng(seed)
    first = np.minimum(rng.zipf(1.5, count) - 1, codes - 1)
    deeper = [(first * 3 + rng.integers(0, 2, count) + level) % codes for level in range(1, levels)]
    return np.stack([first, *deeper], axis=1).astype(np.uint16)


ITEMS = codes_of(400)
SHOWN = np.random.default_rng(1).integers(0, 30, len(ITEMS))


def tokenizer(scheme: Scheme) -> Tokenizer:
    return fit_tokenizer(scheme, LEVELS, CODES, ITEMS, SHOWN)


@st.composite
def codebook_codes(draw: st.DrawFn) -> tuple[int, NDArray[np.uint16]]:
    levels, codes = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 3, 256, 2048]))
    rows = draw(st.lists(st.lists(st.integers(0, codes - 1), min_size=levels, max_size=levels), min_size=1, max_size=6))
    return codes, np.array(rows, dtype=np.uint16)


@given(codebook_codes())
def test_horners_rule_gives_the_closed_form_on_python_integers(drawn: tuple[int, NDArray[np.uint16]]) -> None:
    per_level, codes = drawn
    expected = [
        [
            sum(per_level ** (depth - at) * (code + 1) for at, code in enumerate(row[: depth + 1])) - 1
            for depth in range(len(row))
        ]
        for row in codes.tolist()
    ]
    assert prefix_numbers(codes, per_level).tolist() == expected


def test_numbers_of_all_prefixes_of_all_depths_differ() -> None:
    every = np.array(np.meshgrid(*[range(4)] * 3)).reshape(3, -1).T.astype(np.uint16)
    numbers = prefix_numbers(every, 4)
    assert sorted(set(numbers.ravel().tolist())) == list(range(4 + 16 + 64))


@given(codebook_codes())
def test_prefixes_are_equal_where_their_numbers_are(drawn: tuple[int, NDArray[np.uint16]]) -> None:
    per_level, codes = drawn
    tokens = [token for row in Tokenizer("prefix", codes.shape[1], max(per_level, 1)).tokens(codes) for token in row]
    numbers = prefix_numbers(codes, per_level).ravel().tolist()
    assert len(set(zip(tokens, numbers, strict=True))) == len(set(tokens)) == len(set(numbers))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tokens_of_an_item_do_not_depend_on_the_others(scheme: Scheme) -> None:
    made = tokenizer(scheme)
    whole = made.tokens(ITEMS)
    assert [made.tokens(ITEMS[row : row + 1])[0] for row in range(0, 400, 37)] == whole[::37]
    assert len({tuple(row) for row in whole}) == len(np.unique(ITEMS, axis=0))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme not in ("prefix", "all-bigrams")])
@given(st.lists(st.integers(0, CODES - 1), min_size=LEVELS, max_size=LEVELS))
@settings(max_examples=40, deadline=None)
def test_spans_side_by_side_spell_the_whole_code(scheme: Scheme, row: list[int]) -> None:
    # Of any code, also one that no item of the catalogue has: nothing is split or normalised away.
    (found,) = tokenizer(scheme).tokens(np.array([row], dtype=np.uint16))
    spelt: list[int] = []
    for token in found:
        start, _, codes = token.partition(":")
        assert int(start) == len(spelt) + 1
        spelt += [int(code) for code in codes.split(".")]
    assert spelt == row


def test_every_scheme_has_the_tokens_that_it_is_described_by() -> None:
    code = np.array([[5, 1, 3]], dtype=np.uint16)
    assert tokenizer("prefix").tokens(code) == [["5", "5.1", "5.1.3"]]
    assert tokenizer("unigram").tokens(code) == [["1:5", "2:1", "3:3"]]
    assert tokenizer("bigram").tokens(code) == [["1:5.1", "3:3"]]
    assert tokenizer("all-bigrams").tokens(code) == [["1:5.1", "2:1.3"]]


def test_pieces_join_what_often_stands_together_within_their_budget() -> None:
    common = np.array([[1, 2, 3]] * 50 + [[4, 5, 6]] * 50, dtype=np.uint16)
    made = fit_tokenizer("pieces", LEVELS, CODES, np.concatenate([common, ITEMS]), np.full(500, 9), pieces=40)
    assert len(made.tokens(common[:1])[0]) < LEVELS
    assert len({token for row in made.tokens(np.concatenate([common, ITEMS])) for token in row}) <= 40


def test_pieces_learn_from_what_was_shown() -> None:
    rare, common = np.array([[1, 2, 3]], dtype=np.uint16), np.array([[4, 5, 6]], dtype=np.uint16)
    items = np.concatenate([rare, common, ITEMS])
    other = SHOWN.tolist()
    first = fit_tokenizer("pieces", LEVELS, CODES, items, np.array([1, 9_000, *other]), pieces=30)
    second = fit_tokenizer("pieces", LEVELS, CODES, items, np.array([9_000, 1, *other]), pieces=30)
    assert len(first.tokens(common)[0]) < len(second.tokens(common)[0])
    assert len(second.tokens(rare)[0]) < len(first.tokens(rare)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_tokenizer_gives_the_same_tokens_and_is_known_by_its_id(scheme: Scheme) -> None:
    made = tokenizer(scheme)
    with TemporaryDirectory() as directory:
        made.save(Path(directory))
        again = load_tokenizer(Path(directory))
    assert again.id == made.id == tokenizer(scheme).id
    assert again.tokens(ITEMS) == made.tokens(ITEMS)


def test_what_is_cut_short_or_altered_is_refused(tmp_path: Path) -> None:
    tokenizer("pieces").save(tmp_path)
    path = tmp_path / "tokens.model"
    data = path.read_bytes()
    for spoilt in (data[:-1], b""):
        path.write_bytes(spoilt)
        with pytest.raises(BundleError, match=r"tokens\.json: the tokens are pieces-.*expected pieces-"):
            load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(BundleError, match="does not describe tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / DESCRIPTION).write_text("[")
    with pytest.raises(BundleError, match="does not describe tokens"):
        load_tokenizer(tmp_path)


def test_what_cannot_become_tokens_is_refused_with_the_remedy() -> None:
    with pytest.raises(DatasetError, match=r"expected \(N, 3\) below 8.*up to 8; encode"):
        tokenizer("unigram").tokens(np.array([[0, 0, 8]], dtype=np.uint16))
    with pytest.raises(DatasetError, match=r"got \(1, 2\)"):
        tokenizer("prefix").tokens(np.zeros((1, 2), dtype=np.uint16))
    with pytest.raises(DatasetError, match="'words' is unknown; there are: prefix"):
        fit_tokenizer("words", LEVELS, CODES, ITEMS, SHOWN)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"26 pieces have no room.*give 27 at least"):
        fit_tokenizer("pieces", LEVELS, CODES, ITEMS, SHOWN, pieces=26)
    with pytest.raises(DatasetError, match="no item with codes was shown"):
        fit_tokenizer("pieces", LEVELS, CODES, ITEMS, np.zeros_like(SHOWN))
    with pytest.raises(DatasetError, match="65532 codes in all levels at most"):
        fit_tokenizer("pieces", 40, 2048, np.zeros((1, 40), dtype=np.uint16), np.ones(1, dtype=np.int64))


def test_no_items_have_no_tokens() -> None:
    for scheme in SCHEMES:
        assert tokenizer(scheme).tokens(np.zeros((0, LEVELS), dtype=np.uint16)) == []
