"""Laws of the serving formula: it computes what Python computes, and whatever is accepted is finite everywhere."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.value.score import ScoreFormula

TASKS = ("buy", "click", "like")


def by_hand(text: str, probabilities: list[float]) -> float:
    known = {"sqrt": math.sqrt, "log": math.log, "log1p": math.log1p, "exp": math.exp, "min": min, "max": max}
    return float(eval(text, {"__builtins__": {}}, known | dict(zip(TASKS, probabilities, strict=True))))


@st.composite
def formulas(draw: st.DrawFn, depth: int = 3) -> str:
    if not depth or draw(st.booleans()):
        return draw(st.sampled_from((*TASKS, "0.5", "2", "1.25", "0")))
    left, right = draw(formulas(depth - 1)), draw(formulas(depth - 1))
    return draw(
        st.sampled_from(
            (
                f"({left} + {right})",
                f"({left} - {right})",
                f"{left} * {right}",
                f"({left}) / ({right})",
                f"({left}) ** ({right})",
                f"-({left})",
                f"log({left})",
                f"log1p({left})",
                f"sqrt({left})",
                f"exp({left})",
                f"max({left}, {right})",
                f"min({left}, {right})",
            )
        )
    )


@given(formulas(), st.lists(st.tuples(*(st.floats(0, 1, width=32) for _ in TASKS)), min_size=1, max_size=5))
def test_an_accepted_formula_is_finite_and_is_what_python_computes(text: str, rows: list[tuple[float, ...]]) -> None:
    try:
        formula = ScoreFormula(text, TASKS)
    except ValueError:
        return
    corners = [tuple(map(float, f"{number:03b}")) for number in range(8)]
    every = np.array([*rows, *corners], dtype=np.float32)
    found = formula(every)
    assert found.dtype == np.float32
    assert found.shape == (len(every),)
    assert np.isfinite(found).all()
    shares = formula.shares(found)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert (np.diff(shares[np.argsort(found)]) >= 0).all()
    expected = [by_hand(text, row.astype(np.float64).tolist()) for row in every]
    np.testing.assert_allclose(found, np.array(expected, dtype=np.float32), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("click * bye", "unknown task 'bye'; the nearest is 'buy' .valid: buy, click, like."),
        ("click * power(buy, 2)", "unknown function 'power'; the nearest is '[a-z0-9]+' .valid: sqrt, log"),
        ("click / buy", r"division by zero: 'buy' may be 0; .*\(buy \+ 0.01\)"),
        ("click / (buy - like)", "division by zero: 'buy - like' may be 0"),
        ("click / (buy - like) ** 2", "division by zero: '.buy - like. [*][*] 2' may be 0"),
        ("1 / 0 * click", "division by zero: '0' may be 0"),
        ("buy ** -0.5", "division by zero: 'buy [*][*].*' may be 0 to a negative power"),
        ("(click - buy) ** 0.5", "may be the power of a negative number"),
        ("log(click)", "'click' may be at or below 0"),
        ("sqrt(click - 0.5)", "'click - 0.5' may be below 0"),
        ("exp(exp(exp(9 * click)))", "may be beyond ±1e[+]30"),
        ("click * 1e400", "may be beyond"),
        ("0.5", "reads no task"),
        ("", "is no formula .* write one such as 'buy [*] click [*][*] 0.5'"),
        ("click +", "is no formula"),
        ("click == buy", "'click == buy' is not allowed"),
        ("click if buy else like", "is not allowed"),
        ("click.real", "'click.real' is not allowed"),
        ("(lambda: click)()", "is not allowed"),
        ("__import__('os')", "unknown function '__import__'"),
        ("min(click)", "min takes 2 values, got 1"),
        ("True * click", "'True' is not allowed"),
        ("click ^ 2", "is not allowed"),
        ("(" * 300 + "click" + ")" * 300, "characters, at most 500 are read"),
        ("click\0", "is no formula"),
    ],
)
def test_a_formula_that_cannot_be_used_is_refused_by_the_part_at_fault(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ScoreFormula(text, TASKS)


def test_shares_are_the_score_or_its_place_between_the_bounds() -> None:
    scores = np.array([0.25, 0.5], dtype=np.float32)
    assert ScoreFormula("click * buy", TASKS).shares(scores).tolist() == [0.25, 0.5]
    assert ScoreFormula("4 * click - 1", TASKS).shares(scores).tolist() == [0.3125, 0.375]


def test_a_constant_makes_a_divisor_provable() -> None:
    formula = ScoreFormula("click / (buy + 0.01)", TASKS)
    np.testing.assert_allclose(formula(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), [50.0])
