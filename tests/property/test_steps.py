"""Laws of steps, chains and views: a batch equals one by one, a saved part equals the part, an id names every byte."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.content.chain import Chain, View, load_view
from features.content.encoder import unit
from features.content.fixed_point import FixedPoint
from features.content.kinds import load_encoder
from features.content.lsa import fit
from features.content.step import (
    KINDS,
    Affine,
    Centre,
    Cut,
    Erase,
    Linear,
    LowRank,
    Mlp,
    Rotate,
    Shift,
    Unit,
    VectorStep,
    load_step,
)
from features.errors import BundleError, DatasetError

D, E, R = 48, 16, 3


def _steps(seed: int) -> list[VectorStep]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    return [
        Centre(mean=draw(D)),
        Linear(matrix=draw(D, E)),
        Rotate(matrix=np.linalg.qr(draw(D, E))[0]),
        Cut.to(E, width=D),
        Unit.of_width(D),
        LowRank(left=draw(D, R), right=draw(R, D)),
        Affine(matrix=draw(D, E), source=draw(D), target=draw(E)),
        Shift(offset=draw(D)),
        Mlp(first=draw(D, 24), bias=draw(24), second=draw(24, E), target=draw(E)),
        Erase(mean=draw(D), left=draw(D, R), right=draw(R, D), probe=draw(D), bias=np.zeros(1)),
    ]


def _rows(count: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, D)))


def test_every_kind_is_tested() -> None:
    assert {step.kind for step in _steps(0)} == set(KINDS)


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_a_row_has_the_same_bits_in_any_batch(seed: int, cuts: list[int]) -> None:
    rows = _rows(300, seed)
    order = np.random.default_rng(seed).permutation(len(rows))
    for step in _steps(seed):
        whole = step(rows)
        parts = np.split(rows, sorted(cuts))
        assert np.array_equal(np.concatenate([step(part) for part in parts]), whole), step.kind
        assert np.array_equal(step(rows[order]), whole[order]), step.kind
        assert np.array_equal(step(rows[7:8])[0], whole[7]), step.kind


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-40, 40))
def test_fixed_point_is_close_to_the_float_product(seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    rows, matrix = rng.normal(size=(20, D)) * 2.0**power, rng.normal(size=(D, E))
    exact = rows @ matrix
    largest = np.abs(rows).max(axis=1, keepdims=True) * np.abs(matrix).max()
    assert (np.abs(FixedPoint(matrix).product(rows) - exact) <= largest * D * 2.0**-20).all()


def test_fixed_point_sums_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows, matrix = rng.normal(size=(64, D)), rng.normal(size=(D, E))
    order = rng.permutation(D)
    assert np.array_equal(FixedPoint(matrix).product(rows), FixedPoint(matrix[order]).product(rows[:, order]))


def test_a_saved_step_is_the_step_and_its_id_names_every_byte(tmp_path: Path) -> None:
    rows = _rows(5, 1)
    for number, step in enumerate(_steps(2)):
        directory = tmp_path / str(number)
        directory.mkdir()
        step.save(directory)
        loaded = load_step(directory)
        assert loaded.id == step.id
        assert np.array_equal(loaded(rows), step(rows))
        for name, tensor in step.tensors.items():
            if step.kind == "cut":
                continue
            changed = tensor.copy()
            changed.flat[0] = np.nextafter(changed.flat[0], np.float32(np.inf))
            assert type(step)(**{**step.tensors, name: changed}).id != step.id
    assert Cut.to(8, width=D).id != Cut.to(9, width=D).id


def test_a_chain_is_saved_whole_and_equals_its_parts(tmp_path: Path) -> None:
    texts = ["red bicycle", "blue bicycle for children", "a kettle", "steel kettle, red", ""]
    bases = [fit(texts, dim=3, seed=0), fit(texts, dim=2, seed=1)]
    width = sum(base.dim for base in bases)
    steps = [Centre(mean=np.full(width, 0.1)), Linear(matrix=np.random.default_rng(0).normal(size=(width, 4)))]
    chain = Chain(bases, steps)
    chain.save(tmp_path)
    loaded = load_encoder(tmp_path)
    vectors = chain.encode(texts)
    assert loaded.id == chain.id
    assert loaded.dim == chain.dim == 4
    assert np.array_equal(loaded.encode(texts), vectors)
    assert np.array_equal(np.concatenate([chain.encode([text]) for text in texts]), vectors)
    assert not vectors[-1].any()
    joined = unit(np.concatenate([base.encode(texts) for base in bases], axis=1))
    view = View("similar", Chain(bases).id, tuple(steps))
    assert np.array_equal(view.of(joined), vectors)
    assert Chain(bases, steps[:1]).id != chain.id


def test_a_saved_view_is_the_view(tmp_path: Path) -> None:
    view = View("similar", "lsa-1", tuple(_steps(3)[:2]))
    view.save(tmp_path)
    loaded = load_view(tmp_path)
    assert loaded.id == view.id
    assert np.array_equal(loaded.of(_rows(4, 0)), view.of(_rows(4, 0)))
    assert View("similar", "lsa-2", view.steps).id != view.id


def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    step = Centre(mean=np.zeros(D))
    with pytest.raises(DatasetError, match="reads vectors of width 48, got shape"):
        step(np.zeros((2, D + 1)))
    with pytest.raises(DatasetError, match="not finite"):
        Centre(mean=np.full(D, np.nan))
    base = fit(["red bicycle", "blue kettle"], dim=2, seed=0)
    with pytest.raises(DatasetError, match=rf"reads vectors of width 48, but {base.id} gives {base.dim}"):
        Chain([base], [step])
    with pytest.raises(DatasetError, match="keep 9 of 8"):
        Cut.to(9, width=8)
    step.save(tmp_path)
    tensors = tmp_path / "step.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4])
    with pytest.raises(BundleError, match="holds no step that can be read"):
        load_step(tmp_path)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"holds step centre-.*, expected centre-"):
        load_step(tmp_path)
