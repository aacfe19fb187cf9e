"""What was shown to whom, and what came of it: messages of the topics `impressions` and `outcomes`, as JSON."""

from typing import Any

import msgspec

from features.errors import EventError

CLICK = "click"


class Impression(msgspec.Struct, frozen=True, tag="shown", tag_field="kind", omit_defaults=True):
    """One answer, or one request that failed.

    Attributes:
        id: of the request; outcomes name it.
        user: whose ranking it was.
        time_ms: when, since 1970.
        bundle: which ranked.
        arms: by an experiment's id, `control` or `challenger`; without those the user is in no arm of.
        epochs: by an experiment's id, since when its arms are what they are, in seconds since 1970.
        items: ids as shown, best first; scores: their probabilities.
        ms: time to answer.
        failed: True if there was no answer.
        model: of the bundles.
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


class Shadowed(msgspec.Struct, frozen=True, tag="shadowed", tag_field="kind", omit_defaults=True):
    """What a challenger in the shadow made of an answer's items; nobody saw it.

    Attributes:
        experiment: its id.
        correlation: Spearman's, of its scores with the champion's; null below two items.
        drift: mean of its scores less the champion's.
        ms: time it took; failed: whether it raised.
    """

    id: str
    experiment: str
    time_ms: int
    correlation: float | None = None
    drift: float = 0.0
    ms: float = 0.0
    failed: bool = False


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a user did with an item that was shown.

    Attributes:
        impression: id of the request.
        item: which of its items.
        what: click, or any other word: a conversion is told from a click by it.
        time_ms: when, since 1970.
    """

    impression: str
    item: str
    time_ms: int
    what: str = CLICK


def encode(message: Impression | Shadowed | Outcome) -> bytes:
    """Message to bytes."""
    return msgspec.json.encode(message)


_IMPRESSIONS = msgspec.json.Decoder(Impression | Shadowed)
_OUTCOMES = msgspec.json.Decoder(Outcome)


def decode_impression(data: bytes) -> Impression | Shadowed:
    """Bytes of the topic `impressions`; raises EventError on anything else."""
    found: Impression | Shadowed = _decoded(_IMPRESSIONS, data, "impression")
    return found


def decode_outcome(data: bytes) -> Outcome:
    """Bytes of the topic `outcomes`; raises EventError on anything else."""
    found: Outcome = _decoded(_OUTCOMES, data, "outcome")
    return found


def _decoded(decoder: Any, data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"{what}: {error}") from error
