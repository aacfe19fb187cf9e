"""Claims of the benchmark of upgrades, from rows that are made up; and its parts on a small catalogue."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from features.content.encoder import unit
from features.errors import DatasetError, TesseraError
from features.frame import Frame
from models.encoder.likes import Neighbours
from models.encoder.upgrade import OldSpace, UpgradeSample, best, candidates, refuse_below
from models.semantic_id.codebook import kinds as codebooks
from tessera.bench.encoder import upgrade as bench

D, N = 12, 400


def rows(**changed: Any) -> list[dict[str, Any]]:
    """Rows in which every claim holds; `changed` replaces values of the row of its case, by `case__method`."""
    found = [
        {"case": "LSA refitted", "method": "no map", "of_old": 0.6},
        {
            "case": "LSA refitted",
            "method": "ridge",
            "first_codes_3 x 32": 0.95,
            "whole_ids_3 x 32": 0.7,
            "of_reembedded": 0.99,
        },
        {"case": "MiniLM tuned", "method": "no map", "of_old": 1.5},
        {"case": "MiniLM tuned", "method": "shift", "of_old": 1.6},
        {"case": "MiniLM tuned", "method": "ridge", "of_old": 1.0, "whole_ids_3 x 32": 0.8},
        {"case": "ranker", "vectors": "LSA", "method": "ridge", "auc_less_old": -0.001},
        {"case": "free embeddings", "method": "d = 4", "pairs_solved": 1.0},
    ]
    for name, values in changed.items():
        case, _, method = name.replace("_of_", " ").partition("__")
        next(row for row in found if row["case"] == case.replace("_", " ") and row["method"] == method).update(values)
    return found


def test_each_claim_is_judged_from_its_own_row_and_a_missing_case_claims_nothing() -> None:
    assert all(claim.holds for claim in bench.claims(rows()))
    assert list(bench.claims([])) == []
    judged = {claim.claim: claim.holds for claim in bench.claims(rows(LSA_refitted__ridge={"whole_ids_3 x 32": 0.5}))}
    assert [name for name, holds in judged.items() if not holds] == ["LSA refitted, ridge: whole ids 3 x 32"]
    control = {claim.claim: claim.holds for claim in bench.claims(rows(**{"LSA_refitted__no map": {"of_old": 0.9}}))}
    assert [name for name, holds in control.items() if not holds] == ["LSA refitted, no map: of old"]


def test_rows_are_means_over_the_seeds() -> None:
    measured = [
        {"case": "dims", "vectors": "LSA", "method": "rotation", "of_full": value, "item_bytes": 128}
        for value in (0.9, 1.1)
    ]
    (row,) = bench._means(measured)
    assert row == {
        "case": "dims",
        "vectors": "LSA",
        "method": "rotation",
        "of_full": pytest.approx(1.0),
        "item_bytes": 128,
    }


def test_other_vectors_take_the_place_of_the_old_and_unlisted_items_stay_without() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, D)))
    book = codebooks.fit("residual-kmeans", vectors, levels=2, codes=4, seed=0)
    content = {
        "item_id": [str(number) for number in range(41)],
        "content_vector": pl.Series([*vectors.tolist(), None], dtype=pl.Array(pl.Float32, D)),
        "semantic_codes": pl.Series([*book.encode(vectors).tolist(), None], dtype=pl.Array(pl.UInt16, 2)),
    }
    frame = Frame(pl.DataFrame({"user_id": ["a"]}), pl.DataFrame(content), pl.DataFrame({"item": [0]}))
    turned = np.ascontiguousarray(vectors[::-1])
    items = bench._with_vectors(frame, turned, book).items
    assert np.array_equal(items["content_vector"][:40].to_numpy(), turned)
    assert np.array_equal(items["semantic_codes"][:40].to_numpy(), book.encode(turned))
    assert items["content_vector"][40] is None


@pytest.fixture(scope="module")
def spaces() -> tuple[OldSpace, UpgradeSample]:
    """A space, and a newer space: the old one turned, with less noise in the direction of the likes."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 40, N)
    centres = rng.normal(size=(40, D))[group]
    old = unit(centres + 0.8 * rng.normal(size=(N, D)))
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    first, second = np.nonzero(group[:, None] == group[None, :])
    kept = first != second
    wanted = Neighbours(first[kept], second[kept], np.ones(int(kept.sum()), dtype=np.float32))
    book = codebooks.fit("residual-kmeans", old, levels=2, codes=8, seed=0)
    rows = np.arange(N)
    sample = UpgradeSample("new", rows[:200], rows[200:], rows[200:], unit(old @ turn))
    return OldSpace("old", old, np.ones(N, dtype=bool), book, wanted), sample


def test_a_turned_space_needs_a_map_and_the_aim_is_kept_with_it(spaces: tuple[OldSpace, UpgradeSample]) -> None:
    judged = candidates(*spaces)
    kept = {one.map.kind: one.fidelity for one in judged}
    assert set(kept) == {"none", "shift", "procrustes", "ridge", "mlp"}
    assert kept["none"]["whole_ids"] < 0.3 < 0.95 < kept["procrustes"]["whole_ids"]
    assert kept["none"]["task"] < 0.7 < 0.98 < kept["procrustes"]["task"]
    for aim in ("codes", "gain", "both"):
        chosen = best(judged, aim).map
        assert (chosen.aim, chosen.kind in ("procrustes", "ridge", "mlp")) == (aim, True)
        assert chosen.fidelity == kept[chosen.kind]


def test_no_map_wins_where_the_spaces_are_one(spaces: tuple[OldSpace, UpgradeSample]) -> None:
    old, sample = spaces
    same = UpgradeSample("new", sample.fitted, sample.coded, sample.asking, old.vectors)
    assert best(candidates(old, same), "both").map.kind == "none"


def test_a_fidelity_below_the_least_and_an_aim_that_was_not_measured_are_refused(
    spaces: tuple[OldSpace, UpgradeSample],
) -> None:
    old, sample = spaces
    chosen = best(candidates(old, sample, kinds=("none",)), "codes")
    with pytest.raises(TesseraError, match=r"the best map \(none\) reaches whole ids 0\.\d+, expected 0.9 or more"):
        refuse_below(chosen, {"whole_ids": 0.9})
    alone = OldSpace(old.id, old.vectors, old.known, old.codebook, None)
    with pytest.raises(DatasetError, match="--keep gain needs co-liked items"):
        best(candidates(alone, sample, kinds=("none",)), "gain")
