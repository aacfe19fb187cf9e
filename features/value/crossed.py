"""Features of several tables: an expression over columns of an event and of its item or user.

The tables keep the columns that such expressions read, as `item.price`, beside their features. Each example gathers
them by the numbers of its user and item, so a drawn negative and a candidate have values of their own. Frame, step and
server call `crossed_features`. Shape letters: E examples, N entities.
"""

from collections.abc import Mapping, Sequence

import polars as pl

from features.value.canonical import VERSION
from features.value.expression import INPUT_TYPES, Expression, evaluate


def crossing_columns(expressions: Sequence[Expression], entity: str) -> tuple[str, ...]:
    """Returns the names of the kept columns of a table, such as `item.price`."""
    return tuple(dict.fromkeys(f"{entity}.{name}" for one in expressions for name in one.inputs.get(entity, ())))


def stored_input(values: pl.Series) -> pl.Series:
    """Returns a column as a table keeps it: a time as microseconds since 1970, and "" of an empty list as no value."""
    if values.dtype == INPUT_TYPES["time"]:
        return values.to_physical()
    if values.dtype == INPUT_TYPES["text"] and (values == "").any():
        return values.replace("", None)
    return values


def crossed_features(
    expressions: Sequence[Expression], inputs: Sequence[pl.Series], *, version: int = VERSION
) -> list[pl.Series]:
    """Returns features of several tables, evaluated together.

    Args:
        expressions: Features.
        inputs: (E,) columns that the features read, named as `item.price`, as tables keep them.
        version: Version of the canonical form of categorical values.

    Returns:
        For each feature (E,) String or Float32, as `features.value.expression.evaluate` does.
    """
    types = {name: INPUT_TYPES[kind] for one in expressions for name, kind in one.types.items()}
    typed = [own if own.dtype == types[own.name] else own.cast(types[own.name]) for own in inputs]
    return evaluate(expressions, pl.DataFrame(typed), version=version)


def with_crossed(
    examples: pl.DataFrame, expressions: Sequence[Expression], tables: Mapping[str, pl.DataFrame]
) -> pl.DataFrame:
    """Returns examples with the features of several tables, and without the kept columns of the events.

    Args:
        examples: (E, …) examples with the numbers `user` and `item` of their entities.
        expressions: Features.
        tables: (N, …) kept columns of `user` and `item`.
    """
    if not expressions:
        return examples
    inputs = list(examples.select(crossing_columns(expressions, "event")))
    for entity, table in tables.items():
        inputs += [table[name].gather(examples[entity]) for name in crossing_columns(expressions, entity)]
    made = crossed_features(expressions, inputs)
    return examples.drop(crossing_columns(expressions, "event")).with_columns(made)
