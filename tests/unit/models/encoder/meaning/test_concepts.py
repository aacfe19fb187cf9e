"""Concept heads find planted concepts, survive saving to the bit, and refuse concepts that nothing carries."""

from pathlib import Path

import numpy as np
import pytest

from features.content.encoder import unit
from features.errors import BundleError, DatasetError
from models.encoder.meaning.concept_fit import LOST, fit_column, fit_examples
from models.encoder.meaning.concepts import ConceptHead, described, join, load_concepts, steer

D, SOURCE = 24, "lsa-0123456789ab"


def _catalogue(count: int = 400, seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Items whose first two dims carry two concepts, beside noise."""
    rng = np.random.default_rng(seed)
    carries = rng.random((count, 2)) < [0.2, 0.3]
    vectors = rng.normal(size=(count, D))
    vectors[:, :2] += 4 * carries
    values = [[name for name, has in zip(("horror", "war"), row, strict=True) if has] for row in carries]
    return unit(vectors), values


@pytest.fixture(scope="module")
def head() -> ConceptHead:
    vectors, values = _catalogue()
    return fit_column(vectors, values, column="genres", source=SOURCE)


def test_planted_concepts_are_found_in_items_that_the_fit_did_not_read(head: ConceptHead) -> None:
    vectors, values = _catalogue(seed=1)
    shares = head.weigh(vectors)
    assert head.names == ("horror", "war")
    assert ((shares >= 0) & (shares <= 1)).all()
    for column, name in enumerate(head.names):
        carries = np.array([name in found for found in values])
        # Calibrated: the mean share is the share of carriers.
        assert abs(shares[:, column].mean() - carries.mean()) < 0.06
        assert shares[carries, column].mean() > 0.6 > 0.3 > shares[~carries, column].mean()


def test_the_filter_loses_about_as_many_others_as_it_may(head: ConceptHead) -> None:
    vectors, values = _catalogue(count=2_000, seed=2)
    for column, name in enumerate(head.names):
        others = np.array([name not in found for found in values])
        assert head.carries(vectors)[others, column].mean() < 2 * LOST


def test_a_row_has_the_same_bits_in_any_batch(head: ConceptHead) -> None:
    vectors, _ = _catalogue(count=37, seed=3)
    whole = head.weigh(vectors)
    assert np.array_equal(np.concatenate([head.weigh(row[None]) for row in vectors]), whole)


def test_an_item_without_content_has_no_share_of_anything(head: ConceptHead) -> None:
    nothing = np.zeros((1, D), dtype=np.float32)
    assert not head.weigh(nothing).any()
    assert not head.carries(nothing).any()


def test_the_top_shared_concept_is_what_both_items_carry(head: ConceptHead) -> None:
    vectors, values = _catalogue(seed=4)
    both = [row for row, found in enumerate(values) if found == ["war"]][:8]
    tops = [head.shared(vectors[a], vectors[b], count=1)[0][0] for a, b in zip(both[::2], both[1::2], strict=True)]
    assert tops.count("war") == len(tops)


def test_a_saved_head_is_the_head_and_its_id_changes_with_any_byte(head: ConceptHead, tmp_path: Path) -> None:
    head.save(tmp_path)
    loaded = load_concepts(tmp_path)
    vectors, _ = _catalogue(count=20, seed=5)
    assert (loaded.id, loaded.concepts) == (head.id, head.concepts)
    assert np.array_equal(loaded.weigh(vectors), head.weigh(vectors))
    for name in head.tensors:
        changed = dict(head.tensors) | {name: head.tensors[name] + np.float32(1e-3)}
        assert ConceptHead(SOURCE, head.concepts, changed).id != head.id
    file = tmp_path / "concepts.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="fit"):
        load_concepts(tmp_path)
    file.write_bytes(bytes(data[:40]))
    with pytest.raises(BundleError, match="fit the concepts again"):
        load_concepts(tmp_path)


def test_a_query_steers_away_and_a_query_without_the_concept_is_unchanged(head: ConceptHead) -> None:
    vectors, values = _catalogue(seed=6)
    carries = np.array(["horror" in found for found in values])
    query = unit(vectors[carries][:5].mean(axis=0)[None])[0]
    before = carries[np.argsort(-(vectors @ query))[:20]].mean()
    after = carries[np.argsort(-(vectors @ steer(head, query, ["horror"])))[:20]].mean()
    assert after < before - 0.2
    opposite = -head.tensors["direction"][0]
    assert np.allclose(steer(head, opposite, ["horror"]), opposite, atol=1e-6)
    with pytest.raises(DatasetError, match="'comedy' is unknown; choose of horror, war"):
        steer(head, query, ["comedy"])


def test_a_concept_of_a_few_examples_finds_its_carriers() -> None:
    vectors, values = _catalogue(seed=7)
    carries = np.array(["horror" in found for found in values])
    few = fit_examples("scary", vectors[carries][:5], vectors, source=SOURCE)
    order = np.argsort(-few.weigh(vectors)[:, 0])
    assert carries[order[:20]].mean() > 2 * carries.mean()
    assert described(few)[0]["examples"] == 5


@pytest.mark.parametrize("count", [0, 2, 11])
def test_a_concept_with_too_few_or_many_examples_is_refused_by_name(count: int) -> None:
    vectors, _ = _catalogue()
    with pytest.raises(DatasetError, match=r"concept 'scary'.*expected 3 to 10"):
        fit_examples("scary", vectors[:count], vectors, source=SOURCE)


def test_an_empty_concept_is_refused_by_name() -> None:
    vectors, _ = _catalogue()
    with pytest.raises(DatasetError, match="concept 'scary' is empty"):
        fit_examples("scary", np.zeros((4, D), dtype=np.float32), vectors, source=SOURCE)
    with pytest.raises(DatasetError, match="no value of column 'genres'"):
        fit_column(vectors, [["rare"], *[None] * (len(vectors) - 1)], column="genres", source=SOURCE)


def test_heads_of_one_space_join_and_heads_of_two_spaces_do_not(head: ConceptHead) -> None:
    vectors, _ = _catalogue()
    few = fit_examples("scary", vectors[:4], vectors, source=SOURCE)
    assert join([head, few]).names == ("horror", "war", "scary")
    other = fit_examples("scary", vectors[:4], vectors, source="lsa-other")
    with pytest.raises(DatasetError, match="different encoders"):
        join([head, other])
    with pytest.raises(DatasetError, match="'scary' is named twice"):
        join([few, few])


def test_vectors_of_another_width_are_refused(head: ConceptHead) -> None:
    with pytest.raises(DatasetError, match="width 24"):
        head.weigh(np.zeros((2, D + 1), dtype=np.float32))
