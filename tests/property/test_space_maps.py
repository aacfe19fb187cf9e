"""Laws of maps between spaces: they compose, the identity pair gives the identity, a saved map equals the map."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.content.encoder import unit
from features.content.space_map import SpaceMap, identity_map, load_map
from features.content.step import Affine, Shift
from features.errors import BundleError, DatasetError
from features.jobs.encode import vector_column
from models.encoder.align import KINDS, Pairs, fit_map, pairs_of_items

D, P = 12, 160


def _rows(count: int, seed: int, *, width: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # A catalogue has a mean and axes of unequal weight.
    return unit(rng.normal(size=(count, width)) * np.linspace(1.5, 0.3, width) + 0.4)


def _turned(rows: np.ndarray, seed: int, *, width: int = D) -> np.ndarray:
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(max(width, rows.shape[1]),) * 2))[0]
    return unit(rows @ turn[: rows.shape[1], :width])


def test_the_identity_pair_gives_the_identity_map() -> None:
    rows = _rows(P, 0)
    for kind in KINDS:
        found = fit_map(kind, Pairs("old", "new", rows, rows))
        assert found.fidelity["cosine"] > 1 - 1e-5, kind
        assert np.allclose(found.of(rows, space="old"), rows, atol=1e-4), kind
    same = fit_map("ridge", Pairs("old", "old", rows, rows))
    assert same == identity_map("old")
    assert np.array_equal(same.of(rows, space="old"), rows)


def test_a_rotated_space_is_found_again_and_a_shift_cannot_find_it() -> None:
    before, later = _rows(P, 0), _rows(50, 9)
    pairs = Pairs("new", "old", before, _turned(before, 1))
    kept = {
        kind: float(np.einsum("nd,nd->n", fit_map(kind, pairs).of(later, space="new"), _turned(later, 1)).mean())
        for kind in KINDS
    }
    assert min(kept["procrustes"], kept["ridge"], kept["mlp"]) > 0.999, kept
    assert kept["shift"] < 0.9, kept


@pytest.mark.parametrize(("width", "target"), [(12, 7), (7, 12)])
def test_spaces_of_unequal_width_are_padded_and_cut(width: int, target: int) -> None:
    before = _rows(P, 2, width=width)
    pairs = Pairs("new", "old", before, _turned(before, 3, width=target))
    for kind in ("procrustes", "ridge", "mlp"):
        mapped = fit_map(kind, pairs).of(before, space="new")
        assert mapped.shape == (P, target)
        assert mapped.dtype == np.float32
        assert np.allclose(np.linalg.norm(mapped, axis=1), 1.0, atol=1e-6)


def test_maps_compose_bit_for_bit_and_with_the_identity() -> None:
    rows = _rows(P, 4)
    there = fit_map("ridge", Pairs("a", "b", rows, _turned(rows, 5, width=7)))
    back = fit_map("mlp", Pairs("b", "c", _turned(rows, 5, width=7), rows))
    both = there.then(back)
    assert np.array_equal(both.of(rows, space="a"), back.of(there.of(rows, space="a"), space="b"))
    assert (both.source, both.target, both.kind, both.pairs) == ("a", "c", "composed", P)
    for composed in (identity_map("a").then(there), there.then(identity_map("b"))):
        assert composed.id == there.id
        assert np.array_equal(composed.of(rows, space="a"), there.of(rows, space="a"))
    third = fit_map("shift", Pairs("c", "d", rows, _turned(rows, 6)))
    assert there.then(back).then(third).id == there.then(back.then(third)).id


def test_a_row_has_the_same_bits_alone_and_an_empty_row_stays_empty() -> None:
    rows = _rows(P, 4)
    pairs = Pairs("a", "b", rows, _turned(rows, 5))
    rows[3] = 0
    for kind in KINDS:
        found = fit_map(kind, pairs)
        whole = found.of(rows, space="a")
        assert np.array_equal(np.concatenate([found.of(rows[n : n + 1], space="a") for n in range(P)]), whole)
        assert not whole[3].any()


def test_a_saved_map_is_the_map_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    rows = _rows(P, 4)
    found = fit_map("ridge", Pairs("a", "b", rows, _turned(rows, 5)))
    found.save(tmp_path)
    assert load_map(tmp_path) == found or load_map(tmp_path).id == found.id
    assert dict(load_map(tmp_path).fidelity) == dict(found.fidelity)
    assert np.array_equal(load_map(tmp_path).of(rows, space="a"), found.of(rows, space="a"))
    described = (tmp_path / "map.json").read_text()
    (tmp_path / "map.json").write_text(described.replace('"target":"b"', '"target":"c"'))
    with pytest.raises(BundleError, match="expected map-"):
        load_map(tmp_path)
    (tmp_path / "map.json").write_text(described)
    weights = tmp_path / "step-0" / "step.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(BundleError, match="fit it again"):
        load_map(tmp_path)


def test_a_map_does_not_compare_two_spaces() -> None:
    rows = _rows(P, 4)
    found = fit_map("shift", Pairs("a", "b", rows, _turned(rows, 5)))
    with pytest.raises(DatasetError, match="reads vectors of a, got vectors of b"):
        found.of(rows, space="b")
    with pytest.raises(DatasetError, match=r"reads vectors of a, but map .* returns b"):
        found.then(found)
    with pytest.raises(DatasetError, match="width 12"):
        found.of(rows[:, :5], space="a")


def test_bad_pairs_are_refused_by_name() -> None:
    rows = _rows(P, 4)
    few = Pairs("a", "b", rows[: D - 1], rows[: D - 1])
    for kind in ("procrustes", "ridge", "mlp"):
        with pytest.raises(DatasetError, match="11 pairs are fewer than 12"):
            fit_map(kind, few)
    with pytest.raises(DatasetError, match="map shift: needs spaces of the same width, got 12 and 7"):
        fit_map("shift", Pairs("a", "b", rows, _turned(rows, 5, width=7)))
    with pytest.raises(DatasetError, match="'rotation' is unknown"):
        fit_map("rotation", few)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="same items"):
        Pairs("a", "b", rows, rows[1:])
    frame = pl.DataFrame({"item_id": ["x", "y"]}).with_columns(vector_column(rows[:2]))
    assert len(pairs_of_items(["y", "x"], ("a", frame), ("b", frame))) == 2
    with pytest.raises(DatasetError, match=r"1 of 2 items have no vector of a, e.g. 'z'"):
        pairs_of_items(["x", "z"], ("a", frame), ("b", frame))


def test_an_affine_leg_and_a_shift_leg_are_checked_against_each_other() -> None:
    narrow = Affine(matrix=np.eye(D)[:, :5], source=np.zeros(D), target=np.zeros(5))
    with pytest.raises(DatasetError, match="width 12"):
        SpaceMap("a", "b", "composed", 3, (narrow, Shift(offset=np.zeros(D)))).of(_rows(2, 0), space="a")
