"""Impressions and outcomes: messages of the topics `impressions` and `outcomes`, as JSON."""

from typing import Any

import msgspec

from features.errors import EventError

CLICK = "click"


class Impression(msgspec.Struct, frozen=True, tag="shown", tag_field="kind", omit_defaults=True):
    """Answer that was shown, or request that failed.

    Attributes:
        id: Id of the request; outcomes name it.
        user: User of the ranking.
        time_ms: Time, milliseconds since 1970.
        bundle: Bundle that ranked.
        arms: By an experiment's id, `control` or `challenger`; experiments with the user in no arm are absent.
        epochs: By an experiment's id, the start of its present arms, seconds since 1970.
        items: Ids as shown, best first; scores: their probabilities, of several tasks those of the judged task.
        ms: Time to answer, milliseconds.
        failed: True if there was no answer.
        model: Model of the bundles.
        surface: Place where the items were shown, such as `home`; "" if the request named none.
        context: Served values of the request's declared fields, by name.
        candidates: Served values of the candidates' declared fields, by name: a value for each of `items`.
        explored: Positions whose order chance decided, from 0, ascending.
        policy: Policy that arranged the items; "" without one.
        propensities: Probability with which chance chose each of `items`, 1 for an item that it did not choose; empty
            if it chose none.
        read_us: Time that expressions over the events' clock read, microseconds since 1970. None if there are none, and
            from earlier releases.
        sources: Source of each of `items`: `towers`, `content`, `both` or `popular`; empty if the request gave the
            candidates, and from earlier releases.
    """

    id: str
    user: str
    time_ms: int
    bundle: str
    model: str
    arms: dict[str, str] = {}
    epochs: dict[str, int] = {}
    items: list[str] = []
    scores: list[float] = []
    ms: float = 0.0
    failed: bool = False
    surface: str = ""
    explored: list[int] = []
    read_us: int | None = None
    context: dict[str, Any] = {}
    candidates: dict[str, list[Any]] = {}
    policy: str = ""
    propensities: list[float] = []
    sources: list[str] = []

    def values_at(self, position: int) -> dict[str, Any]:
        """Returns the values of the fields of the item at a position."""
        own = {name: values[position] for name, values in self.candidates.items() if position < len(values)}
        return self.context | own


class Shadowed(msgspec.Struct, frozen=True, tag="shadowed", tag_field="kind", omit_defaults=True):
    """Ranking of an answer's items by a challenger in the shadow; it is never shown.

    Attributes:
        experiment: Id of the experiment.
        correlation: Spearman's correlation of its scores with the champion's; null below two items.
        drift: Mean of its scores less the champion's.
        ms: Time it took, milliseconds; failed: true if it raised.
    """

    id: str
    experiment: str
    time_ms: int
    correlation: float | None = None
    drift: float = 0.0
    ms: float = 0.0
    failed: bool = False


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """Action of a user on a shown item.

    Attributes:
        impression: Id of the request.
        item: Item of the impression.
        what: Kind of the outcome: click, or another word for a conversion.
        time_ms: Time, milliseconds since 1970.
    """

    impression: str
    item: str
    time_ms: int
    what: str = CLICK


def encode(message: Impression | Shadowed | Outcome) -> bytes:
    """Encodes a message."""
    return msgspec.json.encode(message)


_IMPRESSIONS = msgspec.json.Decoder(Impression | Shadowed)
_OUTCOMES = msgspec.json.Decoder(Outcome)


def decode_impression(data: bytes) -> Impression | Shadowed:
    """Decodes a message of the topic `impressions`; raises EventError on any other content."""
    message: Impression | Shadowed = _decoded(_IMPRESSIONS, data, "impression")
    return message


def decode_outcome(data: bytes) -> Outcome:
    """Decodes a message of the topic `outcomes`; raises EventError on any other content."""
    found: Outcome = _decoded(_OUTCOMES, data, "outcome")
    return found


def _decoded(decoder: Any, data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"{what}: {error}") from error
