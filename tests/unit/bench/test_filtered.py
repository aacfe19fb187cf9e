"""The benchmark of filtered search: every state is measured, on the same matches, beside every peer."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from features.dataset.descriptor import load_dataset
from features.errors import TesseraError
from tessera.bench.online import filtered as bench
from tessera.bench.online import filtered_bits
from tessera.bench.online.filtered import SELECTIVITIES
from tessera.demo.synthetic import write_synthetic


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2_000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return bench._measure(vectors, vectors[:25].copy(), rng)


def test_tessera_is_measured_warm_after_a_change_and_cold_and_each_peer_warm_and_cold(
    rows: list[dict[str, object]],
) -> None:
    for share in SELECTIVITIES:
        found = {(row["method"], row["state"]) for row in rows if row["selectivity"] == share}
        peers = {(peer, state) for peer in bench._PEERS for state in (("warm",) if share == 1 else ("warm", "cold"))}
        ours = {("tessera", state) for state in (("warm",) if share == 1 else ("warm", "changed", "cold"))}
        assert found == peers | ours


def test_every_state_finds_the_same_matches(rows: list[dict[str, object]]) -> None:
    for row in rows:
        if row["method"] in ("tessera", "flat+bitmap"):
            assert float(str(row["recall"])) >= 0.9, row


def test_a_cold_query_brings_a_filter_that_is_new_and_matches_the_same() -> None:
    place = np.random.default_rng(0).permutation(500)
    searcher = bench.Searcher(
        np.eye(500, 4, dtype=np.float32) + 0.1, bench.Attributes(bench.pl.DataFrame({"place": place}), ["place"])
    )
    keys = {bench._filter(50 - n / 1e6).key for n in range(10)}
    assert len(keys) == 10
    warm = searcher.attributes.mask(bench._filter(50), 500)
    assert np.array_equal(searcher.attributes.mask(bench._filter(50 - 9 / 1e6), 500), warm)
    assert warm.sum() == 50


def made_up(state: str, method: str, ms: float, recall: float = 1.0) -> dict[str, object]:
    return {"catalogue": "c", "method": method, "state": state, "p50_ms": ms, "recall": recall}


def test_claims_hold_in_each_state_against_the_fastest_peer_that_finds_enough() -> None:
    rows = []
    for share in SELECTIVITIES:
        own = [made_up("warm", "tessera", 1.0), made_up("changed", "tessera", 1.0), made_up("cold", "tessera", 9.0)]
        theirs = [made_up(state, peer, 1.0) for state in ("warm", "cold") for peer in bench._PEERS[:2]]
        fast = [made_up(state, "HNSW", 0.1, recall=0.3) for state in ("warm", "cold")]
        rows += [{"selectivity": share} | row for row in own + theirs + fast]
    claims = bench._claims(rows)
    assert [claim.holds for claim in claims] == [True, True, True, False] * len(SELECTIVITIES)
    assert claims[3].value == pytest.approx(9)


def test_bits_are_measured_beside_each_peer_and_find_what_they_claim() -> None:
    rng = np.random.default_rng(0)
    own = rng.standard_normal((1_500, 16)).astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    rows = [
        {"catalogue": name} | row
        for name, vectors, queries in filtered_bits.shapes(own, rng, (2_000,))
        for row in filtered_bits.measure(vectors, queries[:10], rng)
    ]
    assert {row["items"] for row in rows} == {1_500, 2_000}
    by_share = [{row["method"] for row in rows if row["selectivity"] == share} for share in filtered_bits.SHARES]
    assert "faiss PQ fast scan + float rows" in by_share[0]
    assert all("float, gathered" in methods and len(methods) == 8 for methods in by_share[1:])
    for row in rows:
        if row["method"] in ("tessera float32", "tessera int8", "faiss flat"):
            assert row["recall"] >= 0.85, row
    claims = {claim.claim: claim for claim in filtered_bits.claims(rows)}
    assert any("recall" in claim for claim in claims)
    assert claims["2,000 synthetic: bytes of int8 rows and bits over those of float32"].value < 0.4


def test_a_slow_int8_index_breaks_the_claim_on_time() -> None:
    rows = [
        {"catalogue": "c", "items": 200_000, "selectivity": share, "method": method, "recall": 1.0, "plan": None,
         "item_bytes": 1, "of_float_time": 0.9 if method == "tessera int8" else 0.1}
        for share in filtered_bits.SHARES
        for method in ("tessera float32", "tessera int8")
    ]  # fmt: skip
    broken = [claim.claim for claim in filtered_bits.claims(rows) if not claim.holds]
    assert len(broken) == 3
    assert all("int8" in claim for claim in broken)


def test_a_part_that_is_unknown_is_named(tmp_path: Path) -> None:
    dataset = load_dataset(write_synthetic(tmp_path / "data", users=100, items=150, events=3_000))
    with pytest.raises(TesseraError, match="--part 'codes': bench filtered has the parts states, bits"):
        bench.filtered(dataset, tmp_path, seeds=1, console=Console(), parts=["codes"])
