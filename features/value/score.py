"""The serving formula of several tasks, such as `click * purchase ** 0.5`: parsed, checked and evaluated.

The formula reads the tasks' probabilities, each from 0 to 1. Interval arithmetic over that box proves when the
descriptor is read that no request can divide by zero, take the root of a negative number or overflow. The proof is
conservative: a formula is refused if it cannot be proved, and a constant such as `+ 0.01` makes it provable.

Shape letters: N candidates, T tasks.
"""

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.config import nearest

Floats = NDArray[np.floating]
_Operand = Floats | float
_Compute = Callable[[Floats], _Operand]

MOST_CHARACTERS = 500
# Scores are float32, whose largest number is about 3e38.
_LARGEST = 1e30
_OPERATORS: dict[type[ast.operator], Callable[..., _Operand]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Floats], Callable[..., float]]] = {
    "sqrt": (1, np.sqrt, math.sqrt),
    "log": (1, np.log, math.log),
    "log1p": (1, np.log1p, math.log1p),
    "exp": (1, np.exp, math.exp),
    "min": (2, np.minimum, min),
    "max": (2, np.maximum, max),
}
# Least value that an argument may have, and whether the value itself is allowed.
_DOMAINS = {"sqrt": (0.0, True), "log": (0.0, False), "log1p": (-1.0, False)}


class _Part(NamedTuple):
    """Part of a formula: how it is computed from probabilities (N, T), and the interval of its values."""

    compute: _Compute
    low: float
    high: float


class ScoreFormula:
    """Formula over the probabilities of tasks.

    Numbers, names of tasks, `+ - * / **`, parentheses, and the functions `sqrt`, `log`, `log1p`, `exp`, `min` and `max`
    are allowed.

    Attributes:
        text: The formula as written.
        tasks: Names of all tasks, in the order of the columns.

    Args:
        text: The formula.
        tasks: Names of the tasks.

    Raises:
        ValueError: The formula cannot be used; names the part at fault and the remedy.
    """

    def __init__(self, text: str, tasks: Sequence[str]) -> None:
        self.text = text
        self.tasks = tuple(tasks)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"the formula has {len(text):,} characters, at most {MOST_CHARACTERS} are read; shorten it"
            )
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self._part = self._read(tree.body)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{text!r} is no formula ({error}); write one such as {self._example()!r}") from error
        if not any(isinstance(node, ast.Name) and node.id in self.tasks for node in ast.walk(tree)):
            raise ValueError(f"{text!r} reads no task, so all scores are equal; write one such as {self._example()!r}")

    def __call__(self, probabilities: Floats) -> NDArray[np.float32]:
        """Returns scores (N,) float32 of probabilities (N, T), computed in float64."""
        found = self._part.compute(probabilities.astype(np.float64))
        return np.asarray(found).astype(np.float32)

    def shares(self, scores: Floats) -> NDArray[np.float64]:
        """Returns scores (N,) on a scale from 0 to 1, in the same order: as they are, or between the proved bounds."""
        low, high = self._part.low, self._part.high
        exact = scores.astype(np.float64)
        if low >= 0 and high <= 1:
            return exact
        return np.clip((exact - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1)

    def _example(self) -> str:
        first, *others = self.tasks
        return f"{first} * {others[0]} ** 0.5" if others else first

    def _read(self, node: ast.expr) -> _Part:
        """Returns a part of the formula, checked."""
        try:
            part = self._part_of(node)
        except OverflowError:
            part = _Part(lambda probabilities: math.inf, -math.inf, math.inf)
        if not (-_LARGEST <= part.low <= part.high <= _LARGEST):
            raise ValueError(f"{ast.unparse(node)!r} may be beyond ±{_LARGEST:g}; make it smaller")
        return part

    def _part_of(self, node: ast.expr) -> _Part:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                number = float(value)
                return _Part(lambda probabilities: number, number, number)
            case ast.Name(id=name):
                return self._task(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                part = self._read(operand)
                return _Part(lambda probabilities: -part.compute(probabilities), -part.high, -part.low)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._read(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self._operation(node, op, self._read(left), self._read(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(node, name, arguments)
        raise ValueError(
            f"{ast.unparse(node)!r} is not allowed; write numbers, tasks, + - * / ** and {', '.join(_FUNCTIONS)}"
        )

    def _task(self, name: str) -> _Part:
        if name not in self.tasks:
            raise ValueError(
                f"unknown task {name!r}; the nearest is {nearest(name, self.tasks)!r} (valid: {', '.join(self.tasks)})"
            )
        column = self.tasks.index(name)
        return _Part(lambda probabilities: probabilities[:, column], 0.0, 1.0)

    def _operation(self, node: ast.BinOp, op: ast.operator, left: _Part, right: _Part) -> _Part:
        apply = _OPERATORS[type(op)]
        if isinstance(op, ast.Div) and right.low <= 0 <= right.high:
            divisor = ast.unparse(node.right)
            raise ValueError(
                f"division by zero: {divisor!r} may be 0; divide by something above 0, such as ({divisor} + 0.01)"
            )
        if isinstance(op, ast.Pow):
            values = _powers(node, left, right)
        else:
            values = [float(apply(one, two)) for one in (left.low, left.high) for two in (right.low, right.high)]
        return _Part(
            lambda probabilities: apply(left.compute(probabilities), right.compute(probabilities)),
            min(values),
            max(values),
        )

    def _call(self, node: ast.Call, name: str, arguments: Sequence[ast.expr]) -> _Part:
        if name not in _FUNCTIONS:
            raise ValueError(
                f"unknown function {name!r}; the nearest is {nearest(name, _FUNCTIONS)!r} "
                f"(valid: {', '.join(_FUNCTIONS)})"
            )
        count, apply, exact = _FUNCTIONS[name]
        if len(arguments) != count:
            raise ValueError(f"{ast.unparse(node)!r}: {name} takes {count} values, got {len(arguments)}; fix the call")
        parts = [self._read(one) for one in arguments]
        least, inclusive = _DOMAINS.get(name, (-math.inf, True))
        if parts[0].low < least or (parts[0].low == least and not inclusive):
            own, word = ast.unparse(arguments[0]), "below" if inclusive else "at or below"
            raise ValueError(f"{name}({own}): {own!r} may be {word} {least:g}; add a number to it")
        return _Part(
            lambda probabilities: apply(*(part.compute(probabilities) for part in parts)),
            exact(*(part.low for part in parts)),
            exact(*(part.high for part in parts)),
        )


def _powers(node: ast.BinOp, base: _Part, exponent: _Part) -> list[float]:
    """Returns values of a power that enclose all others."""
    written = ast.unparse(node)
    fixed = exponent.low if exponent.low == exponent.high else None
    if base.low <= 0 <= base.high and exponent.low < 0:
        raise ValueError(
            f"division by zero: {written!r} may be 0 to a negative power; keep {ast.unparse(node.left)!r} above 0"
        )
    if base.low < 0 and (fixed is None or fixed != int(fixed)):
        raise ValueError(f"{written!r} may be the power of a negative number; keep {ast.unparse(node.left)!r} above 0")
    found = [float(one**two) for one in (base.low, base.high) for two in (exponent.low, exponent.high)]
    return [*found, 0.0] if base.low < 0 < base.high else found
