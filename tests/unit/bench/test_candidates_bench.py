"""`bench candidates`: a claim that can fail, and datasets that are refused."""

from pathlib import Path

import pytest

from features.errors import TesseraError
from tessera.bench.online.candidates import candidates, claims
from tests.build import coloured_dataset
from tests.integration.world import quiet


@pytest.mark.parametrize(("ratios", "holds"), [((1.4, 1.5, 2.0), True), ((1.4, 1.51, 1.6), False)])
def test_the_claim_is_the_median_of_the_seeds_over_http(ratios: tuple[float, ...], holds: bool) -> None:
    rows = [{"part": "retrieve: HTTP", "ratio": ratio} for ratio in ratios]
    rows += [{"part": "retrieve: process", "ratio": 9.0}]
    assert [claim.holds for claim in claims(rows)] == [holds]


def test_a_dataset_without_users_is_refused(tmp_path: Path) -> None:
    dataset = coloured_dataset(tmp_path)
    without = dataset.model_copy(update={"events": dataset.events.model_copy(update={"user": None})})
    with pytest.raises(TesseraError, match="bench candidates needs users and items with content"):
        candidates(without, tmp_path, seeds=1, console=quiet())
