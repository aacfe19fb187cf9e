"""Candidates of a request are read by columns: values and refusals are those of one by one, in less time."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from features.value import field as of_fields
from features.value.field import RequestField, served_columns, split_candidates
from serving.api.bodies import CandidateForm, RankRequest

FIELDS = {
    "price": RequestField(type="number", default=5.0),
    "badge": RequestField(type="category", default="none"),
    "words": RequestField(type="text"),
    "since": RequestField(type="time"),
}
texts = st.sampled_from(["", "a", "b c", "日本 🎬", "x" * 1_024, "x" * 1_025, "\ud800", "3"])
values = {
    "price": st.sampled_from([None, 1.5, 2.0, 7, True, float("nan"), float("inf"), "2", [1.0]]),
    "badge": st.none() | texts | st.sampled_from([3, 2.5, True, ["a", None], [["a"]]]),
    "words": st.none() | texts | st.just(4),
    "since": st.sampled_from([None, "2024-01-31", 1_700_000_000, "never"]),
}
ids = texts | st.sampled_from([7, 1.5, True, None, ["a"]])
usual_ids = st.sampled_from(["i1", "i2", "i3", "日本"])
fields = st.fixed_dictionaries({}, optional=values)
one_form = st.lists(st.builds(lambda name, own: {"item_id": name, **own}, usual_ids, fields), min_size=1, max_size=5)
any_form = st.lists(ids | st.builds(lambda name, own: {"item_id": name, **own}, ids, fields) | fields, max_size=5)


def outcome(work: Callable[[], Any]) -> Any:
    """Returns the result of a call, or its refusal."""
    try:
        return work()
    except ValidationError as error:
        return [(one["type"], one["loc"], one["msg"]) for one in error.errors()]
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(usual_ids, min_size=1, max_size=5) | st.lists(texts, max_size=5) | one_form | any_form)
def test_a_body_is_checked_as_each_candidate_by_itself(candidates: list[Any]) -> None:
    body = {"user": "u", "candidates": candidates}
    found = outcome(lambda: RankRequest.model_validate(body).candidates)
    if candidates:
        expected = outcome(lambda: [TypeAdapter(CandidateForm).validate_python(one) for one in candidates])
        if isinstance(expected, list) and expected and isinstance(expected[0], tuple):
            assert isinstance(found, list)
            assert isinstance(found[0], tuple)
            assert found[0][0] == expected[0][0]
            assert found[0][1][0] == "candidates"
        else:
            assert found == expected
    else:
        assert found[0][0] == "too_short"


@settings(max_examples=300, deadline=None)
@given(one_form | any_form)
def test_columns_are_those_of_one_candidate_after_another(candidates: list[Any]) -> None:
    split = outcome(lambda: split_candidates(candidates))
    assert split == outcome(lambda: of_fields._split_one_by_one(candidates))
    if isinstance(split, str):
        return
    for name, field in FIELDS.items():
        column = split[1].get(name)
        if column is not None:
            found = outcome(
                lambda name=name, column=column: served_columns({name: FIELDS[name]}, {name: column}, len(column))
            )
            expected = outcome(
                lambda name=name, field=field, column=column: of_fields._column_one_by_one(name, field, column)
            )
            assert found == (expected if isinstance(expected, str) else {name: expected})
            if not isinstance(expected, str):
                assert list(map(type, found[name])) == list(map(type, expected))


@pytest.mark.slow
def test_fields_of_2000_candidates_are_read_in_a_fraction_of_the_time_of_one_by_one() -> None:
    candidates = [
        {"item_id": f"item-{number}", "price": number / 7, "badge": "new" if number % 2 else None}
        for number in range(2_000)
    ]
    one = TypeAdapter(list[CandidateForm])

    def by_columns() -> Any:
        return served_columns(
            FIELDS, split_candidates(RankRequest(user="u", candidates=candidates).candidates)[1], 2_000
        )

    def one_by_one() -> Any:
        columns = of_fields._split_one_by_one(one.validate_python(candidates))[1]
        found = {name: of_fields._column_one_by_one(name, FIELDS[name], own) for name, own in columns.items()}
        return found | {name: [None] * 2_000 for name in FIELDS if name not in found}

    assert by_columns() == one_by_one()
    taken = {work: min(_cpu_s(work) for _ in range(9)) for work in (by_columns, one_by_one)}
    assert taken[by_columns] < 0.5 * taken[one_by_one], taken


def _cpu_s(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
