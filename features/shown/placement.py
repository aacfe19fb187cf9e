"""Declaration of `[events.placement]`: the columns that say where an item was shown, for a path of their own.

Users click on items at the top because the items are at the top. A ranker that cannot see the position takes such
clicks for relevance. A ranker that reads the position among its features mixes it into the scores of items. So these
columns are read by an additive path beside the network (`models.ranker.placement`), and a server uses a constant.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from features.config import Config, refuse_repeats

POSITION = "position"
"""Column of the 0-based position, which each row of impressions has."""


class Placement(Config):
    """Columns that say where an item was shown. Training reads them, a server uses a constant.

    Attributes:
        position: Column of the position in the list, a whole number. A missing value is unknown.
        categorical: Columns such as the surface or the device, one value each.
        first: Number of the first position, 0 or 1. By default 0 for impressions and 1 for files.
        explore: Share of a server's answers in which chance orders two neighbours, 0 to 1; see `tessera propensities`.
    """

    position: str | None = Field(None, min_length=1)
    categorical: tuple[str, ...] = ()
    first: Literal[0, 1] | None = None
    explore: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_repeats("placement", self.columns)
        if not self.columns:
            raise ValueError('placement names no column; give position = "...", or remove [events.placement]')
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The declared columns, the position first."""
        return (*((self.position,) if self.position else ()), *self.categorical)


class PlacedEvents(Protocol):
    """Fields of the events that the check reads; see `features.dataset.descriptor.Events`."""

    @property
    def placement(self) -> Placement | None: ...
    @property
    def origin(self) -> str: ...
    @property
    def label(self) -> Any: ...
    @property
    def reserved(self) -> Sequence[str]: ...


def check_placement(events: PlacedEvents, *, taken: Sequence[str | None], of_impressions: Sequence[str]) -> None:
    """Checks the columns of the placement.

    Args:
        events: Events with a placement.
        taken: Columns that are declared for another use.
        of_impressions: Columns of the placement that rows of impressions have.

    Raises:
        ValueError: A column cannot be used; names it.
    """
    placement = events.placement
    if placement is None:
        return
    if events.label.implicit:
        raise ValueError(
            "placement: label.implicit draws negatives that were never shown, so they have no position; read "
            "impressions, or remove [events.placement]"
        )
    shown = events.origin == "impressions"
    if shown and placement.first == 1:
        raise ValueError("placement.first: the positions of impressions are counted from 0; remove first")
    for name in placement.columns:
        if name in taken:
            raise ValueError(f"placement: column {name!r} is declared for another use too; remove one of both")
        if shown and name not in of_impressions:
            raise ValueError(
                f"placement: rows of impressions have no column {name!r}; there are {', '.join(of_impressions)}"
            )
        if shown and name == POSITION and name != placement.position:
            raise ValueError(f"placement.categorical: {name!r} is a number; write position = {name!r}")
        if shown and name == placement.position and name != POSITION:
            raise ValueError(f"placement.position: {name!r} is no number; write position = {POSITION!r}")
        if not shown and name in events.reserved:
            raise ValueError(f"placement: column {name!r} cannot be used: the name is taken; rename it in the files")
