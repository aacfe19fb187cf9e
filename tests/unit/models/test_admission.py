"""Admission: a value reads rows only after enough sightings, counted never too low."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError
from features.hashing import fingerprint, value_keys
from features.history import Jagged
from models.ranker.dropout import DropoutConfig, ValueDropout, users_per_value
from models.table.admission import FALSE_SIGHTINGS, MOST_SIGHTINGS, Admission, RecentSightings, Sketch
from models.table.batch import Assembler, Entities, Examples
from models.table.key_set import KeySet
from models.table.schema import Feature, Schema

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40)


def keys_of(*values: str) -> NDArray[np.uint64]:
    return value_keys("s", fingerprint(values))


def ones(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.ones(len(keys), dtype=np.int64)


@given(KEYS, st.lists(st.integers(1, 300), min_size=40, max_size=40))
def test_a_sketch_counts_exactly_in_room_and_never_too_low_without(keys: list[int], times: list[int]) -> None:
    array = np.array(keys, dtype=np.uint64)
    often = np.array(times[: len(keys)])
    true = np.array([min(often[array == key].sum(), MOST_SIGHTINGS) for key in array])
    for width in (1 << 16, 4, 1):
        sketch = Sketch(np.zeros((4, width), dtype=np.uint8))
        sketch.add(array, often)
        assert (sketch.count(array) >= true).all()
        if width > 4:
            np.testing.assert_array_equal(sketch.count(array), true)


@given(KEYS, st.integers(0, 40), st.sampled_from([4, 1 << 16]))
def test_a_sketch_of_two_parts_counts_no_lower_than_their_sum(keys: list[int], cut: int, width: int) -> None:
    array = np.array(keys, dtype=np.uint64)
    halves = Sketch.wide(width)
    for part in (array[:cut], array[cut:]):
        halves.add(part, ones(part))
    true = np.array([(array == key).sum() for key in array])
    assert (halves.count(array) >= true).all()
    assert width == 4 or (halves.count(array) == true).all()


def test_few_of_many_unseen_values_are_taken_for_seen() -> None:
    seen, unseen = keys_of(*map(str, range(5_000))), keys_of(*map(str, range(5_000, 25_000)))
    sketch = Sketch.sized(len(seen))
    sketch.add(seen, ones(seen))
    # A cell is taken with probability 1 - exp(-5000 / 32768) = .14, all four with .0004.
    assert (sketch.count(unseen) > 0).mean() < 0.002


def test_a_value_is_admitted_by_its_last_missing_sighting_and_named_once() -> None:
    admission = Admission(Sketch.sized(10), 3)
    key = keys_of("a")
    assert admission.sight(key, np.array([2])).tolist() == []
    assert not admission.admits(key).any()
    assert admission.sight(np.repeat(key, 2), np.array([1, 5])).tolist() == key.tolist()
    assert admission.admits(key).all()
    assert admission.sight(key, np.array([1])).tolist() == []


def test_what_training_saw_often_enough_is_admitted_from_the_start_and_its_sketch_stays() -> None:
    sketch = Sketch.sized(10)
    sketch.add(keys_of("often", "once"), np.array([2, 1]))
    before = sketch.cells.copy()
    admission = Admission(sketch, 2)
    assert admission.admits(keys_of("often", "once", "never")).tolist() == [True, False, False]
    admission.sight(keys_of("once", "never"), np.array([1, 9]))
    assert admission.admits(keys_of("often", "once", "never")).all()
    assert sketch.cells.tobytes() == before.tobytes()
    assert Admission(sketch, 0).admits(keys_of("never")).all()


def test_another_one_that_is_told_the_keys_admits_the_same() -> None:
    trainer, server = Admission(Sketch.sized(100), 2), Admission(Sketch.sized(100), 2)
    rng = np.random.default_rng(0)
    every = keys_of(*map(str, range(50)))
    for _ in range(5):
        server.admit(trainer.sight(rng.choice(every, 20), ones(every[:20])))
        np.testing.assert_array_equal(server.admits(every), trainer.admits(every))
    assert 0 < trainer.admits(every).sum() < 50


def test_what_the_log_says_was_admitted_brings_back_the_same_state_and_so_does_a_copy_of_it() -> None:
    rng = np.random.default_rng(1)
    every = rng.integers(0, 2**64, 60, dtype=np.uint64)
    first, again = Admission(Sketch.sized(10), 3), Admission(Sketch.sized(10), 3)
    for number in range(8):
        keys, times = rng.choice(every, 30), rng.integers(1, 2, 30)
        told = first.sight(keys, times)
        assert again.sight(keys, times, admitted=told).tobytes() == told.tobytes()
        if number == 4:
            copy = Admission(Sketch.sized(10), 3)
            copy.restore(again.state())
            again = copy
    assert 0 < len(first.added) < 60
    assert {name: found.tobytes() for name, found in first.state().items()} == {
        name: found.tobytes() for name, found in again.state().items()
    }


def test_a_state_of_before_there_were_generations_keeps_what_the_stream_had_sighted() -> None:
    published = Sketch.sized(10)
    published.add(keys_of("trained"), np.array([1]))
    live = Sketch(published.cells.copy())
    live.add(keys_of("trained", "streamed"), np.array([1, 2]))
    old = Admission(published, 3)
    old.restore({"sketch": live.cells, "admitted": keys_of("before")})
    assert old.admits(keys_of("before", "trained", "streamed")).tolist() == [True, False, False]
    assert sorted(old.sight(keys_of("trained", "streamed", "new"), np.array([1, 1, 1]))) == sorted(
        keys_of("trained", "streamed")
    )


def test_new_values_are_not_taken_for_seen_however_many_came_before() -> None:
    rng = np.random.default_rng(0)
    admission = Admission(Sketch.sized(10_000), 2)
    shares = []
    for _ in range(12):
        keys = rng.integers(0, 2**64, 25_000, dtype=np.uint64)
        shares.append(len(admission.sight(keys, ones(keys))) / len(keys))
    assert max(shares) <= FALSE_SIGHTINGS
    # A second sighting within the capacity is never missed.
    assert np.isin(keys, admission.added).mean() <= FALSE_SIGHTINGS
    admission.sight(keys[:1_000], ones(keys[:1_000]))
    assert np.isin(keys[:1_000], admission.added).all()


def test_forgetting_depends_on_the_sightings_not_on_how_they_are_cut() -> None:
    keys = np.unique(np.random.default_rng(2).integers(0, 2**64, 300, dtype=np.uint64))
    whole, parts = RecentSightings(512), RecentSightings(512)
    whole.add(keys, ones(keys))
    for part in np.array_split(keys, 7):
        parts.add(part, ones(part))
    assert [parts.state()[name].tobytes() for name in ("older", "newer", "held")] == [
        whole.state()[name].tobytes() for name in ("older", "newer", "held")
    ]
    assert (whole.count(keys[-64:]) >= 1).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 20) | st.integers(0, 2**64 - 1), max_size=50), max_size=8), st.booleans())
def test_a_key_set_is_a_set(batches: list[list[int]], big: bool) -> None:
    true: set[int] = set(range(3_000, 6_000)) if big else set()
    found = KeySet(np.array(sorted(true), dtype=np.uint64))
    for batch in batches:
        found.add(np.array(batch, dtype=np.uint64))
        true |= set(batch)
        asked = np.array([*batch, *range(25), 5_999], dtype=np.uint64)
        assert found.holds(asked).tolist() == [int(key) in true for key in asked]
    assert len(found) == len(true)
    assert found.sorted().tolist() == sorted(true)


def test_a_key_set_that_grows_moves_little_at_a_time_and_loses_nothing() -> None:
    keys = np.random.default_rng(3).integers(1, 2**64, 20_000, dtype=np.uint64)
    found, moving = KeySet(), 0
    for start in range(0, len(keys), 100):
        found.add(keys[start : start + 100])
        assert found.holds(keys[: start + 100]).all()
        moving += found._old is not None
    assert moving > 3
    assert not found.holds(keys ^ np.uint64(1)).any()
    assert found.slots <= 5 * len(keys)
    np.testing.assert_array_equal(found.sorted(), np.unique(keys))


def test_a_question_and_an_admission_cost_the_same_whatever_was_admitted_before() -> None:
    rng = np.random.default_rng(4)
    few, many = Admission(Sketch.sized(10), 2), Admission(Sketch.sized(10), 2)
    many.admit(rng.integers(0, 2**64, 400_000, dtype=np.uint64))

    def least_s(admission: Admission) -> float:
        took = []
        for _ in range(15):
            keys = rng.integers(0, 2**64, 64, dtype=np.uint64)
            began = time.process_time()
            admission.admits(keys)
            admission.admit(keys)
            took.append(time.process_time() - began)
        return min(took)

    assert least_s(many) < 5 * least_s(few)


@pytest.mark.parametrize("threshold", [-1, 256])
def test_a_threshold_that_no_counter_can_reach_is_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match="threshold from 0 to 255"):
        Admission(Sketch.sized(0), threshold)
    with pytest.raises(BundleError, match="admission: expected 0 to 255"):
        Schema((), (), rows=1, dim=4, history_length=1, admission=threshold)


def test_a_sketch_of_another_shape_is_refused() -> None:
    for cells in (np.zeros((4, 3), np.uint8), np.zeros(4, np.uint8), np.zeros((4, 4), np.int64)):
        with pytest.raises(ValueError, match="power of two"):
            Sketch(cells)  # type: ignore[arg-type]


SCHEMA = Schema(
    features=(
        Feature("item_id", "item", "item_id", "item_id", 2),
        Feature("item.tags", "item", "tags", "item.tags"),
        Feature("item.kind", "item", "kind", "item.kind", 1, "mean", ("book", "film")),
        Feature("history.tags", "history", "tags", "item.tags"),
    ),
    numeric=(),
    rows=64,
    dim=4,
    history_length=3,
    admission=2,
)
ITEMS = pl.DataFrame(
    {"item_id": ["a", "b", "c"], "tags": [["x", "y"], ["x"], ["z"]], "kind": ["film", "tape", None]},
    schema_overrides={"tags": pl.List(pl.String)},
)


def world(admission: Admission) -> Assembler:
    nobody = Entities(SCHEMA, "user", pl.DataFrame({"user_id": ["u"]}), admission)
    events = Entities(SCHEMA, "event", pl.DataFrame({"nothing": [0]}), admission)
    return Assembler(SCHEMA, nobody, Entities(SCHEMA, "item", ITEMS, admission), events)


def examples(*items: int, history: list[int] | None = None) -> Examples:
    zeros = np.zeros(len(items), dtype=np.int64)
    past = np.array((history or []) * len(items), dtype=np.int64)
    offsets = np.arange(len(items) + 1) * len(history or [])
    return Examples(zeros, np.array(items), Jagged(past, offsets), np.zeros(0, dtype=np.float32), zeros)


def lengths(source: Assembler, shown: Examples, **options: Any) -> dict[str, list[int]]:
    found = source.batch(shown, **options).lengths.view(-1, len(shown)).tolist()
    return dict(zip(SCHEMA.keys, found, strict=True))


def test_a_value_reads_nothing_until_it_is_admitted_then_its_rows() -> None:
    source = world(Admission(Sketch.sized(10), 2))
    assert lengths(source, examples(0, 1))["item_id#0"] == [0, 0]
    source.admission.sight(*source.sightings(examples(0, 1)))
    # x was seen in both items, everything else once.
    found = lengths(source, examples(0, 1, 2, history=[0, 1]))
    assert found["item_id#0"] == found["item_id#1"] == [0, 0, 0]
    assert found["item.tags#0"] == [1, 1, 0]
    assert found["history.tags#0"] == [2, 2, 2]
    source.admission.sight(*source.sightings(examples(0)))
    assert lengths(source, examples(0, 1))["item_id#1"] == [1, 0]
    assert lengths(source, examples(0, 1))["item.tags#0"] == [2, 1]


def test_the_mean_is_over_the_admitted_values() -> None:
    source = world(Admission(Sketch.sized(10), 2))
    source.admission.sight(*source.sightings(examples(0, 1)))
    batch = source.batch(examples(0))
    assert batch.scale[0, SCHEMA.keys.index("item.tags#0")] == 1.0


def test_histories_and_exact_values_are_no_sightings() -> None:
    source = world(Admission(Sketch.sized(10), 2))
    keys, times = source.sightings(examples(0, 0, history=[1, 2]))
    expected = {*value_keys("item_id", fingerprint(["a"])), *value_keys("item.tags", fingerprint(["x", "y"]))}
    assert set(keys) == expected
    assert times.tolist() == [2, 2, 2]


def test_an_exact_value_has_rows_of_its_own_and_any_other_reads_none() -> None:
    source = world(Admission.off())
    batch = source.batch(examples(0, 1, 2), [SCHEMA.features[2]])
    assert batch.lengths.tolist() == [1, 0, 0]
    # Behind the hashed rows: film is the second of two.
    assert batch.values.tolist() == [63]
    hashed = source.batch(examples(0, 1, 2), [f for f in SCHEMA.features if not f.exact]).values
    assert int(hashed.max()) < SCHEMA.hashed_rows == 62


def test_a_dropped_feature_reads_nothing_and_the_others_what_they_did() -> None:
    source = world(Admission.off())
    limits = np.array([[0, 255, 255, 255], [255, 0, 255, 255]], dtype=np.uint8)
    found = lengths(source, examples(0, 0), limits=limits)
    assert found["item_id#0"] == found["item_id#1"] == [0, 1]
    assert found["item.tags#0"] == [2, 0]
    assert found["item.kind#0"] == [1, 1]


def test_a_limit_keeps_the_first_values() -> None:
    source = world(Admission.off())
    limits = np.array([[255, 1, 255, 255]], dtype=np.uint8)
    tags = SCHEMA.keys.index("item.tags#0")
    whole, cut = source.batch(examples(0)), source.batch(examples(0), limits=limits)
    assert whole.lengths[tags] == 2
    assert cut.lengths[tags] == 1
    first = whole.lengths[:tags].sum()
    assert cut.values[first] == whole.values[first]
    assert cut.scale[0, tags] == 1.0


def test_dropout_hides_an_id_and_the_depth_of_its_semantic_id_together_and_nothing_without_admission() -> None:
    features = (
        Feature("user_id", "user", "user_id", "user_id"),
        Feature("user.sex", "user", "sex", "user.sex", vocabulary=("f", "m")),
        Feature("item_id", "item", "item_id", "item_id"),
        Feature("semantic_id", "item", "semantic_id", "semantic_id", pooling="sum"),
        Feature("history.item_id", "history", "item_id", "item_id"),
    )
    schema = Schema(features, (), rows=64, dim=4, history_length=3, admission=2)
    size = 4_000
    found = ValueDropout(schema, DropoutConfig(value=0.1, item=0.5, user=0.0)).limits(np.random.default_rng(0), size)
    assert found is not None
    user, sex, item, code, history = found.T
    assert (sex == 255).all()
    assert (history == 255).all()
    assert 0.08 < (user == 0).mean() < 0.12
    assert 0.47 < (item == 0).mean() < 0.53
    assert np.array_equal(item == 0, code < 255)
    shares = np.bincount(code[code < 255]) / (code < 255).sum()
    assert len(shares) > 1
    assert (np.diff(shares) < 0).all()
    assert ValueDropout(replace(schema, admission=0), DropoutConfig()).limits(np.random.default_rng(0), size) is None


def test_dropout_hides_the_id_of_a_user_together_with_the_values_that_few_users_share() -> None:
    features = (
        Feature("user_id", "user", "user_id", "user_id"),
        Feature("user.postcode", "user", "postcode", "user.postcode"),
        Feature("user.trade", "user", "trade", "user.trade"),
        Feature("user.sex", "user", "sex", "user.sex", vocabulary=("f", "m")),
        Feature("item_id", "item", "item_id", "item_id"),
        Feature("event.page", "event", "page", "event.page"),
    )
    schema = Schema(features, (), rows=64, dim=4, history_length=3, admission=2)
    people = pl.DataFrame(
        {
            "user_id": [f"u{number}" for number in range(200)],
            "postcode": [f"p{number // 3}" for number in range(200)],
            "trade": [f"t{number % 15}" for number in range(200)],
            "sex": ["f", "m"] * 100,
        }
    )
    users = Entities(schema, "user", people, Admission.off())
    nothing = {"item_id": pl.Series([], dtype=pl.String), "page": pl.Series([], dtype=pl.String)}
    others = [Entities(schema, of, pl.DataFrame(nothing), Admission.off()) for of in ("item", "event")]
    shared = users_per_value(Assembler(schema, users, *others))
    assert shared == {"user_id": 1, "postcode": 200 / 67, "trade": 200 / 15, "sex": 100}
    dropout = ValueDropout(schema, DropoutConfig(value=0.0, item=0.0, user=0.3), shared)
    found = dropout.limits(np.random.default_rng(0), 4_000)
    assert found is not None
    user, postcode, *rest = found.T
    assert 0.28 < (user == 0).mean() < 0.32
    assert np.array_equal(user, postcode)
    assert all((other == 255).all() for other in rest)


def test_a_budget_below_the_exact_features_is_refused_with_what_would_do() -> None:
    kinds = tuple(f"k{number}" for number in range(10))
    features = (Feature("a", "item", "a", "a", 1, "mean", kinds), Feature("b", "item", "b", "b"))
    with pytest.raises(BundleError, match=r"160 bytes hold 10 rows.*exact.*10; give at least 176 bytes"):
        Schema(features, (), rows=10, dim=4, history_length=1)
    assert Schema(features, (), rows=11, dim=4, history_length=1).hashed_rows == 1
