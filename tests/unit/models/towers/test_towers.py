"""The two towers: what training learns, that it repeats and goes on, and that the object's fast paths agree."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError, TrainingError
from features.frame import Frame, build_frame
from models.table.schema import Schema
from models.towers.config import TowerConfig
from models.towers.evaluate import measures, retrieval_quality, slow_rank
from models.towers.loss import Candidates, drawn_candidates, softmax_loss
from models.towers.network import gap_buckets
from models.towers.sequences import TEST, TRAIN, VALIDATION, Sequences, sequences_of
from models.towers.shape import tower_schema
from models.towers.stored import load_towers, save_towers
from models.towers.towers import Towers, Visits
from models.towers.train import TrainedTowers, train_targets, train_towers
from models.towers.validation import next_item_ranks, visits_of
from tests.build import coloured_dataset, coloured_tables

CONFIG = TowerConfig(width=8, blocks=1, batch=8, max_epochs=12, patience=3, rate=0.01)
LENGTH = 5


def walked_tables(*, users: int = 60, items: int = 24, visits: int = 12) -> dict[str, pl.DataFrame]:
    """Tables of users who visit the items in a ring, each from a start of its own: the last visit tells the next."""
    rng = np.random.default_rng(0)
    tables = coloured_tables(events=users * visits, items=items, users=users)
    start = rng.integers(0, items, users)
    place = np.arange(visits)
    vectors = rng.standard_normal((items, 3)).astype(np.float32)
    tables["items"] = tables["items"].with_columns(
        pl.Series("content_vector", vectors, dtype=pl.Array(pl.Float32, 3)),
        pl.Series("semantic_id", [[str(n % 4), f"{n % 4}.{n}"] for n in range(items)]),
    )
    tables["events"] = pl.DataFrame(
        {
            "event": np.arange(users * visits, dtype=np.uint32),
            "user_id": [f"u{number}" for number in np.tile(np.arange(users), visits)],
            "item_id": [f"i{number}" for number in ((start[None, :] + place[:, None]) % items).reshape(-1)],
            "time": np.repeat(place, users) * 60,
            "label": pl.Series(np.ones(users * visits), dtype=pl.Int8),
        }
    )
    return tables


def walked_frame() -> Frame:
    dataset = coloured_dataset()
    return build_frame(dataset, walked_tables(), split=dataset.split, history_length=LENGTH)


def shape(frame: Frame, config: TowerConfig = CONFIG) -> Schema:
    return tower_schema(coloured_dataset(), frame, config, dim=4, length=LENGTH)


@pytest.fixture(scope="module")
def frame() -> Frame:
    return walked_frame()


@pytest.fixture(scope="module")
def trained(frame: Frame) -> TrainedTowers:
    return train_towers(shape(frame), frame, CONFIG)


def test_towers_learn_what_comes_next(frame: Frame, trained: TrainedTowers) -> None:
    found = retrieval_quality(frame, trained.towers, trained.rows.__getitem__)
    assert found["towers"]["all"]["users"] == 60
    assert found["towers"]["all"]["ndcg_10"] > 0.9
    assert found["popularity"]["all"]["ndcg_10"] < 0.5
    assert found["content"]["all"]["ndcg_10"] < 0.5


def test_drawn_candidates_learn_what_comes_next_too(frame: Frame) -> None:
    config = replace(CONFIG, negatives=8)
    found = train_towers(shape(frame), frame, config)
    quality = retrieval_quality(frame, found.towers, found.rows.__getitem__)
    assert quality["towers"]["all"]["ndcg_10"] > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(frame: Frame) -> None:
    config = replace(CONFIG, max_epochs=2)
    one, two, other = (train_towers(shape(frame), frame, config, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.rows, two.rows)
    assert one.gains == two.gains
    assert not np.array_equal(one.rows, other.rows)


def test_a_stopped_training_goes_on_to_the_same_bits(frame: Frame, tmp_path: Path) -> None:
    schema, halfway = shape(frame), tmp_path / ".checkpoint"
    config = replace(CONFIG, max_epochs=4)
    whole = train_towers(schema, frame, config)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_towers(schema, frame, config, progress=stop, halfway=halfway)
    assert halfway.is_file()
    first: list[int] = []
    resumed = train_towers(schema, frame, config, halfway=halfway, progress=lambda done, total: first.append(done))
    assert first[0] > len(sequences_of(frame).windows(LENGTH))
    assert np.array_equal(whole.rows, resumed.rows)
    assert whole.gains == resumed.gains


def test_a_checkpoint_of_another_training_is_ignored(frame: Frame, tmp_path: Path) -> None:
    halfway = tmp_path / ".checkpoint"
    config = replace(CONFIG, max_epochs=2)
    train_towers(shape(frame), frame, replace(config, rate=0.1), halfway=halfway)
    one = train_towers(shape(frame), frame, config, halfway=halfway)
    assert np.array_equal(one.rows, train_towers(shape(frame), frame, config).rows)


def test_nothing_of_the_test_part_is_learned(frame: Frame) -> None:
    config = replace(CONFIG, max_epochs=2)
    changed = frame.replace(
        examples=frame.examples.with_columns(
            item=pl.when(pl.col("split") == "test").then(0).otherwise(pl.col("item")).cast(pl.UInt32)
        )
    )
    one, two = (train_towers(shape(frame), own, config) for own in (frame, changed))
    assert np.array_equal(one.rows, two.rows)
    assert one.gains == two.gains


def test_vectors_of_several_are_vectors_one_by_one(frame: Frame, trained: TrainedTowers) -> None:
    towers, read = trained.towers, trained.rows.__getitem__
    items = towers.item_vectors(read, frame.items)
    for number in (0, 7, 23):
        own = towers.item_vectors(read, frame.items[number : number + 1])
        np.testing.assert_allclose(own[0], items[number], atol=1e-6)
    sequences = sequences_of(frame)
    asked = sequences.first_of(TEST)
    visits = visits_of(sequences, asked, items, towers.length)
    users = frame.users[sequences.users[asked[:, 0]]]
    together = towers.user_vectors(read, users, visits)
    ends = np.cumsum(visits.lengths)
    for number in (0, 5, len(asked) - 1):
        part = slice(ends[number] - visits.lengths[number], ends[number])
        one = Visits(visits.vectors[part], visits.times[part], visits.lengths[[number]], visits.now[[number]])
        np.testing.assert_allclose(towers.user_vectors(read, users[[number]], one)[0], together[number], atol=1e-6)


@pytest.mark.parametrize(("averaging", "shares"), [(0.0, (0, 0, 1)), (0.6, (0.3, 0.3, 0.4)), (1.0, (1 / 3,) * 3)])
def test_the_weights_that_are_kept_are_a_moving_mean_of_the_epochs(
    frame: Frame, averaging: float, shares: tuple[float, ...]
) -> None:
    unjudged = frame.replace(examples=frame.examples.filter(pl.col("split") != "validation"))

    def rows(epochs: int, averaging: float) -> NDArray[np.float32]:
        config = replace(CONFIG, max_epochs=epochs, averaging=averaging)
        return train_towers(shape(frame), unjudged, config, seed=5).rows

    epochs = [rows(number, averaging=0.0) for number in (1, 2, 3)]
    expected = sum(share * own for share, own in zip(shares, epochs, strict=True))
    np.testing.assert_allclose(rows(3, averaging), expected, atol=1e-6)
    assert not np.allclose(epochs[0], epochs[2], atol=1e-3)


def test_older_visits_than_the_newest_are_not_read(frame: Frame, trained: TrainedTowers) -> None:
    towers, read = trained.towers, trained.rows.__getitem__
    items = towers.item_vectors(read, frame.items)
    now = np.array([2_000])
    long = Visits(items[:9], np.arange(9) * 60, np.array([9]), now)
    newest = Visits(items[9 - LENGTH : 9], np.arange(9 - LENGTH, 9) * 60, np.array([LENGTH]), now)
    own = frame.users[:1]
    assert np.array_equal(towers.user_vectors(read, own, long), towers.user_vectors(read, own, newest))
    later = replace(newest, now=now + 10**6)
    assert not np.array_equal(towers.user_vectors(read, own, newest), towers.user_vectors(read, own, later))


def test_who_has_nothing_has_no_vector(frame: Frame, trained: TrainedTowers) -> None:
    towers, read = trained.towers, trained.rows.__getitem__
    nothing = pl.DataFrame({"item_id": ["new"]})
    assert not towers.item_vectors(read, nothing).any()
    content = frame.items[:1].select("content_vector").with_columns(item_id=pl.lit("new"))
    vector = towers.item_vectors(read, content)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    nobody = Visits(vector[:0], np.zeros(0, np.int64), np.array([0, 1]), np.array([0, 0]))
    nobody = replace(nobody, vectors=vector, times=np.zeros(1, np.int64))
    found = towers.user_vectors(read, pl.DataFrame({"user_id": ["nobody", "somebody"]}), nobody)
    assert not found[0].any()
    assert np.linalg.norm(found[1]) == pytest.approx(1, abs=1e-6)


def test_an_items_rows_are_those_that_move_its_vector(frame: Frame, trained: TrainedTowers) -> None:
    towers = trained.towers
    rows, lengths = towers.item_rows(frame.items)
    ends = np.cumsum(lengths)
    before = towers.item_vectors(trained.rows.__getitem__, frame.items)
    for row in np.unique(rows)[:20]:
        changed = trained.rows.copy()
        changed[row] += 0.5
        moved = (towers.item_vectors(changed.__getitem__, frame.items) != before).any(axis=1)
        reading = [number for number, end in enumerate(ends) if row in rows[end - lengths[number] : end]]
        assert np.flatnonzero(moved).tolist() == reading


def test_stored_towers_give_the_same_vectors_from_another_place(
    frame: Frame, trained: TrainedTowers, tmp_path: Path
) -> None:
    name = save_towers(tmp_path, trained.towers.at(1_000))
    loaded = load_towers(tmp_path)
    assert loaded.id == name == load_towers(tmp_path).id
    assert name.startswith("towers-")
    assert loaded.start == 1_000

    def read(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        assert numbers.min() >= 1_000
        assert (np.diff(numbers) > 0).all()
        return trained.rows[numbers - 1_000]

    one = trained.towers.item_vectors(trained.rows.__getitem__, frame.items)
    assert np.array_equal(loaded.item_vectors(read, frame.items), one)
    (tmp_path / "network.safetensors").unlink()
    with pytest.raises(BundleError, match="its towers cannot be read"):
        load_towers(tmp_path)


def test_the_towers_features_have_names_and_salts_of_their_own(frame: Frame) -> None:
    schema = shape(frame)
    assert all(feature.name == feature.salt and feature.name.startswith("towers.") for feature in schema.features)
    assert {feature.column for feature in schema.of("item")} == {"item_id", "semantic_id", "colour"}
    assert schema.content == 3
    lookups = sum(
        feature.chunks * table[feature.column].explode().n_unique()
        for feature in schema.features
        for table in [frame.items if feature.of == "item" else frame.users]
    )
    assert lookups <= schema.rows < lookups + 64


def test_choices_that_do_not_fit_are_refused(frame: Frame) -> None:
    with pytest.raises(TrainingError, match=r"towers.width: expected a multiple of table.dim = 4, got 6"):
        shape(frame, replace(CONFIG, width=6))
    single = frame.replace(examples=frame.examples.unique("user", keep="first", maintain_order=True))
    with pytest.raises(DatasetError, match="no user has two positive events in the train part"):
        train_towers(shape(frame), single, CONFIG)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) after 0 epochs; lower towers.rate = 1e\+30"):
        train_towers(shape(frame), frame, replace(CONFIG, rate=1e30))


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    length=st.integers(1, 4),
    train=st.integers(0, 100),
    data=st.data(),
)
def test_each_event_of_the_train_part_is_predicted_once_from_the_event_before(
    counts: list[int], length: int, train: int, data: st.DataObject
) -> None:
    total = sum(counts)
    parts = np.array(data.draw(st.lists(st.sampled_from([TRAIN, VALIDATION, TEST]), min_size=total, max_size=total)))
    sequences = Sequences(
        np.arange(total), np.arange(total) * 10, parts.astype(np.int64), np.concatenate([[0], np.cumsum(counts)])
    )
    windows = sequences.windows(length)
    pairs = []
    for one in range(len(windows)):
        window = sequences.read(windows[one : one + 1], length)
        assert 1 <= window.lengths[0] <= length
        for slot in range(int(window.lengths[0])):
            assert window.times[0, slot] == window.items[0, slot] * 10
            if window.parts[0, slot + 1] == TRAIN:
                pairs.append((int(window.items[0, slot]), int(window.items[0, slot + 1])))
                assert sequences.users[window.items[0, slot + 1]] == window.users[0]
    first = set(np.concatenate([[0], np.cumsum(counts)]).tolist())
    expected = [(n - 1, n) for n in range(total) if parts[n] == TRAIN and n not in first]
    assert sorted(pairs) == expected


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), length=st.integers(1, 4))
def test_windows_that_are_read_together_are_padded_to_the_longest(counts: list[int], length: int) -> None:
    total = sum(counts)
    sequences = Sequences(
        np.arange(total), np.arange(total) * 10, np.full(total, TRAIN), np.concatenate([[0], np.cumsum(counts)])
    )
    windows = sequences.windows(length)
    if not len(windows):
        return
    window = sequences.read(windows, length)
    assert window.items.shape[1] == window.lengths.max() + 1 <= length + 1
    for number, (first, end) in enumerate(windows.tolist()):
        events = end - first
        assert window.lengths[number] == events - 1
        assert window.items[number].tolist() == [*range(first, end), *[0] * (window.items.shape[1] - events)]
        assert (window.parts[number] >= 0).sum() == events


@given(lag=st.integers(0, 40), data=st.data())
def test_a_question_sees_the_visits_that_are_known_at_its_time(lag: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    total = sum(counts)
    steps = data.draw(st.lists(st.integers(0, 20), min_size=total, max_size=total))
    parts = np.array(
        data.draw(st.lists(st.sampled_from([TRAIN, TEST]), min_size=total, max_size=total)), dtype=np.int64
    )
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    times = np.concatenate([np.cumsum(steps[a:b]) for a, b in itertools.pairwise(offsets)] or [[]])
    sequences = Sequences(np.arange(total), times.astype(np.int64), parts, offsets)
    expected = []
    for low, high in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        tests = [n for n in range(low, high) if parts[n] == TEST]
        if tests:
            event = tests[0]
            seen = [n for n in range(low, event) if not lag or times[n] < times[event] - lag]
            if seen:
                expected.append([event, low, seen[-1] + 1])
    assert sequences.first_of(TEST, lag=lag).tolist() == expected


@given(data=st.data())
def test_ranks_are_those_of_the_slow_function(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    items, users = 9, 3
    vectors = rng.integers(-1, 2, (items, 2)).astype(np.float32)
    asking = rng.integers(-1, 2, (users, 2)).astype(np.float32)
    events = rng.integers(0, items, 12)
    sequences = Sequences(events, np.arange(12), np.zeros(12, np.int64), np.array([0, 4, 8, 12]))
    asked = np.array([[3, 0, 3], [7, 4, 7], [11, 8, 11]])
    found = next_item_ranks(sequences, asked, asking, vectors, np.arange(items))
    for user, (event, low, high) in enumerate(asked.tolist()):
        scores = (vectors @ asking[user]).tolist()
        assert found[user] == slow_rank(scores, int(events[event]), set(events[low:high].tolist()))


def test_measures_by_hand() -> None:
    found = measures(np.array([0, 9, 10, 49, 50]))
    assert found["recall_50"] == pytest.approx(4 / 5)
    assert found["ndcg_10"] == pytest.approx((1 + 1 / np.log2(11)) / 5)
    assert measures(np.zeros(0, np.int64)) == {"users": 0, "recall_50": None, "ndcg_10": None}


def test_states_before_events_of_other_parts_are_not_trained() -> None:
    parts = np.array([TRAIN, VALIDATION, TRAIN, TEST, TRAIN, TRAIN])
    sequences = Sequences(np.arange(6), np.arange(6), parts, np.array([0, 6]))
    window = sequences.read(sequences.windows(5), 5)
    rng = np.random.default_rng(0)
    rows, slots = train_targets(window, 100, rng)
    assert list(zip(rows.tolist(), slots.tolist(), strict=True)) == [(0, 1), (0, 3), (0, 4)]
    assert len(train_targets(window, 2, rng)[0]) == 2


def test_gaps_fall_in_buckets_that_double() -> None:
    gaps = torch.tensor([-5, 0, 1, 2, 3, 4, 2**40 - 1, 2**40, 2**62])
    assert gap_buckets(gaps).tolist() == [0, 0, 1, 2, 2, 3, 40, 41, 63]


def test_drawn_candidates_estimate_the_softmax_over_the_catalogue() -> None:
    """Mean of the drawn normalisers, each item weighted by 1 / q, against the sum over the catalogue."""
    rng = np.random.default_rng(0)
    known = np.arange(0, 60, 2)
    share = np.zeros(60)
    share[known] = rng.dirichlet(np.full(len(known), 0.3))
    weight = np.exp(rng.standard_normal(60))
    sums = []
    for _ in range(4_000):
        targets = rng.choice(60, 6, p=share)
        found = drawn_candidates(targets, np.full((1, 1), -1), known, share, 10, rng)
        assert set(targets) <= set(found.items.tolist()) <= set(known.tolist())
        sums.append((weight[found.items] * np.exp(-found.log_share)).sum())
    assert np.mean(sums) == pytest.approx(weight[known].sum(), rel=0.03)


def test_visited_items_are_no_negatives_of_a_target() -> None:
    states, vectors = torch.eye(3), torch.eye(3)
    masked = np.array([[True, False, True]])
    found = Candidates(np.array([4, 5, 6]), np.zeros(3, np.float32), masked)
    targets, rows = np.array([4, 6]), np.array([0, 0])
    loss = softmax_loss(states[[0, 2]], vectors, targets, rows, found)
    # Of the three candidates the target itself and the one that was not visited are left.
    assert float(loss) == pytest.approx(float(np.log(1 + np.exp(-1))))
    everything = Candidates(np.array([4, 5, 6]), np.zeros(3, np.float32))
    assert float(softmax_loss(states[[0, 2]], vectors, targets, rows, everything)) == pytest.approx(
        float(np.log(1 + 2 * np.exp(-1)))
    )


def test_hidden_ids_leave_the_content_to_carry_an_item(frame: Frame) -> None:
    """Without ids in training, items that nobody has seen get vectors from what they share with others."""
    towers = train_towers(shape(frame), frame, replace(CONFIG, id_dropout=1.0, max_epochs=2))
    seen = towers.towers.item_vectors(towers.rows.__getitem__, frame.items)
    renamed = frame.items.with_columns(item_id=pl.col("item_id") + "-new")
    new = towers.towers.item_vectors(towers.rows.__getitem__, renamed)
    assert isinstance(towers.towers, Towers)
    assert (np.linalg.norm(new, axis=1) > 0.99).all()
    assert np.corrcoef((new @ new.T).ravel(), (seen @ seen.T).ravel())[0, 1] > 0.5
