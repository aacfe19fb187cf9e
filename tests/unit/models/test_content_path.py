"""One way from text to tokens: what `encode_items` makes is what the published items hold."""

import numpy as np
import polars as pl
import pytest

from models.bundle.bundle import Bundle, write_bundle
from models.semantic_id.content_path import ContentPath
from models.table.schema import SEMANTIC_ID
from tests.build import coloured_parts, coloured_tables


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("content")
    return write_bundle(coloured_parts(directory, epochs=0), directory / "bundle")


def test_encoded_items_equal_the_published_ones_bit_for_bit(bundle: Bundle) -> None:
    texts = coloured_tables()["items"]["text"].to_list()

    vectors, codes, tokens = bundle.encode_items(texts)

    np.testing.assert_array_equal(vectors, bundle.items["content_vector"].to_numpy())
    np.testing.assert_array_equal(codes, bundle.items["semantic_codes"].to_numpy())
    assert tokens == bundle.items[SEMANTIC_ID].to_list()


def test_a_batch_equals_one_by_one(bundle: Bundle) -> None:
    texts = coloured_tables()["items"]["text"].to_list()[:5]
    whole = bundle.encode_items(texts)

    for row, text in enumerate(texts):
        own = bundle.encode_items([text])
        np.testing.assert_array_equal(own.codes[0], whole.codes[row])
        assert own.tokens[0] == whole.tokens[row]


def test_without_content_the_widths_are_zero_and_nothing_has_tokens() -> None:
    vectors, codes, tokens = ContentPath(None, None).encode(["a", "b"])

    assert (vectors.shape, codes.shape, tokens) == ((2, 0), (2, 0), [[], []])
    assert (vectors.dtype, codes.dtype) == (np.float32, np.uint16)


def test_no_text_gives_no_row(bundle: Bundle) -> None:
    vectors, codes, tokens = bundle.encode_items([])

    assert (len(vectors), len(codes), tokens) == (0, 0, [])


def test_a_column_of_tokens_is_null_where_the_codes_are(bundle: Bundle) -> None:
    codes = bundle.items["semantic_codes"].head(3)
    some = pl.Series([codes[0], None, codes[2]], dtype=codes.dtype)
    tokenizer = bundle.tokenizer
    assert tokenizer is not None

    found = tokenizer.column(some).to_list()

    assert found == [bundle.items[SEMANTIC_ID][0].to_list(), None, bundle.items[SEMANTIC_ID][2].to_list()]
    assert tokenizer.column(some.clear()).to_list() == []
