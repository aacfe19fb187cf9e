"""Embedding methods for a budget of bytes: one suite for all, then what each method alone promises."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from features.dataset.descriptor import load_dataset
from features.hashing import fingerprint
from features.threads import one_thread
from models.compressed.fields import Fields, Part
from models.compressed.fit import FitConfig, fit
from models.compressed.hashed.address import shared_rows
from models.compressed.hashed.cce import Clustered
from models.compressed.hashed.quotient_remainder import QuotientRemainder
from models.compressed.hashed.robe import Robe
from models.compressed.hashed.shared import SharedHashing
from models.compressed.hashed.tensor_train import TensorTrain
from models.compressed.hashed.unified import UnifiedOneLookup
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, footprint
from models.compressed.registry import METHODS
from models.compressed.stored.alpt import Alpt
from models.compressed.stored.deeplight import DeepLight
from models.compressed.stored.dictionary import Dictionary
from models.compressed.stored.product_quantized import MultiGranular, ProductQuantized
from models.compressed.stored.quantized import Int8, Int16, Quantized
from models.ranker.network import NetworkConfig
from tessera.bench.offline.compression import compression

DIM = 16
SIZES = np.array([220, 6, 110])
SHARES = (2.0, 0.5, 0.1)
TRAINING = FitConfig(batch=128, rate=3e-3, max_epochs=4, network=NetworkConfig(1, 16, (32,)))
EVERY = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)


def small_fields(examples: int = 8_000) -> Fields:
    """Three fields, values of unlike frequency, labels that are likelier the larger the values' own weights."""
    rng = np.random.default_rng(7)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    weight = rng.normal(size=offsets[-1]) * 1.5
    columns = [offsets[f] + (rng.random(examples) ** 2 * size).astype(np.int64) for f, size in enumerate(SIZES)]
    codes = np.stack(columns, axis=1)
    labels = (rng.random(examples) < 1 / (1 + np.exp(-weight[codes].sum(1)))).astype(np.float32)
    numeric = rng.normal(size=(examples, 1)).astype(np.float32)
    cuts = {"train": slice(0, 6_000), "validation": slice(6_000, 7_000), "test": slice(7_000, None)}
    return Fields(
        names=("user_id", "user.age", "item_id"),
        sizes=SIZES,
        fingerprints=np.concatenate([fingerprint([str(value) for value in range(size)]) for size in SIZES]),
        counts=np.bincount(codes[cuts["train"]].ravel(), minlength=offsets[-1]),
        parts={name: Part(codes[cut], numeric[cut], labels[cut]) for name, cut in cuts.items()},
    )


@pytest.fixture(autouse=True)
def numerics_on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


FIELDS = small_fields()
FULL = FIELDS.values * DIM * FLOAT_BYTES
CODES = torch.from_numpy(FIELDS.parts["train"].codes[:256])


def built(kind: type[Any], share: float = 2.0, seed: int = 0) -> Any:
    return kind.at(FIELDS, DIM, int(FULL * share), seed=seed)


@torch.no_grad()
def vectors(method: EmbeddingMethod) -> torch.Tensor:
    """Returns the vectors of every value, in evaluation; a value is in its own field's column."""
    offsets = FIELDS.offsets
    rows = torch.from_numpy(np.stack([offsets[f] + np.arange(SIZES.max()) % size for f, size in enumerate(SIZES)], 1))
    found = method.eval()(rows)
    return torch.cat([found[:size, f] for f, size in enumerate(SIZES)])


