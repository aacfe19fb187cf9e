"""The benchmark of layouts: equal bytes, equal lookups, and claims that compare nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from features.dataset.descriptor import load_dataset
from models.compressed.fields import Fields, with_noise
from models.compressed.layout import rows_of
from models.ranker.network import NetworkConfig
from tessera.bench.harness.data import dataset_fields
from tessera.bench.offline import multiplexing as bench
from tessera.bench.offline.multiplexing import (
    BUDGETS,
    GRID,
    LOOKUPS,
    SEARCH,
    ArmResult,
    MultiplexingArm,
    Protocol,
    claims,
    row,
)
from tessera.demo.synthetic import write_synthetic
from tests.integration.world import quiet

QUICK = Protocol(max_epochs=1, network=NetworkConfig(1, 4, (8,)))
HASHING, UNIFIED = "hashing per feature", "unified"


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Fields:
    descriptor = write_synthetic(tmp_path_factory.mktemp("data"), users=120, items=200, events=3_000)
    return dataset_fields(load_dataset(descriptor))


def test_every_unified_arm_has_its_hashing_peer_at_equal_lookups_width_and_bytes() -> None:
    arms = {*GRID, *SEARCH}
    for arm in arms:
        if arm.layout == UNIFIED:
            assert replace(arm, layout=HASHING) in arms
    assert {arm.lookups for arm in GRID if arm.layout == HASHING} == set(LOOKUPS)


def test_a_budget_counts_accumulators_so_narrow_rows_are_fewer_than_their_floats_say() -> None:
    full = MultiplexingArm("collisionless", 1.0).size_bytes(1_000)
    assert full == 4 * 1_000 * 33
    for lookups in LOOKUPS:
        arm = MultiplexingArm(UNIFIED, 0.5, lookups)
        assert 0.5 * full - 4 * (arm.dim + 1) < arm.size_bytes(1_000) <= 0.5 * full
    assert MultiplexingArm(UNIFIED, 1.0, 4).rows(1_000) == 1_000 * 33 // 9


def test_parts_of_equal_size_do_not_follow_the_number_of_values(fields: Fields) -> None:
    rows = 40 * len(fields.names)
    found = rows_of(fields, "hashing in equal parts", rows=rows, chunks=2)
    for number, (start, stop) in enumerate(zip(fields.offsets, fields.offsets[1:], strict=False)):
        own = found[start:stop]
        assert own.min() >= 40 * number
        assert own.max() < 40 * (number + 1)
    assert found.shape == (fields.values, 2)


def test_a_field_of_noise_is_added_behind_the_others_and_says_nothing(fields: Fields) -> None:
    wide = with_noise(fields, 500, seed=1)
    assert wide.values == fields.values + 500
    for name, part in wide.parts.items():
        assert np.array_equal(part.codes[:, :-1], fields.parts[name].codes)
        assert part.codes[:, -1].min() >= fields.values
    assert wide.counts[fields.values :].sum() == len(fields.parts["train"].labels)
    assert len(wide.fingerprints) == wide.values
    assert len(np.unique(wide.fingerprints[fields.values :])) == 500


def outcomes(*, one_lookup: float, many: float) -> dict[MultiplexingArm, list[ArmResult]]:
    """Hashing at .8 with one lookup and .87 with more; unified above it by the gains given."""
    found = {}
    for arm in GRID:
        base = 0.9 if arm.layout == "collisionless" else 0.8 if arm.lookups == 1 else 0.87
        gain = (one_lookup if arm.lookups == 1 else many) if arm.layout == UNIFIED else 0.0
        found[arm] = [ArmResult(base + gain, 0.5, 3), ArmResult(base + gain + 0.001, 0.5, 3)]
    return found


def test_claims_compare_equal_lookups_alone() -> None:
    held = claims(outcomes(one_lookup=0.04, many=0.0))
    assert len(held) == 4 * len(BUDGETS)
    assert all(claim.holds for claim in held)
    # Four lookups against one would show seven points here; at equal lookups there is nothing, or a loss.
    assert max(claim.value for claim in held) < 5
    lost = claims(outcomes(one_lookup=0.04, many=-0.01))
    assert [claim.holds for claim in lost] == [True, True, False, False] * len(BUDGETS)
    assert not claims(outcomes(one_lookup=0.0, many=0.0))[0].holds


def test_the_gain_of_a_row_is_over_hashing_with_as_many_lookups() -> None:
    found = outcomes(one_lookup=0.04, many=0.01)
    for arm in GRID:
        shown = row(arm, found, 1_000)
        if arm.layout == UNIFIED:
            assert shown["gain_points"] == pytest.approx(4 if arm.lookups == 1 else 1)
        else:
            assert shown["gain_points"] is None


def test_the_benchmark_trains_each_arm_once_and_draws_the_plot(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = write_synthetic(tmp_path / "data", users=100, items=100, events=1_500)
    monkeypatch.setattr(
        bench, "SEARCH", (MultiplexingArm(HASHING, 0.5, 2, noise=True), MultiplexingArm(UNIFIED, 0.5, 2, noise=True))
    )
    result = bench.multiplexing(load_dataset(descriptor), tmp_path / "out", seeds=1, console=quiet(), protocol=QUICK)
    assert len(result.rows) == len(GRID) + 2
    assert all(0.3 < one["test_auc"] < 0.9 for one in result.rows)
    assert Path(result.plot).stat().st_size > 0
