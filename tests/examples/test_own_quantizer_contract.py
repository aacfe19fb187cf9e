"""The example's quantizer under the contract suite: import its tests, give it your own fixture."""

import importlib

import pytest

from models.semantic_id.codebook import kinds
from models.semantic_id.codebook.quantizer import Quantizer
from tests.contract.test_quantizer import (  # noqa: F401
    CODES,
    FITTED,
    LEVELS,
    test_a_loaded_codebook_has_the_id_and_the_codes_of_the_saved_one,
    test_codes_have_the_stated_shape_type_and_range,
    test_decoded_codes_are_nearer_to_their_vector_than_the_mean_is,
    test_the_codes_of_a_vector_depend_on_the_vector_alone,
    test_values_that_are_not_finite_are_refused_with_their_row,
)


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    name = importlib.import_module("own_quantizer").NAME
    return kinds.fit(name, FITTED, levels=LEVELS, codes=CODES, seed=3)