def trained(method: EmbeddingMethod, steps: int = 30, target: float = 1.0) -> EmbeddingMethod:
    """Draws vectors towards fixed directions, epochs of ten steps."""
    goal = torch.sin(torch.arange(CODES.numel() * DIM)).view(*CODES.shape, DIM) * target
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    method.train()
    for step in range(steps):
        loss = (method(CODES) - goal).square().mean() + method.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step + 1, 10)
        if step % 10 == 9:
            method.after_epoch(step // 10)
    return method


@EVERY
def test_vectors_are_float_rows_of_the_dimension_for_each_code(kind: type[EmbeddingMethod]) -> None:
    found = built(kind)(CODES)
    assert found.shape == (*CODES.shape, DIM)
    assert found.dtype == torch.float32
    assert 0.005 < float(found.detach().std()) < 0.1


@EVERY
def test_what_is_stored_never_exceeds_the_budget_and_an_error_names_what_would_do(kind: type[EmbeddingMethod]) -> None:
    with pytest.raises(BudgetError, match=kind.name) as refused:
        kind.at(FIELDS, DIM, 1, seed=0)
    least = refused.value.least
    assert footprint(kind.at(FIELDS, DIM, least, seed=0).stored()) <= least
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes"):
        kind.at(FIELDS, DIM, least - 1, seed=0)
    for budget in (int(FULL * share) for share in SHARES if FULL * share >= least):
        method = kind.at(FIELDS, DIM, budget, seed=0)
        assert footprint(method.stored()) <= budget
        assert footprint(trained(method, 11).stored()) <= budget


@EVERY
@pytest.mark.parametrize("steps", [0, 30])
def test_what_is_stored_is_enough_for_the_same_vectors(kind: type[EmbeddingMethod], steps: int) -> None:
    one, other = trained(built(kind, seed=0), steps), built(kind, seed=1)
    expected = vectors(one)
    other.eval().restore(one.stored())
    torch.testing.assert_close(vectors(other), expected, rtol=0, atol=1e-6)
    again = built(kind, seed=2).eval()
    again.restore(other.stored())
    torch.testing.assert_close(vectors(again), expected, rtol=0, atol=1e-6)


@EVERY
def test_gradients_reach_every_parameter(kind: type[EmbeddingMethod]) -> None:
    method = built(kind)
    (method(CODES) * torch.randn(DIM, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@EVERY
def test_the_seed_decides_the_start_and_nothing_else_does(kind: type[EmbeddingMethod]) -> None:
    torch.manual_seed(1)
    one = vectors(built(kind))
    torch.manual_seed(2)
    assert torch.equal(one, vectors(built(kind)))
    assert not torch.equal(one, vectors(built(kind, seed=1)))


@EVERY
def test_training_beats_the_base_rate_on_the_test_part(kind: type[EmbeddingMethod]) -> None:
    method = built(kind)
    fitted = fit(method, FIELDS, TRAINING)
    rate = float(FIELDS.parts["test"].labels.mean())
    assert fitted.log_loss < 0.98 * -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert fitted.auc > 0.6
    assert fitted.bytes <= 2 * FULL


def test_training_gives_the_same_bits_every_time() -> None:
    first, second = (fit(built(METHODS["unified"]), FIELDS, TRAINING) for _ in range(2))
    assert (first.auc, first.log_loss, first.epochs) == (second.auc, second.log_loss, second.epochs)


def test_a_dictionary_finds_its_values_and_no_others() -> None:
    chosen = np.arange(FIELDS.values) % 3 == 0
    found = Dictionary(FIELDS, chosen)
    ids = found.ids.numpy()
    assert (ids[~chosen] == -1).all()
    assert sorted(ids[chosen]) == list(range(int(chosen.sum())))
    assert (found.fingerprints.numpy()[ids[chosen]] == FIELDS.fingerprints[chosen]).all()


def test_one_word_of_two_fields_shares_a_row_only_without_salt() -> None:
    shared, salted = vectors(built(SharedHashing)), vectors(built(UnifiedOneLookup))
    item = int(FIELDS.offsets[2])
    assert torch.equal(shared[:110], shared[item : item + 110])
    assert (salted[:110] != salted[item : item + 110]).any(1).sum() > 100


def test_the_quotient_remainder_pairs_tell_most_values_apart() -> None:
    apart = {name: len(torch.unique(vectors(built(METHODS[name], 1.0))[:220], dim=0)) for name in ("hashing", "bloom")}
    method = built(QuotientRemainder, 1.0)
    assert len(torch.unique(vectors(method)[:220], dim=0)) > max(210, apart["hashing"])
    first, second = method.weight[method.rows[0]]
    assert torch.equal(vectors(method)[0], (first * second).detach())


def test_a_robe_block_that_reaches_the_end_goes_on_at_the_beginning() -> None:
    method = Robe(FIELDS, DIM, 11, seed=0)
    array = method.array.detach()
    expected = [
        float(method.signs[0, block] * array[(int(method.starts[0, block]) + inside) % 11])
        for block in range(2)
        for inside in range(8)
    ]
    assert vectors(method)[0].tolist() == expected
    assert int((method.starts + 7).max()) >= 11


def test_a_train_of_tensors_is_its_explicit_product() -> None:
    method = built(TensorTrain, 0.5)
    place = int(shared_rows(FIELDS, method.side**3, 1)[5, 0])
    first = method.first[place // method.side // method.side]
    second = method.second[place // method.side % method.side].view(method.rank, -1, method.rank)
    explicit = torch.einsum("ar,rbs,sc->abc", first, second, method.third[place % method.side]).flatten().detach()
    assert method.rank > 1
    torch.testing.assert_close(vectors(method)[5], explicit)


def test_clustering_keeps_vectors_near_where_they_were() -> None:
    method = built(Clustered, 1.0)
    method.helper.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    before = vectors(method)
    method.after_epoch(0)
    after = vectors(method)
    moved, size = (after - before).square().sum(), (before - before.mean(0)).square().sum()
    assert not torch.equal(before, after)
    assert moved < 0.5 * size
    assert int(method.pointers.max()) < method.chunks * len(method.main) // method.chunks


@pytest.mark.parametrize("kind", [ProductQuantized, MultiGranular])
def test_codes_are_those_of_the_nearest_centroids_a_value_may_choose(kind: type[ProductQuantized]) -> None:
    method = trained(built(kind, 1.0))
    served = built(kind, 1.0, seed=1).eval()
    served.restore(method.stored())
    codes, parted = served.codes.long(), method.queries.view(FIELDS.values, method.parts, 1, -1)
    apart = (parted - method.books).square().sum(-1)
    most = torch.where(served.frequent, 2**method.bits, 2 ** (method.bits - method.fewer_bits))
    assert (codes < most[:, None]).all()
    open_to = torch.arange(2**method.bits) < most[:, None, None]
    torch.testing.assert_close(
        apart.gather(2, codes[..., None])[..., 0], apart.masked_fill(~open_to, torch.inf).amin(2), rtol=1e-4, atol=1e-7
    )
    assert int(served.frequent.sum()) == (FIELDS.values if kind is ProductQuantized else round(0.1 * FIELDS.values))


@pytest.mark.parametrize("kind", [Int8, Int16])
def test_a_rounded_row_is_within_half_a_step_of_the_row(kind: type[Quantized]) -> None:
    method = trained(built(kind))
    stored = method.stored()
    assert stored["weight"].dtype == kind.integers
    off = (stored["weight"] * stored["scales"] - method.weight).abs()
    assert (off <= stored["scales"] / 2 + method.weight.abs() * 1e-6).all()
    torch.testing.assert_close(vectors(method), (stored["weight"] * stored["scales"])[method.dictionary.ids])


def test_a_scale_that_is_too_small_grows() -> None:
    method = built(Alpt)
    before = method.log_scale.detach().clone()
    trained(method, 60)
    seen = method.dictionary.ids[CODES].unique()
    assert float((method.log_scale.detach() - before)[seen].mean()) > 0.1
    assert method.stored()["weight"].dtype == torch.int8


def test_pruning_reaches_its_number_of_weights_and_keeps_the_largest() -> None:
    method = built(DeepLight, 0.5)
    assert float(method.kept.float().mean()) == 1
    trained(method, 10)
    assert int(method.kept.sum()) == method.left
    stored = method.stored()
    assert len(stored["values"]) == method.left
    dropped = method.weight[~method.kept].abs()
    assert len(dropped) == method.weight.numel() - method.left
    assert int(stored["lengths"].sum()) == method.left


def test_a_benchmark_stays_within_its_budgets_says_what_cannot_be_and_goes_on_where_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"u{rng.integers(40)},i{rng.integers(30)},{rng.integers(2)},{time}" for time in range(1_500)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,label,time", *lines]))
    (tmp_path / "data.toml").write_text(
        'name = "coins"\n[events]\npath = "events.csv"\nuser = "user"\nitem = "item"\n'
        'time = { column = "time", unit = "s" }\nlabel = { column = "label", positive = "== 1", negative = "== 0" }\n'
        '[split]\nby = "random"\n'
    )
    dataset = load_dataset(tmp_path / "data.toml")
    options: dict[str, Any] = {"seeds": 2, "budgets": (1.0, 0.1), "methods": ("hashing", "unified-1", "int8")}
    options |= {"console": Console(quiet=True), "dim": 8, "config": FitConfig(max_epochs=1)}
    first = compression(dataset, tmp_path / "out", **options)
    full = 72 * 8 * FLOAT_BYTES
    measured = [row for row in first.rows if "auc" in row]
    assert len(measured) == 2 + 2 * 3 + 2 * 2
    assert all(row["bytes"] <= row["budget"] * full for row in measured if row["method"] != "collisionless")
    assert [row for row in first.rows if "note" in row] == [
        {"budget": 0.1, "method": "int8", "note": f"needs at least {72 * (8 + 4) + 72 * 8 + 8:,} bytes"}
    ]
    assert [one["budget"] for one in first.recommendations] == [1.0, 0.1]
    assert Path(first.plot).stat().st_size > 10_000
    assert compression(dataset, tmp_path / "out", **options).rows == first.rows
