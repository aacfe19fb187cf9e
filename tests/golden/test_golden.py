"""Frozen bytes: what was written once under a version is read forever, and what is written now is the same.

The files beside this one are never made anew. A change that alters them is another version of its format, which gets
files of its own beside these; the old ones stay readable.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from features.aggregate.halving import weights
from features.aggregate.state import GroupState
from features.aggregate.stored import aggregate_arrays, load_aggregates, restore_aggregates, save_aggregates
from features.errors import BundleError, EventError
from features.hashing import VERSION, HashSpec, fingerprint
from models.bundle import aggregate_record, delta, record
from models.export import schema as export_schema
from models.profile.profile import ProfileMeasure, TrainingProfile, read_profile, write_profile
from models.semantic_id.codebook.quantizer import prefix_tokens
from serving.skew import record as skew_record

HERE = Path(__file__).parent
HASHING = json.loads((HERE / "hashing.json").read_text(encoding="utf-8"))
TOKENS = json.loads((HERE / "prefix_tokens.json").read_text(encoding="utf-8"))

ITEM = record.ItemRecord(
    encoder="lsa-0123456789ab",
    vector=np.array([0.5, -0.25, 1e-7], dtype="<f4").tobytes(),
    codes=[5, 17, 3],
    features={"genre": ["Drama", "Комедия"], "year": 1999.0, "colour": None, "title": "日本 🎬"},
    codebook="rqvae-0123456789ab",
)
VISITS = record.HistoryRecord(items=["i1", "Ж-2", ""], times=[0, 1_700_000_000_000_000, -5])
LABELLED = msgspec.structs.replace(VISITS, labelled=["i1", "", "日本"], labels=b"\1\0\1")
DELTA = delta.Delta(
    version=1,
    bundle="b-0123456789abcdef",
    seq=300,
    dim=4,
    rows=np.array([0, 7, 2**32 - 2], dtype="<u4").tobytes(),
    weights=(np.arange(12, dtype="<f4") / 8 - 0.5).tobytes(),
    accumulators=np.array([0, 1e-8, 2.5], dtype="<f4").tobytes(),
    records=[
        delta.Record("item", "Ж-2", (HERE / "item-v1.bin").read_bytes()),
        delta.Record("history", "u1", record.encode(VISITS)),
    ],
    times_ms=[1_700_000_000_000, 1_700_000_000_001],
)

DELTA_2 = msgspec.structs.replace(
    DELTA,
    version=2,
    sources=[delta.Source("items", 0, 3, 3), delta.Source("events", 1, 2**40, 2**40 + 7)],
    poison=[("events", 1, 2**40 + 2)],
)

SKEW = skew_record.SkewRecord(
    version=1,
    id="0123456789abcdef0123456789abcdef",
    time_ms=1_700_000_000_000,
    bundle="b-0123456789abcdef",
    user="Ж-2",
    candidates=["i1", ""],
    context={"surface": "home", "price": 1.5, "tags": ["a"], "none": None},
    at=None,
    now_us=1_700_000_000_000_000,
    retrieved=False,
    known_user=True,
    stale=False,
    source="mirror",
    storage="float16",
    position=2**40,
    history=["i1"],
    rows=np.array([3, 2**32 - 2], dtype="<u4").tobytes(),
    digests=np.array([14645671355050397243, 13808810740282909203], dtype="<u8").tobytes(),
    shared=skew_record.SkewBatch(b"\0\0\0\0", b"\1\0\0\0", np.ones(1, dtype="<f4").tobytes()),
    own=skew_record.SkewBatch(b"\1\0\0\0", b"\1\0\0\0\0\0\0\0", np.ones(2, dtype="<f4").tobytes()),
    numeric=np.array([0.5, -1], dtype="<f4").tobytes(),
    content=b"",
    scores=np.array([0.25, 0.75], dtype="<f4").tobytes(),
)
SKEW_LABELLED = msgspec.structs.replace(SKEW, labelled=["i1", "Ж-2"], labels=b"\0\1")
EXPORT = export_schema.ExportSchema(
    format=1,
    id="e-0123456789abcdef",
    name="shop",
    source={"bundle": "b-0123456789abcdef", "encoder": "lsa-0123456789ab"},
    tables={
        "items": export_schema.ExportTable(
            rows=3,
            keys=["item_id"],
            timestamp="event_timestamp",
            partitioning=export_schema.Partitioning("bucket", "xxh3_64 of the UTF-8 of item_id, modulo 1."),
            columns=[
                export_schema.ExportColumn("item_id", "string", [], "Id of the item."),
                export_schema.ExportColumn(
                    "content_vector", "float32", [2], "Content vector.", {"encoder": "lsa-0123456789ab"}
                ),
                export_schema.ExportColumn("genre", "string", [None], "Жанр."),
            ],
        )
    },
)


def frozen(name: str) -> bytes:
    return (HERE / name).read_bytes()


def test_the_fingerprints_of_version_1_stand() -> None:
    assert HASHING["version"] == VERSION
    assert [f"{value:016x}" for value in fingerprint(HASHING["values"]).tolist()] == HASHING["fingerprints"]


@pytest.mark.parametrize("case", HASHING["lookups"], ids=lambda case: f"{case['salt']}-{case['rows']}")
def test_the_rows_of_hash_contract_1_stand(case: dict[str, Any]) -> None:
    found = HashSpec(case["rows"], version=1).lookup(case["salt"], case["chunks"], fingerprint(HASHING["values"]))
    assert found.tolist() == case["expected"]


def test_the_tokens_of_semantic_ids_stand() -> None:
    assert prefix_tokens(np.array(TOKENS["codes"], dtype=np.uint16)) == TOKENS["tokens"]


def test_a_delta_of_version_1_is_still_read() -> None:
    assert delta.decode(frozen("delta-v1.bin")) == DELTA


def test_a_delta_of_version_2_is_read_and_written_the_same() -> None:
    assert delta.VERSION == 2
    found = delta.decode(frozen("delta-v2.bin"))
    assert found == DELTA_2
    assert delta.encode(DELTA_2) == frozen("delta-v2.bin")
    assert found.row_numbers.tolist() == [0, 7, 2**32 - 2]
    assert found.vectors.tolist() == (np.arange(12).reshape(3, 4) / 8 - 0.5).tolist()
    assert found.states.tolist() == np.array([0, 1e-8, 2.5], dtype=np.float32).tolist()


def test_an_item_of_version_1_is_read_as_one_of_no_codebook() -> None:
    assert record.decode_item(frozen("item-v1.bin")) == msgspec.structs.replace(ITEM, codebook="")


def test_an_item_of_version_2_is_read_and_written_the_same() -> None:
    assert record.decode_item(frozen("item-v2.bin")) == ITEM
    assert record.encode(ITEM) == frozen("item-v2.bin")
    assert ITEM.content().tolist() == np.array([0.5, -0.25, 1e-7], dtype=np.float32).tolist()


def test_a_skew_record_of_version_1_is_read_and_does_not_say_which_values_had_no_row() -> None:
    found = skew_record.decode(frozen("skew-record-v1.bin"))
    assert found == SKEW
    assert found.unread("own", 1) is None
    assert found.row_numbers.tolist() == [3, 2**32 - 2]
    assert found.numbers().tolist() == [[0.5], [-1.0]]
    vectors = (np.arange(8) / 8 - 0.5).astype(np.float32).reshape(2, 4)
    assert found.row_digests.tolist() == skew_record.digests(vectors).tolist()


def test_a_skew_record_of_version_2_is_read_and_written_the_same() -> None:
    assert skew_record.VERSION == 2
    written = msgspec.structs.replace(SKEW, version=2, shared_unread=b"", own_unread=bytes([0, 255]))
    found = skew_record.decode(frozen("skew-record-v2.bin"))
    assert found == written
    assert skew_record.encode(written) == frozen("skew-record-v2.bin")
    shared, own = found.unread("shared", 1), found.unread("own", 1)
    assert shared is not None
    assert own is not None
    assert (shared.tolist(), own.tolist()) == ([[0]], [[0], [255]])


PROFILE = TrainingProfile(
    version=1,
    rows=1_000,
    users=100,
    held_rows=250,
    measures=[
        ProfileMeasure(
            "price", "values", [0.0, 0.5, 0.25, 0.25], 400.5, edges=[-1.5, 0.0, 2.0], held=[0.0, 1.0, 0.0, 0.0]
        ),
        ProfileMeasure("item.format", "values", [0.75, 0.25], 99.0, rows=[4_294_967_295]),
        ProfileMeasure("item.format", "missing", [0.9, 0.1], 99.0),
        ProfileMeasure("score", "values", [0.5, 0.5], 50.0, edges=[0.25]),
    ],
)


def test_a_profile_of_version_1_is_read_and_written_the_same(tmp_path: Path) -> None:
    assert read_profile(HERE / "profile-v1.json") == PROFILE
    write_profile(PROFILE, tmp_path / "profile.json")
    assert (tmp_path / "profile.json").read_bytes() == frozen("profile-v1.json")


def test_a_history_of_version_1_is_read_and_written_the_same() -> None:
    assert record.decode_history(frozen("history-v1.bin")) == VISITS
    assert record.encode(VISITS) == frozen("history-v1.bin")


AGGREGATES = json.loads((HERE / "aggregates.json").read_text(encoding="utf-8"))


def aggregate_state() -> GroupState:
    """A state with two windows, two half-lives and all extremes after a few batches, late events among them."""
    state = GroupState(2, (3_600_000_000, 604_800_000_000), (3_600_000_000, 604_800_000_000), ("min", "max", "last"))
    for keys, times, labels in AGGREGATES["batches"]:
        values = np.stack([np.ones(len(keys), dtype=np.int64), np.array(labels)], axis=1)
        numbers = np.array([[10 * time % 97] * 3 for time in times])
        enters = np.ones(len(keys), dtype=np.bool_)
        state.advance(np.array(keys, dtype=np.uint64), np.array(times), values, enters, numbers)
    return state


def test_the_rows_of_aggregates_are_frozen() -> None:
    state = aggregate_state()
    assert state.keys.tolist() == [int(key) for key in AGGREGATES["keys"]]
    assert state.rows.tolist() == AGGREGATES["rows"]


def test_the_weights_of_decay_are_frozen() -> None:
    for half_life, moments, expected in AGGREGATES["weights"]:
        assert weights(np.array(moments), half_life).tolist() == expected


def test_the_record_of_a_batch_of_aggregates_is_frozen() -> None:
    state = aggregate_state()
    (made,) = aggregate_record.batch_records(3, state.keys, state.rows, limit=1 << 20)
    assert (made.kind, made.id) == ("aggregates", "3")
    assert hashlib.sha256(made.payload).hexdigest() == AGGREGATES["record"]
    group, keys, rows = aggregate_record.decode_batch(made)
    assert (group, keys.tolist(), rows.tolist()) == (3, state.keys.tolist(), state.rows.tolist())


def test_an_export_schema_of_version_1_is_read_and_written_the_same(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_bytes(frozen("export-schema-v1.json"))
    assert export_schema.read_schema(tmp_path) == EXPORT
    export_schema.write_schema(EXPORT, tmp_path)
    assert (tmp_path / "schema.json").read_bytes() == frozen("export-schema-v1.json")
    assert export_schema.identified(EXPORT).id == "e-6661130202f4a4bc"


def test_a_history_with_labelled_items_is_read_and_written_the_same() -> None:
    assert record.decode_history(frozen("history-v2.bin")) == LABELLED
    assert record.encode(LABELLED) == frozen("history-v2.bin")
    with pytest.raises(EventError, match="3 labelled items, but 1 labels"):
        record.decode_history(record.encode(msgspec.structs.replace(LABELLED, labels=b"\1")))


def test_a_skew_record_of_version_1_with_labelled_items_is_read() -> None:
    assert skew_record.decode(frozen("skew-record-v1-labelled.bin")) == SKEW_LABELLED


def test_aggregates_of_format_1_are_read_without_owners_and_those_of_format_2_are_written_the_same(
    tmp_path: Path,
) -> None:
    old, new = (load_aggregates(HERE / f"aggregates-v{number}.safetensors") for number in (1, 2))
    of = (("user",), "item")
    assert old.pairs[of].owners.tolist() == [0, 0, 0]
    assert new.pairs[of].owners.tolist() == [2**63 + 5, 7, 7]
    assert old.pairs[of].hashes.tolist() == new.pairs[of].hashes.tolist()
    for by, state in new.states.items():
        assert old.states[by].keys.tolist() == state.keys.tolist()
        assert old.states[by].rows.tolist() == state.rows.tolist()
    save_aggregates(new, tmp_path / "aggregates.safetensors")
    assert (tmp_path / "aggregates.safetensors").read_bytes() == frozen("aggregates-v2.safetensors")
    newer = aggregate_arrays(new) | {"aggregates.format": np.array([9])}
    with pytest.raises(BundleError, match="expected format 1 to 2, got 9"):
        restore_aggregates(new, newer)
