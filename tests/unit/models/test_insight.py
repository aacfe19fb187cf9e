"""Reports of a table: counts beside a closed form and a brute-force twin, known angles, sums that add up."""

import json
from dataclasses import asdict, replace
from io import StringIO
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from features.hashing import HashSpec, fingerprint
from models.bundle.bundle import Bundle, load_bundle, write_bundle
from models.compressed.fields import Fields, Part
from models.compressed.turning import TurningConfig, turning
from models.insight.collision import collisions
from models.insight.reader import angles, readers
from models.insight.table_report import Insight, insight
from models.ranker.network import DensePart, NetworkConfig
from models.ranker.train import TrainConfig, new_ranker
from models.table.schema import Feature, Schema
from tessera.pages import table_drawing as table
from tests.build import coloured_parts


def hashed(rows: int, seed: int, **sizes: tuple[int, int]) -> dict[str, NDArray[np.int64]]:
    """By salt the rows of so many random values and chunks."""
    rng = np.random.default_rng(seed)
    spec = HashSpec(rows=rows)
    return {
        salt: spec.lookup(salt, chunks, fingerprint([str(one) for one in rng.choice(10**9, values, replace=False)]))
        for salt, (values, chunks) in sizes.items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [97, 1_000, 20_000])
def test_measured_collisions_are_the_closed_form_within_three_deviations(rows: int, seed: int) -> None:
    found = collisions(hashed(rows, seed, a=(3_000, 2), b=(800, 1), c=(20, 3)), rows)
    assert {one.kind for one in found} == {"within", "fully", "between"}
    for one in found:
        assert abs(one.pairs - one.expected) <= 3.5 * one.deviation + 1, one
        assert one.z == pytest.approx((one.pairs - one.expected) / one.deviation)
    assert sum(abs(one.z) > 3 for one in found) <= 1


def test_collisions_are_those_counted_pair_by_pair() -> None:
    rows = hashed(7, 0, a=(12, 2), b=(9, 1))
    found = {(one.of, one.kind): one.pairs for one in collisions(rows, 7)}

    def pairs(salt: str, chunks: list[int]) -> int:
        own = rows[salt][:, chunks]
        return sum(bool((u == v).all()) for u, v in combinations(own, 2))

    def between(one: str, two: str, lookups: list[tuple[int, int]]) -> int:
        return sum(u[i] == v[j] for i, j in lookups for u, v in product(rows[one], rows[two]))

    assert found == {
        ("a#0", "within"): pairs("a", [0]),
        ("a#1", "within"): pairs("a", [1]),
        ("a", "fully"): pairs("a", [0, 1]),
        ("b#0", "within"): pairs("b", [0]),
        ("b", "fully"): pairs("b", [0]),
        ("a × a", "between"): between("a", "a", [(0, 1)]),
        ("a × b", "between"): between("a", "b", [(0, 0), (1, 0)]),
    }
    assert found["a", "fully"] < found["a#0", "within"]


def test_one_row_makes_every_pair_collide() -> None:
    within, fully = collisions({"a": np.zeros((5, 1), dtype=np.int64)}, 1)
    assert (within.pairs, within.expected, within.z) == (10, 10.0, 0.0)
    assert fully.pairs == 10


def test_a_salt_without_values_has_no_collisions() -> None:
    assert all(one.pairs == 0 and one.z == 0 for one in collisions({"a": np.zeros((0, 2), dtype=np.int64)}, 10))


def test_readers_of_one_direction_stand_at_0_and_of_disjoint_ones_at_90_degrees() -> None:
    left, right = np.zeros((6, 4)), np.zeros((6, 4))
    left[:, :2], right[:, 2:] = np.random.default_rng(0).normal(size=(2, 6, 2))
    found = angles({"one": left, "two": -3 * left, "three": right})
    assert found.degrees[0][1] == pytest.approx(0, abs=1e-4)
    assert found.degrees[0][2] == pytest.approx(90)
    assert found.leakage[0][2] == pytest.approx(0)
    assert found.pair == ("one", "two")
    assert found.mean == pytest.approx(60, abs=1e-4)


@pytest.mark.parametrize("degrees", [10, 45, 80, 135])
def test_the_angle_of_vectors_is_that_between_their_lines(degrees: float) -> None:
    radians = np.radians(degrees)
    found = angles({"one": np.array([[2.0, 0.0]]), "two": np.array([[np.cos(radians), np.sin(radians)]])})
    assert found.smallest == pytest.approx(min(degrees, 180 - degrees))
    assert found.leakage[0][1] == pytest.approx(abs(np.cos(radians)))


def test_leakage_is_the_share_of_a_gradient_that_another_reader_reads_back() -> None:
    one, two = np.random.default_rng(1).normal(size=(2, 5, 3))
    expected = np.linalg.norm(one @ two.T) / np.linalg.norm(one) / np.linalg.norm(two)
    assert angles({"one": one, "two": two}).leakage[0][1] == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_reader_is_the_part_of_the_first_layer_that_sees_its_lookup(pooling: str) -> None:
    features = (
        Feature("item", "item", "i", "i", 2),
        Feature("past", "history", "i", "i", 2, pooling),  # type: ignore[arg-type]
        Feature("user", "user", "u", "u"),
    )
    schema = Schema(features, (), rows=9, dim=4, history_length=3)
    network = DensePart(schema, NetworkConfig(hidden=(5,)))
    order = ["item", "past", "user"] if pooling == "mean" else ["item", "user", "past"]
    chunks = {"item": 2, "past": 2, "user": 1}
    names = [f"{name}#{chunk}" for name in order for chunk in range(chunks[name])]
    for head, layer in ((False, "network.mlp._mlp.0._linear.weight"), (True, "network.head.weight")):
        found = readers(schema, network, head=head)
        assert list(found) == names
        whole = network.state_dict()[layer].numpy()[:, : 4 * len(names)]
        np.testing.assert_array_equal(np.concatenate(list(found.values()), axis=1), whole)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("insight")
    return write_bundle(coloured_parts(directory / "parts"), directory / "bundle")


