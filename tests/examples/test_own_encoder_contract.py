"""The example's encoder under the contract suite: import its tests, give it your own fixture."""

import importlib

import pytest

from features.content.encoder import Encoder
from tests.contract.test_encoder import (  # noqa: F401
    test_a_loaded_encoder_has_the_id_and_the_bits_of_the_saved_one,
    test_a_text_has_the_same_vector_alone_and_in_any_batch,
    test_an_encoder_whose_weights_are_not_those_of_its_id_is_refused,
    test_rows_are_of_unit_length_and_those_of_empty_texts_are_zero,
)


@pytest.fixture(scope="module")
def fitted() -> tuple[Encoder, float]:
    return importlib.import_module("own_encoder").RandomWords(dim=16, seed=0), 0.0
