"""Vectors that a team brings: their declaration, the check of each vector, and the text that carries a vector.

A vector travels as a field of an item's content, as base64 of its little-endian float32 values. So files, messages and
every runner give an encoder the same bytes. Shape letters: R rows, D width.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from features.config import Config

_SPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NPY = ".npy"
_LISTS = msgspec.json.Decoder(list[float])


class GivenSpace(Config):
    """Column or file of vectors that lie in one space.

    Attributes:
        column: Column of the vectors: lists of numbers of one length. A message has the vector under this name.
        file: npy file of the catalogue's vectors, (R, D), in the order of the rows, relative to the descriptor. By
            default the column is read.
        space: Id of the space, such as `clip-v3`. A new model of the vectors is a new space.
        space_column: Column that names the space of each row's vector. A row of another space is refused.
        dim: Width of the vectors, D. By default the first vector decides.
    """

    column: str = Field(min_length=1)
    file: str | None = Field(default=None, min_length=1)
    space: str
    space_column: str | None = Field(default=None, min_length=1)
    dim: int | None = Field(default=None, ge=1)

    @field_validator("space")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not _SPACE.fullmatch(value):
            raise ValueError(f"space '{value}': a name is letters, digits, '.', '_' and '-'; rename it")
        return value


class VectorFault(ValueError):
    """Fault of a vector.

    Attributes:
        row: Row of the vector, from 0.
        column: Column at fault, if it is not the column of the vectors.
    """

    def __init__(self, message: str, row: int | None, column: str | None = None) -> None:
        super().__init__(message)
        self.row, self.column = row, column


def declared_spaces(value: Any) -> Any:
    """Returns `[items] vectors` in its long form; a name alone is a column, or a file if it ends in .npy."""
    if not isinstance(value, Mapping):
        return value
    found = {}
    for name, one in value.items():
        if isinstance(one, str):
            one = {"file": one} if one.endswith(_NPY) else {"column": one}
        if isinstance(one, Mapping):
            one = {"space": name, **({"column": name} if "file" in one else {}), **one}
        found[name] = one
    return found


def vector_texts(values: pl.Series, given: GivenSpace, spaces: pl.Series | None = None) -> list[str]:
    """Checks a column of vectors and returns each vector as text.

    Args:
        values: (R,) lists or arrays of numbers, or their JSON text. Null where an item has no vector.
        given: Declaration of the vectors.
        spaces: (R,) String, the space of each row; None if no column names the spaces.

    Returns:
        R texts for `read_vectors`, "" where an item has no vector.

    Raises:
        VectorFault: A vector is of another space or width, is no list of numbers, has a value that is not finite in
            float32, or has no length. Names the first such row.
    """
    present = np.flatnonzero(values.is_not_null().to_numpy())
    if spaces is not None:
        _check_spaces(spaces, present, given)
    if not len(present):
        return [""] * len(values)
    vectors = _checked(values.drop_nulls(), present, given.dim).astype("<f4")
    texts = [""] * len(values)
    for row, vector in zip(present.tolist(), vectors, strict=True):
        texts[row] = b64encode(vector.tobytes()).decode()
    return texts


def vector_text(vector: NDArray[np.floating]) -> str:
    """Returns the text of one vector (D,) without a check."""
    return b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def text_width(text: str) -> int:
    """Returns the width D of the vector in a text."""
    return len(b64decode(text)) // 4


def read_vectors(texts: Sequence[str], dim: int) -> NDArray[np.float32]:
    """Returns the vectors (R, D) float32 of texts, a zero row where a text is empty.

    Raises:
        VectorFault: A vector has another width.
    """
    found = np.zeros((len(texts), dim), dtype=np.float32)
    for row, text in enumerate(texts):
        if not text:
            continue
        vector = np.frombuffer(b64decode(text), dtype="<f4")
        if len(vector) != dim:
            raise VectorFault(f"holds {len(vector)} numbers, expected {dim}", row)
        found[row] = vector
    return found


def _check_spaces(spaces: pl.Series, present: NDArray[np.int64], given: GivenSpace) -> None:
    named = spaces.to_list()
    for row in present.tolist():
        if named[row] != given.space:
            found = "no space is named" if named[row] is None else f"the vector is of space {named[row]!r}"
            raise VectorFault(
                f"{found}, expected {given.space!r}; vectors of two spaces must not be mixed", row, given.space_column
            )


def _checked(values: pl.Series, rows: NDArray[np.int64], dim: int | None) -> NDArray[np.float32]:
    """Returns the vectors (N, D) of N rows that are not null."""
    if values.dtype == pl.String:
        values = _parsed(values, rows)
    if isinstance(values.dtype, pl.Array):
        if len(values.dtype.shape) > 1:
            raise VectorFault(f"holds {values.dtype}, lists of numbers expected; give one list a row", None)
        values = values.arr.to_list()
    if not isinstance(values.dtype, pl.List):
        raise VectorFault(f"holds {values.dtype}, lists of numbers expected", None)
    inner: Any = values.dtype.inner
    if inner == pl.String:
        numbers = values.list.eval(pl.element().cast(pl.Float64, strict=False))
    elif inner.is_numeric():
        numbers = values
    else:
        raise VectorFault(f"holds {values.dtype}, lists of numbers expected", None)
    width = numbers.list.len().to_numpy()
    expected = int(width[0]) if dim is None else dim
    _refuse(width == 0, rows, lambda row: "holds an empty list; leave the vector out if the item has none")
    _refuse(width != expected, rows, lambda row: f"holds {width[row]} numbers, expected {expected}")
    flat = numbers.explode()
    with np.errstate(over="ignore"):
        known = flat.is_not_null().to_numpy().reshape(-1, expected)
        vectors = flat.fill_null(0).cast(pl.Float64).to_numpy().astype(np.float32).reshape(-1, expected)
    _refuse(~known.all(axis=1), rows, lambda row: f"number {1 + int(known[row].argmin())} is missing, or no number")
    finite = np.isfinite(vectors)
    _refuse(~finite.all(axis=1), rows, lambda row: _not_finite(vectors[row], finite[row]))
    _refuse(~vectors.any(axis=1), rows, lambda row: "has length 0; leave the vector out if the item has none")
    return vectors


def _not_finite(vector: NDArray[np.float32], finite: NDArray[np.bool_]) -> str:
    place = int(finite.argmin())
    what = "NaN" if np.isnan(vector[place]) else "infinite in float32"
    return f"number {1 + place} is {what}; give finite numbers"


def _refuse(wrong: Any, rows: NDArray[np.int64], problem: Any) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise VectorFault(problem(row), int(rows[row]))


def _parsed(values: pl.Series, rows: NDArray[np.int64]) -> pl.Series:
    """Returns lists of the JSON text that a csv holds."""
    found = []
    for row, text in zip(rows.tolist(), values.to_list(), strict=True):
        try:
            found.append(_LISTS.decode(text))
        except msgspec.DecodeError as error:
            raise VectorFault(f"holds {text[:40]!r}, a JSON list of numbers expected ({error})", row) from error
    return pl.Series(values.name, found, dtype=pl.List(pl.Float64))
