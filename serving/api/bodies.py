"""Bodies of requests and answers, as OpenAPI shows them. Wrong types are refused here, before any lookup."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from features.value.canonical import scalar
from features.value.field import ITEM_ID, is_usual_text
from features.value.filter import Filter
from serving.ranking.service import MAX_CANDIDATES, MAX_EXPLAINED

MAX_ROWS = 1_000
MOST_CONCEPTS = 32
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _id(value: Any) -> Any:
    """Returns an id as JSON gives it: text, or a number or boolean in its canonical form."""
    return scalar(value) if isinstance(value, bool | int | float) else value


def _encodable(value: str) -> str:
    """Refuses a lone surrogate, which a JSON escape can write and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a surrogate pair, which is not text")
    return value


def _text(value: Any) -> Any:
    """Refuses a number: its unit would be a guess."""
    if not isinstance(value, str):
        raise ValueError("expected ISO 8601 text such as 2024-01-31T12:00:00Z")
    return value


LongText = Annotated[StrictStr, AfterValidator(_encodable)]
Text = Annotated[LongText, Field(max_length=1_024)]
Id = Annotated[Text, BeforeValidator(_id), Field(min_length=1)]
Int64 = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
# Integers of any size: beyond 64 bits an integer would be read as a float, which is another id.
Whole = Annotated[StrictInt, Field(ge=-(10**308), le=10**308)]
Float = Annotated[FiniteFloat, Field(strict=True)]
Moment = Annotated[datetime, BeforeValidator(_text)]
Value = Text | Whole | Float | StrictBool | list[Text | Whole | Float | StrictBool | None] | None
Concepts = Annotated[list[Text], Field(max_length=MOST_CONCEPTS)]
PolicyName = Annotated[Text, Field(min_length=1)]
Sources = Annotated[list[Literal["towers", "content"]], Field(min_length=1, max_length=2)]
Cell = LongText | Whole | Float | StrictBool | list[LongText | Whole | Float | StrictBool | None] | None


def _example(**body: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [body]})


