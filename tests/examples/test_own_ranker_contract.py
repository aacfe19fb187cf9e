"""The example's network under the contract suite: import its tests, and give them your own kind."""

import pytest

from tests.contract.test_network import (  # noqa: F401
    test_an_example_has_one_logit_that_depends_on_no_other_example,
    test_every_input_and_every_parameter_has_a_gradient,
    test_it_learns_a_task_and_its_opposite,
    test_it_learns_what_a_pair_of_fields_says,
    test_several_tasks_have_a_logit_each,
    test_the_seed_decides_the_weights,
)


@pytest.fixture
def kind() -> str:
    return "own_ranker:GatedProducts"