@pytest.fixture(scope="module")
def seen(bundle: Bundle) -> Insight:
    return insight(bundle)


def test_an_insight_is_json(seen: Insight) -> None:
    assert json.loads(json.dumps(asdict(seen), allow_nan=False))["bundle"] == seen.bundle


def test_the_sums_add_up(bundle: Bundle, seen: Insight) -> None:
    sizes = seen.sizes
    assert sizes.total == sizes.weights + sizes.accumulators + sizes.sketch + sizes.network
    assert sizes.weights == bundle.schema.rows * bundle.schema.dim * 4
    assert seen.hashed.rows + seen.exact.rows == seen.rows == bundle.schema.rows
    for total, kind in ((seen.total_within, "within"), (seen.total_between, "between")):
        assert total.pairs == sum(one.pairs for one in seen.collisions if one.kind == kind)
        assert abs(total.z) <= 3
    assert sum(one.reliance for one in seen.widening) == pytest.approx(1)
    assert [one.gain for one in seen.widening] == sorted((one.gain for one in seen.widening), reverse=True)


def test_dead_rows_are_those_that_no_training_touched(bundle: Bundle, seen: Insight) -> None:
    ranker, cut = bundle.ranker(), bundle.schema.hashed_rows
    untouched = (ranker.table.accumulator == 0).numpy()
    assert (seen.hashed.dead, seen.exact.dead) == (untouched[:cut].sum(), untouched[cut:].sum())
    assert 0 < seen.hashed.dead < seen.hashed.rows


def test_exact_features_never_collide(seen: Insight) -> None:
    exact = {one.salt for one in seen.features if one.exact}
    assert exact
    assert not any(salt in one.of for one in seen.collisions for salt in exact)
    assert not exact & {one.salt for one in seen.widening}
    colour = next(one for one in seen.features if one.name == "item.colour")
    assert (colour.values, colour.reading) == (4, 4)


def test_the_hot_rows_name_values_that_read_them(bundle: Bundle, seen: Insight) -> None:
    spec = bundle.schema.hash_spec
    most = seen.hot[0]
    assert most.why == "values"
    assert most.values == max(one.values for one in seen.hot)
    for sample in most.samples:
        salt, value = sample.split("=", 1)
        feature = next(one for one in bundle.schema.features if one.salt == salt)
        assert feature.exact or most.row in spec.lookup(salt, feature.chunks, fingerprint([value]))


def test_of_features_of_events_no_values_are_known(tmp_path: Path) -> None:
    parts = coloured_parts(tmp_path / "parts", epochs=0)
    place = Feature("event.place", "event", "place", "event.place", 2)
    schema = replace(parts.schema, features=(*parts.schema.features, place))
    ranker = new_ranker(schema, TrainConfig(network=parts.ranker.network.config))
    seen = insight(write_bundle(replace(parts, schema=schema, ranker=ranker), tmp_path / "bundle"))
    found = next(one for one in seen.features if one.name == "event.place")
    assert (found.values, found.reading, found.norm, found.lookups) == (None, None, None, 2)
    assert seen.hashed.dead == seen.hashed.rows
    table.render(seen, Console(file=StringIO()))


def test_it_is_drawn_and_printed(bundle: Bundle, seen: Insight, tmp_path: Path) -> None:
    console = Console(record=True, width=140, file=StringIO())
    table.render(seen, console)
    shown = console.export_text()
    for name in ("item_id", "collisions", "widen", "never trained"):
        assert name in shown
    table.plot(seen, tmp_path / "deep" / "insight.png")
    assert (tmp_path / "deep" / "insight.png").read_bytes().startswith(b"\x89PNG")
    assert load_bundle(bundle.directory).id == seen.bundle


def synthetic_fields(examples: int = 4_000, sizes: tuple[int, ...] = (200, 150, 100)) -> Fields:
    """Fields whose values each have an effect of their own."""
    rng = np.random.default_rng(0)
    effects = [rng.normal(0, 1.5, size) for size in sizes]
    codes = np.stack([rng.integers(0, size, examples) for size in sizes], axis=1)
    logit = sum(effect[codes[:, number]] for number, effect in enumerate(effects))
    labels = (rng.random(examples) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(sizes)])
    whole = codes + start[:-1]
    parts = {
        name: Part(whole[cut], np.zeros((len(whole[cut]), 0), np.float32), labels[cut])
        for name, cut in (("train", slice(0, -500)), ("validation", slice(-500, None)), ("test", slice(-500, None)))
    }
    prints = fingerprint([str(number) for number in range(start[-1])])
    counts = np.bincount(whole[:-500].ravel(), minlength=start[-1])
    return Fields(tuple("abc"[: len(sizes)]), np.array(sizes), prints, counts, parts)


def test_readers_that_start_parallel_turn_apart() -> None:
    fields = synthetic_fields()
    found = turning(fields, fields.values // 2, TurningConfig(dim=8, batch=128, epochs=10))
    assert found.before == pytest.approx(0, abs=0.1)
    assert found.after > 40
    assert 0 < found.smallest <= found.after
    assert found.auc is not None
    assert found.auc > 0.6
    assert found == turning(fields, fields.values // 2, TurningConfig(dim=8, batch=128, epochs=10))


def test_readers_that_do_not_learn_stay_parallel() -> None:
    found = turning(synthetic_fields(), 100, TurningConfig(dim=8, epochs=1, reader_rate=0.0))
    assert found.after == pytest.approx(0, abs=0.1)
