"""Fits the concepts and aspects that a descriptor declares, on the catalogue and its content vectors.

Shape letters: N items, D dim.
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.encoder import Encoder
from features.dataset.descriptor import Items
from features.dataset.files import load
from features.dataset.source import TableSource
from features.errors import DatasetError
from models.encoder.meaning.aspects import Aspect, fit_aspect, parts
from models.encoder.meaning.concept_fit import fit_column, fit_examples
from models.encoder.meaning.concepts import ConceptHead, Floats, join


def cells(items: pl.DataFrame, column: str) -> list[list[str] | None]:
    """Returns the values of a column of the catalogue for each item, (N,); None where it is empty."""
    return [found if (found := parts(value)) else None for value in items[column].to_list()]


def fit_concepts(
    declared: Items, items: pl.DataFrame, vectors: Floats, encoder: Encoder, *, directory: Path, seed: int = 0
) -> ConceptHead | None:
    """Fits the declared concepts; returns None if none is declared.

    Args:
        declared: The `[items]` of a descriptor.
        items: N items, as `read_items` returns them.
        vectors: (N, D) content vectors.
        encoder: Encoder of the vectors, which also encodes the glossary's texts.
        directory: Directory of the descriptor.
        seed: Seed of the fit.

    Raises:
        DatasetError: The column or the glossary cannot be used.
    """
    heads: list[ConceptHead] = []
    if declared.concepts is not None:
        values = cells(items, declared.concepts)
        heads.append(fit_column(vectors, values, column=declared.concepts, source=encoder.id, seed=seed))
    if declared.glossary is not None:
        texts = _glossary(declared.glossary, directory)
        known = set(heads[0].names) if heads else set()
        # A term that the column declares has better evidence there.
        texts = {term: text for term, text in texts.items() if term not in known}
        encoded = encoder.encode([f"{term}\n{text}" for term, text in texts.items()])
        heads += [
            fit_examples(term, encoded[row : row + 1], vectors, source=encoder.id, least=1)
            for row, term in enumerate(texts)
        ]
    return join(heads) if heads else None


def fit_aspects(
    declared: Items, items: pl.DataFrame, vectors: Floats, *, source: str, seed: int = 0
) -> dict[str, Aspect]:
    """Fits the declared aspects, by name.

    Args:
        declared: The `[items]` of a descriptor.
        items: N items, as `read_items` returns them.
        vectors: (N, D) content vectors.
        source: Id of the encoder of the vectors.
        seed: Seed of the fit.

    Raises:
        DatasetError: Too few items have a value in an aspect's columns.
    """
    return {
        name: fit_aspect(name, columns, vectors, items.select(columns).to_dicts(), source=source, seed=seed)
        for name, columns in declared.aspects.items()
    }


def carriers(head: ConceptHead, name: str, items: pl.DataFrame, vectors: Floats) -> NDArray[np.bool_]:
    """Returns the items (N,) that carry a concept by their column, or where that is empty, by prediction."""
    row = head.row(name)
    predicted: NDArray[np.bool_] = head.carries(vectors)[:, row]
    column = head.concepts[row].column
    if column not in items.columns:
        return predicted
    stated = cells(items, column)
    return np.array([name in found if found else guess for found, guess in zip(stated, predicted, strict=True)])


def _glossary(path: str, directory: Path) -> dict[str, str]:
    source = TableSource.model_validate({"path": path})
    table = load(source, directory, table="glossary", wanted=("term", "text"), many=())
    terms, texts = (table.column(name).cast(pl.String).fill_null("") for name in ("term", "text"))
    found: dict[str, str] = {}
    for row, (term, text) in enumerate(zip(terms.to_list(), texts.to_list(), strict=True)):
        if not term.strip():
            raise table.error("term", "is empty; name the concept", row=row)
        if term in found:
            raise table.error("term", f"{term!r} is defined twice; keep one definition", row=row)
        found[term] = text
    if not found:
        raise DatasetError(f"{table.files[0]}: [items] glossary holds no term; add rows, or remove glossary")
    return found