def _candidate(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a candidate with its id as text. The ranking checks each field against its declared type."""
    name = _id(fields.get(ITEM_ID))
    if not isinstance(name, str) or not 1 <= len(_encodable(name)) <= 1_024:
        raise ValueError(f"{ITEM_ID} is no id of 1 to 1,024 characters; give the item's id beside its fields")
    return {**fields, ITEM_ID: name}


_CANDIDATE_SCHEMA = {
    "type": "object",
    "title": "Candidate",
    "description": "A candidate and its fields, such as its price now.",
    "properties": {ITEM_ID: {"type": "string"}},
    "required": [ITEM_ID],
    "examples": [{ITEM_ID: "1", "price_now": 9.5}],
}
Candidate = Annotated[dict[str, Any], AfterValidator(_candidate), WithJsonSchema(_CANDIDATE_SCHEMA)]


def _form(value: Any) -> str:
    """Returns whether a candidate is an id, or an object with fields."""
    return "fields" if isinstance(value, dict) else "id"


CandidateForm = Annotated[Annotated[Id, Tag("id")] | Annotated[Candidate, Tag("fields")], Discriminator(_form)]


def _candidates(values: Any, one_by_one: ValidatorFunctionWrapHandler) -> Any:
    """Checks ids or objects of one form together. Any other list is checked one by one, and the error names the place.

    A call for each of 2,000 candidates takes longer than the rest of a request's checks.
    """
    kinds = set(map(type, values)) if type(values) is list and 0 < len(values) <= MAX_CANDIDATES else set()
    ids = values if kinds == {str} else [value.get(ITEM_ID) for value in values] if kinds == {dict} else []
    usual = set(map(type, ids)) == {str} and all(ids) and is_usual_text(ids)
    return values if usual else one_by_one(values)


Candidates = Annotated[list[CandidateForm], Field(min_length=1, max_length=MAX_CANDIDATES), WrapValidator(_candidates)]


class Problem(BaseModel):
    """Problem document (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="Expected value, given value, and remedy.")
    field: str | None = Field(default=None, description="Field of the request that is at fault.")


class RankRequest(BaseModel):
    """Request to rank candidates for a user; without candidates they are retrieved by vector first."""

    model_config = _example(user="42", candidates=["1", "2", "3"], k=2)

    user: Id = Field(description="The user's id; an unknown user is served by defaults.")
    candidates: Candidates | None = Field(
        default=None,
        description="Item ids, or objects with `item_id` and the candidate's fields; an unknown item is scored without "
        "item features.",
    )
    k: int = Field(default=10, ge=1, le=MAX_CANDIDATES, description="Most items to return.")
    context: dict[Text, Value] = Field(
        default_factory=dict, description="The events' own columns and the request's fields, by name."
    )
    filter: Filter | None = Field(default=None, description="Condition that retrieved candidates must match.")
    explain: bool = Field(default=False, description=f"Give reasons; of at most {MAX_EXPLAINED} items.")
    avoid: Concepts = Field(default=[], description="Concepts from which retrieval of candidates steers away.")
    without: Concepts = Field(default=[], description="Concepts that no retrieved candidate may carry.")
    sources: Sources | None = Field(default=None, description="Sources of retrieved candidates, as of a retrieval.")
    policy: PolicyName | None = Field(
        default=None, description="Policy of the dataset that arranges the items; by default their scores do."
    )
    at: Moment | None = Field(
        default=None,
        description="Time as of which aggregates are answered, ISO 8601 (UTC without an offset); by default right "
        "after the newest event of the stream.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "RankRequest":
        if self.explain and self.k > MAX_EXPLAINED:
            raise ValueError(f"explain takes k up to {MAX_EXPLAINED}")
        if self.filter is not None and self.candidates is not None:
            raise ValueError("filter chooses among retrieved candidates; leave candidates out, or filter")
        if (self.avoid or self.without) and self.candidates is not None:
            raise ValueError("avoid and without choose among retrieved candidates; leave candidates out, or both")
        if self.sources is not None and self.candidates is not None:
            raise ValueError("sources find candidates; leave candidates out, or sources")
        _check_sources(self.sources, "avoid" if self.avoid else "")
        return self


def _check_sources(sources: Sequence[str] | None, steered_by: str) -> None:
    """Refuses a source that is named twice, and towers for a request that steers or views content vectors."""
    if len(set(sources or ())) < len(sources or ()):
        raise ValueError("sources: a source is named twice; name it once")
    if steered_by and "towers" in (sources or ()):
        raise ValueError(f"sources: the towers have no {steered_by}; leave {steered_by} out, or name content alone")


class RankedItemBody(BaseModel):
    """Ranked item of an answer."""

    item: str
    score: float = Field(
        description="Probability of a positive event; of several tasks, the value of the dataset's formula."
    )
    tasks: dict[str, float] | None = Field(
        default=None, description="Probability of each task by its name, if the bundle has several tasks."
    )
    reasons: dict[str, float] | None = Field(
        default=None,
        description="Contribution of each feature to the log-odds: with it less without it, largest first. Of several "
        "tasks, the contribution to the score.",
    )
    concepts: "list[SharedConceptBody] | None" = Field(
        default=None, description="Concepts shared most with the items that the user liked, if asked to explain."
    )
    correction: "CorrectionBody | None" = Field(
        default=None, description="Change of a new item's score by near labelled items, if asked to explain."
    )
    moved: "MovedBody | None" = Field(
        default=None, description="How the policy gave the item its place, if asked to explain."
    )
    source: str | None = Field(default=None, description="Source of a retrieved item, as of a retrieval.")
    ranks: dict[str, int] | None = Field(
        default=None, description="Rank of a retrieved item in each source that found it, if asked to explain."
    )


class MovedBody(BaseModel):
    """Place of an item without the policy, and the rules that gave it its place."""

    place: int = Field(description="Place by relevance alone, from 1, among the candidates that were not left out.")
    times: float = Field(description="Factor by which boosts changed the odds, or the reciprocal rank; 1 without one.")
    pinned: bool = Field(description="A pin gave the item its place.")
    drawn: bool = Field(description="Chance gave the item a place of new items.")
    propensity: float = Field(description="Probability with which chance chose the item; 1 if it did not.")
    similarity: float = Field(description="Largest similarity with an item that was placed before; 0 if not compared.")


class LeftOutBody(BaseModel):
    """Candidates that a policy left out."""

    consumed: list[str] = Field(description="Consumed by the user; of the candidates of the request.")
    cap: list[str] = Field(description="Refused by the cap of a column, and more relevant than the last item shown.")


class NeighbourBody(BaseModel):
    """Labelled item of the user that corrected a new item's score."""

    item: str
    label: int = Field(description="1 if the user liked the item, 0 if not.")
    log_odds: float = Field(description="Part of the correction that the item caused.")


class CorrectionBody(BaseModel):
    """Change of a new item's score by the user's labelled items that are near to it."""

    log_odds: float = Field(description="Change of the log-odds of `score`; `reasons` are those without it.")
    neighbours: list[NeighbourBody] = Field(description="Labelled items with the largest parts, largest first.")


class RankResponse(BaseModel):
    """Items, best first, and the bundle that ranked them."""

    bundle: str
    items: list[RankedItemBody]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool
    impression: str | None = Field(default=None, description="Id to send with outcomes of these items.")
    as_of: datetime | int | None = Field(
        default=None,
        description="Time as of which aggregates were answered: that of the request, or of the stream's newest event.",
    )
    as_of_source: str | None = Field(default=None, description="`request`, or `stream`; absent without aggregates.")
    stale: bool = Field(description="The store did not answer: rows and history are as they were last seen.")
    policy: str | None = Field(default=None, description="Policy that arranged the items, if the request named one.")
    left_out: LeftOutBody | None = Field(
        default=None, description="Candidates that the policy left out, if asked to explain."
    )


def microseconds(moment: datetime) -> int:
    """Returns a time in microseconds since 1970; a time without an offset is UTC."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - EPOCH) // timedelta(microseconds=1)


class RetrieveRequest(BaseModel):
    """Request for the items nearest to an item, to a user's liked items, or to a text, that match a filter."""

    model_config = _example(item="1", k=5, filter={"column": "year", "gte": 1990})

    item: Id | None = Field(default=None, description="Nearest to this item's content.")
    user: Id | None = Field(
        default=None, description="For this user: by the bundle's towers, and nearest to the mean of the liked items."
    )
    text: Annotated[LongText, Field(min_length=1, max_length=16_384)] | None = Field(
        default=None, description="Nearest to this text, by the bundle's encoder."
    )
    k: int = Field(default=10, ge=1, le=MAX_CANDIDATES, description="Most items to return.")
    filter: Filter | None = Field(default=None, description="Condition on the filterable columns.")
    view: Text | None = Field(
        default=None,
        description="View of the vectors; by default `similar` for an item, if the bundle has it, otherwise `base`.",
    )

    aspect: Text | None = Field(
        default=None, description="Nearest in this aspect of the bundle, such as people, instead of in a view."
    )
    avoid: Concepts = Field(default=[], description="Concepts from which the query steers away; they may still come.")
    without: Concepts = Field(
        default=[], description="Concepts that no item may carry, by its column or, where that is empty, predicted."
    )
    explain: bool = Field(default=False, description="Name the concepts that each item shares most with the query.")
    policy: PolicyName | None = Field(
        default=None, description="Policy of the dataset that arranges the items; by default their scores do."
    )
    shown_to: Id | None = Field(
        default=None,
        description="User to whom the items are shown, if the request asks by an item or a text: the policy leaves out "
        "what this user has consumed.",
    )
    channels: Annotated[list[Literal["content", "lexical"]], Field(min_length=1, max_length=2)] | None = Field(
        default=None,
        description="Channels of a text: content, the vectors; lexical, the words (BM25). Two channels are fused by "
        "reciprocal ranks. By default both; content alone with avoid, or if the bundle has no texts.",
    )

    sources: Sources | None = Field(
        default=None,
        description="Sources for a user: towers, what behaviour has taught; content, the liked items' vectors. Two "
        "sources are fused by reciprocal ranks. By default both; content alone with avoid, view or aspect, or if the "
        "bundle has no towers.",
    )

    @model_validator(mode="after")
    def _one_query(self) -> "RetrieveRequest":
        if sum(one is not None for one in (self.item, self.user, self.text)) != 1:
            raise ValueError("expected exactly one of item, user, text")
        if self.aspect is not None and self.view is not None:
            raise ValueError("aspect and view are both spaces to search in; leave one out")
        if self.aspect is not None and self.avoid and self.text is None:
            raise ValueError("an aspect of items has no concepts to avoid; use without, or leave aspect out")
        if self.channels is not None and (self.text is None or self.aspect is not None):
            raise ValueError("channels search a text outside aspects; leave channels out")
        if self.channels is not None and len(set(self.channels)) < len(self.channels):
            raise ValueError("channels: a channel is named twice; name it once")
        if self.avoid and "lexical" in (self.channels or ()):
            raise ValueError("words have no concepts to avoid; use without, or the channel content alone")
        if self.view is not None and self.channels == ["lexical"]:
            raise ValueError("the channel lexical has no view; leave view out")
        if self.shown_to is not None and self.policy is None:
            raise ValueError("shown_to is read by a policy; name policy too, or leave shown_to out")
        if self.sources is not None and self.user is None:
            raise ValueError("sources find items for a user; leave sources out")
        named = {"avoid": self.avoid, "view": self.view, "aspect": self.aspect}
        _check_sources(self.sources, next((name for name, value in named.items() if value), ""))
        return self


class SharedConceptBody(BaseModel):
    """Concept that an item shares with the query."""

    concept: str
    share: float = Field(description="Probability that both carry the concept.")
    predicted: bool = Field(description="False if both items declare the concept in a column.")


class RetrievedItemBody(BaseModel):
    """Retrieved item of an answer."""

    item: str
    score: float = Field(
        description="Cosine similarity; BM25 for the channel lexical alone; where two lists are fused, the sum of 1 / "
        "(60 + rank), for lexical 10 / (60 + rank); 0 for the most popular items, which are the fallback."
    )
    source: str | None = Field(
        default=None,
        description="Source that found the item for a user: towers, content, both, or popular, which is the fallback.",
    )
    ranks: dict[str, int] | None = Field(
        default=None, description="Rank in each channel or source that found the item, from 1; for a text or a user."
    )
    concepts: list[SharedConceptBody] | None = Field(
        default=None, description="Concepts shared most with the query, if the request asked to explain."
    )
    moved: MovedBody | None = Field(
        default=None, description="How the policy gave the item its place, if asked to explain."
    )


class PlanView(BaseModel):
    """Search plan of a retrieval."""

    method: str = Field(description="exact, ivf, ivf+filter, ivf>filter, bits, bits>filter, words, or popular.")
    why: str
    share: float = Field(description="Approximate share of the items that match.")
    matches: int | None = Field(description="Number of matches, if counted.")


class RetrieveResponse(BaseModel):
    """Items, nearest first, and the search plan."""

    bundle: str
    items: list[RetrievedItemBody]
    plan: PlanView
    view: str = Field(description="View in which the items are nearest.")
    aspect: str | None = Field(default=None, description="Aspect in which they are, where one was asked for.")
    channels: list[str] | None = Field(default=None, description="Channels that were searched; for a text alone.")
    sources: list[str] | None = Field(
        default=None, description="Sources that ranked items, fused if there are two; for a user alone."
    )
    space: str | None = Field(
        default=None,
        description="Id of the space whose vectors were compared, if any were; that of content if two sources were.",
    )
    policy: str | None = Field(default=None, description="Policy that arranged the items, if the request named one.")


class EmbeddingsRequest(BaseModel):
    """Request for vectors of one feature's values."""

    model_config = _example(feature="item_id", values=["42", "43"])

    feature: Text = Field(description="A feature of the bundle's schema.")
    values: list[Value] = Field(
        min_length=1, max_length=MAX_CANDIDATES, description="Values, or lists of them to be pooled."
    )


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the values, and the bundle that they belong to."""

    bundle: str
    feature: str
    width: int
    vectors: list[list[float]]


class EventsRequest(BaseModel):
    """Events for the log: rows of the dataset's events, under its columns' own names."""

    model_config = _example(events=[{"user_id": "42", "item_id": "7", "time": 1735689600, "label": 1}])

    events: list[dict[Text, Cell]] = Field(min_length=1, max_length=MAX_ROWS)


class OutcomeRow(BaseModel):
    """Action of a user on an item that was shown."""

    model_config = ConfigDict(extra="forbid")

    impression: Annotated[Text, Field(min_length=1)] = Field(description="`impression` of the answer that showed it.")
    item: Id
    what: Annotated[Text, Field(min_length=1)] = Field(default="click", description="click, or a conversion's name.")
    time_ms: Int64 | None = Field(default=None, description="Milliseconds since 1970; by default now.")


class OutcomesRequest(BaseModel):
    """Outcomes for the log; an outcome that is sent again counts once."""

    model_config = _example(outcomes=[{"impression": "4f1c…", "item": "7"}])

    outcomes: list[OutcomeRow] = Field(min_length=1, max_length=MAX_ROWS)


class ItemsRequest(BaseModel):
    """Items for the log: rows of the dataset's items; a row with `_deleted` true deletes its item."""

    model_config = _example(items=[{"item_id": "7", "title": "A new article"}])

    items: list[dict[Text, Cell]] = Field(min_length=1, max_length=MAX_ROWS)


class Accepted(BaseModel):
    """Confirms that the rows are in the log; the stream will consume them."""

    accepted: int


class ItemResponse(BaseModel):
    """Item as the bundle and the stream know it."""

    bundle: str
    item: str
    encoder: str = Field(description="Id of the encoder that made the vector; empty without content.")
    codebook: str = Field(description="Id of the codebook that made the Semantic ID; empty without content.")
    semantic_id: list[int]
    vector: list[float]
    attributes: dict[str, Any]


class VersionResponse(BaseModel):
    """Bundle that answers."""

    bundle: str
    model: str
    encoder: str | None
    codebook: str | None


class ReadyResponse(BaseModel):
    """Readiness of the server, the source of its rows, and the reason if that is not the store."""

    status: str
    bundle: str
    mirror: dict[str, Any] | None = None
    store: str | None = None
