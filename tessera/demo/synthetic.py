"""A synthetic dataset: a generated library of how-to articles, its readers, and what they were shown and clicked.

Everything here is made up; it exists so that the platform can be tried, shown and tested without any download. What
the data follow is known by construction. Articles live in a tree of 12 topics x 6 subtopics and their text is drawn
from the subtopic's words. A reader likes some topics, and some subtopics of those more. The chance of a click is

    logistic(bias + taste[reader, subtopic] + quality[article] + generosity[reader])

with the bias set so that 30 % of impressions are clicked. About 12 % of the articles first appear in the last 15 % of
the time: they are in no training part, and only their text says who will like them.
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import DatasetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAYS = 60
LATE_FROM_DAY = 51  # the last 15 % of the days; the training part ends on day 48
_START_S = 1_735_689_600  # 2025-01-01T00:00:00Z
_DAY_S = 86_400
_CLICK_RATE = 0.3
_CIRCLES = 8
_LATE, _CROSSOVER, _UNKNOWN = 0.12, 0.15, 0.002
_AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55+")
_COUNTRIES = ("DE", "FR", "GB", "IT", "NL", "PL", "SE", "US")
_FORMATS = ("article", "video", "podcast", "course")
_SPEC = "synthetic.json"


@dataclass(frozen=True)
class SyntheticSpec:
    """Specification of a generated dataset, byte for byte; kept beside it as synthetic.json."""

    seed: int
    users: int
    items: int
    events: int

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("users", 50), ("items", 100), ("events", 1_000)):
            if getattr(self, name) < least:
                raise DatasetError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def rng(self, purpose: int) -> np.random.Generator:
        """Numbers of one purpose alone, so that a change in one part leaves the others as they are."""
        return np.random.default_rng([self.seed, purpose])


@dataclass(frozen=True)
class TopicTree:
    """Topic tree of S subtopics, each with its topic, its own words and those of its topic; and templates."""

    names: tuple[str, ...]
    topics: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    shared: tuple[tuple[str, ...], ...]
    titles: tuple[str, ...]
    sentences: tuple[str, ...]

    @property
    def topic_index(self) -> Ints:
        """(S,) the topic's number."""
        order = list(dict.fromkeys(self.topics))
        return np.array([order.index(topic) for topic in self.topics])


@cache
def tree() -> TopicTree:
    """Reads the topic tree that comes with the package."""
    document = tomllib.loads(_resource("synthetic_words.toml"))
    rows = [
        (name, topic, tuple(words.split()), tuple(table["shared"].split()))
        for topic, table in document["topics"].items()
        for name, words in table.items()
        if name != "shared"
    ]
    names, topics, words, shared = zip(*rows, strict=True)
    return TopicTree(names, topics, words, shared, tuple(document["titles"]), tuple(document["sentences"]))


