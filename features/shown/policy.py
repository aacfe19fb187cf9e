"""Declaration of `[policies.NAME]`: the rules that decide which of the ranked items a user is shown, and where.

A ranker orders items by their score alone. A policy leaves consumed items out, puts different items beside each other,
moves items that match a filter, and gives a share of the places to new items. A request names one policy.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self

from pydantic import Field, field_serializer, model_validator

from features.config import Config
from features.value.filter import Filter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MOST_POSITION = 2_000
"""Last position that a pin may name."""


class Moved(Config):
    """Rule that moves the items that match a filter.

    Attributes:
        filter: Condition on the filterable columns.
    """

    filter: Filter

    @field_serializer("filter")
    def _portable(self, value: Filter) -> dict[str, Any]:
        found: dict[str, Any] = value.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return found


class Boost(Moved):
    """Boost of the items that match.

    Attributes:
        filter: Condition on the filterable columns, as in a request.
        times: Factor of the odds of a ranked item, or of the reciprocal rank of a retrieved item. Below 1 it demotes.
    """

    times: float = Field(gt=0, le=1e6, allow_inf_nan=False)


class PinnedPlace(Moved):
    """Place that the best item that matches takes.

    Attributes:
        filter: Condition on the filterable columns, as in a request.
        position: Place in the answer, from 1.
    """

    position: int = Field(ge=1, le=MOST_POSITION)


class Diversity(Config):
    """Distance between the items of an answer.

    Attributes:
        by: Similarity of two items: `content`, the cosine of their vectors, or `semantic-id`, the share of the codes
            that their Semantic IDs begin with in common.
        weight: Weight of the similarity to the items above, against the relevance: 0 to 1.
        column: Filterable column whose values are capped.
        most: Largest number of items of an answer that may share a value of the column.
    """

    by: Literal["content", "semantic-id"] | None = None
    weight: float | None = Field(None, gt=0, le=1)
    column: str | None = Field(None, min_length=1)
    most: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for first, second, remedy in (("by", "weight", "0.3"), ("column", "most", "2")):
            given = [name for name in (first, second) if getattr(self, name) is not None]
            if len(given) == 1:
                missing = second if given == [first] else first
                example = remedy if missing == second else '"content"' if missing == "by" else '"genre"'
                raise ValueError(f"{given[0]} needs {missing}; add {missing} = {example}")
        if self.by is None and self.column is None:
            raise ValueError(
                'diversity says nothing; give by = "content" and weight = 0.3, or column = "genre" and most = 2'
            )
        return self


class NewItems(Config):
    """Floor of new items. Chance draws them among the new candidates, each with the same probability.

    Attributes:
        share: Share of the places of an answer that chance fills, 0 to 1, rounded up to whole places.
        positives: Largest number of positive events in training with which an item is new.
    """

    share: float = Field(gt=0, le=1)
    positives: int = Field(0, ge=0)


class Policy(Config):
    """Rules of one policy.

    Attributes:
        leave_out_consumed: True leaves out the items that the user has consumed, that is, had a positive event with.
        diversity: Distance between the items of an answer.
        boost: Boosts. An item that matches several is boosted by each.
        pin: Places that items take whatever their score. The first rule takes its item first.
        new: Floor of new items.
    """

    leave_out_consumed: bool = False
    diversity: Diversity | None = None
    boost: tuple[Boost, ...] = Field((), max_length=32)
    pin: tuple[PinnedPlace, ...] = Field((), max_length=32)
    new: NewItems | None = None

    @model_validator(mode="after")
    def _check_pins(self) -> Self:
        positions = [one.position for one in self.pin]
        repeated = [position for position in positions if positions.count(position) > 1]
        if repeated:
            raise ValueError(f"pin: position {repeated[0]} is given twice; keep one of them")
        return self

    @property
    def chooses(self) -> bool:
        """True if the policy chooses among more candidates than the answer has."""
        return bool(self.diversity or self.boost or self.pin or self.new)

    def filters(self) -> Iterator[tuple[str, Filter]]:
        """Yields the field and the filter of each boost and pin."""
        rules: tuple[tuple[str, Sequence[Moved]], ...] = (("boost", self.boost), ("pin", self.pin))
        for name, moved in rules:
            for place, one in enumerate(moved):
                yield f"{name}.{place}.filter", one.filter


class DeclaredItems(Protocol):
    """Fields of the items that the check reads; see `features.dataset.descriptor.Items`."""

    @property
    def filterable(self) -> Sequence[str]: ...


def check_policies(
    policies: Mapping[str, Policy], items: DeclaredItems | None, *, has_content: bool, has_users: bool
) -> None:
    """Checks that a dataset has what its policies read.

    Args:
        policies: Policies by name.
        items: The dataset's items.
        has_content: True if items have text or vectors.
        has_users: True if events name users and items.

    Raises:
        ValueError: A policy cannot be followed; names the field and the remedy.
    """
    for name, policy in policies.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"[policies] {name!r}: a name is letters, digits, '.', '_' and '-'; rename it")
        if items is None:
            raise ValueError(f"[policies] {name}: policies choose among items; declare [items], or remove the policy")
        if policy.leave_out_consumed and not has_users:
            raise ValueError(
                f'[policies] {name}.leave_out_consumed: needs user = "..." and item = "..." in [events], which say who '
                "consumed what"
            )
        diversity = policy.diversity
        if diversity is not None and diversity.by is not None and not has_content:
            raise ValueError(
                f"[policies] {name}.diversity.by: items have no content to compare; name text in [items], or cap a "
                "column"
            )
        columns = [(f"{field}.column", column) for field, own in policy.filters() for column in sorted(own.columns())]
        if diversity is not None and diversity.column is not None:
            columns.append(("diversity.column", diversity.column))
        for field, column in columns:
            if column not in items.filterable:
                raise ValueError(
                    f"[policies] {name}.{field}: column '{column}' is not filterable; add it to filterable of [items]"
                )