def write_synthetic(
    directory: Path, *, seed: int = 0, users: int = 2_000, items: int = 1_500, events: int = 120_000
) -> Path:
    """Writes items.jsonl, users.parquet, events.parquet, and dataset.toml that describes them.

    The same arguments give the same bytes.

    Args:
        directory: made where it does not exist; files of these names in it are replaced.
        events: impressions.

    Returns:
        The path of dataset.toml.

    Raises:
        DatasetError: a number is too small for a dataset that can be split.
    """
    spec = SyntheticSpec(seed, users, items, events)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    catalogue = _catalogue(spec)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _item_rows(spec, catalogue)]
    (directory / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    readers = _readers(spec)
    readers.profile.write_parquet(directory / "users.parquet")
    _impressions(spec, catalogue, readers).write_parquet(directory / "events.parquet")
    (directory / _SPEC).write_text(json.dumps(asdict(spec)) + "\n", encoding="utf-8")
    descriptor = directory / "dataset.toml"
    descriptor.write_text(_resource("synthetic_dataset.toml").replace("{seed}", str(seed)), encoding="utf-8")
    return descriptor


def new_item(seed: int, subtopic: str | None = None) -> dict[str, Any]:
    """Returns a new item with the columns of items.jsonl, as JSON values; its id is in no generated catalogue.

    Args:
        seed: decides all of it, the id included.
        subtopic: one of `tree().names`; by default the seed picks one.
    """
    rng = np.random.default_rng([seed, 99])
    picked = int(rng.integers(len(tree().names))) if subtopic is None else _subtopic(subtopic)
    return _item_row(f"new-{seed:04}", np.array([picked, picked]), 2025, rng)


def is_synthetic(directory: Path) -> bool:
    """Returns whether `write_synthetic` made the directory's dataset."""
    return (Path(directory) / _SPEC).is_file()


def tastes(directory: Path, users: Sequence[str]) -> Floats:
    """Returns how much users like the subtopics: (U, S) log-odds, columns in the order of `tree().names`.

    Tastes are in none of the dataset's files; they are drawn again from the seed.

    Raises:
        DatasetError: the directory was not made by `write_synthetic`, or a user is not in its dataset.
    """
    taste = _readers(_spec(directory)).taste
    rows = {_user_id(row): row for row in range(len(taste))}
    unknown = [user for user in users if user not in rows]
    if unknown:
        raise DatasetError(f"user {unknown[0]!r} is not in the synthetic dataset at {directory}; its users are r00000…")
    chosen: Floats = taste[[rows[user] for user in users]]
    return chosen


def fans(directory: Path, subtopic: str, *, clicks: int = 5) -> list[str]:
    """Returns the users who like a subtopic most, strongest taste first, of those who clicked at least `clicks` times.

    Raises:
        DatasetError: the directory was not made by `write_synthetic`, or there is no such subtopic.
    """
    taste = _readers(_spec(directory)).taste[:, _subtopic(subtopic)]
    clicked = pl.read_parquet(Path(directory) / "events.parquet").filter(pl.col("clicked") == 1)
    counts = clicked.group_by("user_id").len().filter(pl.col("len") >= clicks)
    known = set(counts["user_id"])
    order = [int(row) for row in np.argsort(-taste, kind="stable") if taste[row] > 1.0]
    return [_user_id(row) for row in order if _user_id(row) in known]


def _spec(directory: Path) -> SyntheticSpec:
    path = Path(directory) / _SPEC
    if not path.is_file():
        raise DatasetError(f"{path} is missing: tastes are known of a dataset that write_synthetic made, of no other")
    return SyntheticSpec(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _Catalogue:
    """Latent properties of N items: both subtopics (N, 2), first day, quality, and weight of exposure."""

    subtopics: Ints
    first_day: Ints
    quality: Floats
    exposure: Floats


@dataclass(frozen=True)
class _Readers:
    """Latent properties of U users: taste (U, S), generosity, weight of each day (U, DAYS); and their profile."""

    taste: Floats
    generosity: Floats
    presence: Floats
    profile: pl.DataFrame


def _catalogue(spec: SyntheticSpec) -> _Catalogue:
    rng = spec.rng(1)
    count, topic = spec.items, tree().topic_index
    first = rng.integers(len(topic), size=count)
    second = np.where(rng.random(count) < _CROSSOVER, rng.integers(len(topic), size=count), first)
    # Half of the catalogue is there from the start, the late share comes last, the rest day by day between.
    moment = rng.permutation(count) / count
    growing = (moment - 0.5) / (0.5 - _LATE) * LATE_FROM_DAY
    late = LATE_FROM_DAY + (moment - (1 - _LATE)) / _LATE * (DAYS - LATE_FROM_DAY - 2)
    first_day = np.where(moment < 0.5, 0, np.where(moment < 1 - _LATE, growing, late)).astype(np.int64)
    rank = rng.permutation(count)
    return _Catalogue(np.stack([first, second], axis=1), first_day, rng.normal(0, 0.5, count), 1 / (rank + 20) ** 0.8)


def _readers(spec: SyntheticSpec) -> _Readers:
    rng = spec.rng(2)
    count, topic = spec.users, tree().topic_index
    topics = int(topic.max()) + 1
    age = rng.choice(len(_AGE_GROUPS), size=count, p=[0.2, 0.28, 0.22, 0.16, 0.14])
    country = rng.choice(len(_COUNTRIES), size=count)
    appeal = rng.normal(0, 0.5, len(topic))
    by_age = rng.normal(0, 0.8, (len(_AGE_GROUPS), topics))
    # Tastes cluster: readers of one circle mostly love the same topics.
    circle = rng.normal(0, 1.5, (_CIRCLES, topics))[rng.integers(_CIRCLES, size=count)]
    loved = (-circle + rng.normal(0, 0.5, circle.shape)).argsort(axis=1).argsort(axis=1) < 3
    topic_taste = by_age[age] + np.where(loved, 2.0, -0.8) + rng.normal(0, 0.3, (count, topics))
    favourite = rng.random((count, len(topic))) < np.where(loved[:, topic], 0.4, 0.01)
    taste = appeal + topic_taste[:, topic] + 2.0 * favourite + rng.normal(0, 0.3, (count, len(topic)))
    # Users come and go: each stays for a stretch that may begin before the first day and end after the last.
    begin = rng.uniform(-40, DAYS - 10, count)[:, None]
    end = begin + rng.gamma(2.0, 25.0, count)[:, None] + 5
    day = np.arange(DAYS)[None, :]
    presence = rng.gamma(2.0, 1.0, count)[:, None] * ((day >= begin) & (day < end))
    unknown = rng.random(count) < 0.02
    profile = pl.DataFrame(
        {
            "user_id": [_user_id(row) for row in range(count)],
            "age_group": [_AGE_GROUPS[number] for number in age],
            "country": [None if hidden else _COUNTRIES[n] for n, hidden in zip(country, unknown, strict=True)],
        }
    )
    return _Readers(taste, rng.normal(0, 0.3, count), presence, profile)


def _impressions(spec: SyntheticSpec, catalogue: _Catalogue, readers: _Readers) -> pl.DataFrame:
    """Draws the shown items: user, item, time, and a click or none; in order of time."""
    rng = spec.rng(3)
    # An even number a day, busier in the evening: the last 15 % of the time is then the last 15 % of the events too.
    day = np.sort(np.arange(spec.events) % DAYS)
    second = (rng.beta(5, 2.5, spec.events) * _DAY_S).astype(np.int64)
    user, item = np.empty(spec.events, dtype=np.int64), np.empty(spec.events, dtype=np.int64)
    for today in range(DAYS):
        now = day == today
        user[now] = _draw(readers.presence[:, today], int(now.sum()), rng)
        item[now] = _draw(catalogue.exposure * (catalogue.first_day <= today), int(now.sum()), rng)
    liking = readers.taste[user[:, None], catalogue.subtopics[item]] @ np.array([0.65, 0.35])
    logit = liking + catalogue.quality[item] + readers.generosity[user]
    clicked = rng.random(spec.events) < _logistic(logit + _bias(logit))
    ids = np.array([_item_id(row) for row in range(spec.items)], dtype=object)[item]
    gone = rng.random(spec.events) < _UNKNOWN
    ids[gone] = [f"gone-{number:03}" for number in rng.integers(40, size=int(gone.sum()))]
    order = np.argsort(day * _DAY_S + second, kind="stable")
    frame = pl.DataFrame(
        {
            "user_id": [_user_id(row) for row in user.tolist()],
            "item_id": ids.tolist(),
            "time": _START_S + day * _DAY_S + second,
            "clicked": clicked.astype(np.int8),
        }
    )
    return frame[order]


def _draw(weights: Floats, size: int, rng: np.random.Generator) -> Ints:
    """Draws row numbers (size,) by weight."""
    edges = np.cumsum(weights)
    rows: Ints = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    return rows


def _logistic(logit: Floats) -> Floats:
    chance: Floats = 1 / (1 + np.exp(-logit))
    return chance


def _bias(logit: Floats) -> float:
    """Returns the bias that makes the mean chance the click rate, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _logistic(logit + middle).mean() > _CLICK_RATE else (middle, high)
    return low


def _item_rows(spec: SyntheticSpec, catalogue: _Catalogue) -> list[dict[str, Any]]:
    rng = spec.rng(4)
    years = np.where(catalogue.first_day > 0, 2025, 2025 - rng.integers(0, 12, spec.items))
    return [_item_row(_item_id(row), catalogue.subtopics[row], int(years[row]), rng) for row in range(spec.items)]


def _item_row(item_id: str, subtopics: Ints, year: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a row of items.jsonl; of two subtopics, the first gives two words in three."""
    topics = tree()
    first, second = (int(number) for number in subtopics)
    own = [*topics.words[first], *topics.words[first], *topics.words[second]]
    title = _pick(own, 2, rng)
    order = rng.permutation(len(topics.sentences))[: int(rng.integers(2, 4))]
    sentences = [topics.sentences[number] for number in order]
    described = [_fill(sentence, _pick([*own, *topics.shared[first]], 3, rng)) for sentence in sentences]
    return {
        "item_id": item_id,
        "title": _fill(topics.titles[int(rng.integers(len(topics.titles)))], title, topics.names[first]),
        "description": " ".join(described),
        "topic": list(dict.fromkeys([topics.topics[first], topics.topics[second]])),
        "format": _FORMATS[int(rng.choice(len(_FORMATS), p=[0.5, 0.25, 0.15, 0.1]))],
        "year": year,
    }


def _pick(pool: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Draws different words; a word that occurs more often in the pool is drawn more often."""
    shuffled = rng.permutation(len(pool)).tolist()
    return list(dict.fromkeys(pool[index] for index in shuffled))[:count]


def _fill(template: str, words: Sequence[str], sub: str = "") -> str:
    named = dict(zip("abc", words, strict=False)) | {"A": words[0].capitalize(), "sub": sub, "Sub": sub.capitalize()}
    return template.format(**named)


def _resource(name: str) -> str:
    return resources.files("tessera.demo").joinpath(name).read_text(encoding="utf-8")


def _subtopic(name: str) -> int:
    names = tree().names
    if name not in names:
        raise DatasetError(f"subtopic {name!r} is unknown; choose one of: {', '.join(names)}")
    return names.index(name)


def _item_id(row: int) -> str:
    return f"a{row:05}"


def _user_id(row: int) -> str:
    return f"r{row:05}"
