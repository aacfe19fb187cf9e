"""Deltas: bytes that survive the wire, and a fold that does not care how often or in which order they come."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.errors import EventError
from models.bundle import delta, record

ROWS, DIM = 12, 4
FLOATS = st.floats(width=32, allow_nan=False)
RECORDS = st.lists(st.builds(delta.Record, st.sampled_from(["item", "history"]), st.text(max_size=5), st.binary()))


@st.composite
def deltas(draw: st.DrawFn) -> delta.Delta:
    rows = np.array(draw(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=5)), dtype="<u4")
    cells = draw(st.lists(FLOATS, min_size=len(rows) * (DIM + 1), max_size=len(rows) * (DIM + 1)))
    numbers = np.array(cells, dtype="<f4")
    return delta.Delta(
        version=delta.VERSION,
        bundle=draw(st.text(max_size=8)),
        seq=draw(st.integers(1, 8)),
        dim=DIM,
        rows=rows.tobytes(),
        weights=numbers[: len(rows) * DIM].tobytes(),
        accumulators=numbers[len(rows) * DIM :].tobytes(),
        records=draw(RECORDS),
        times_ms=draw(st.lists(st.integers(0, 2**53), max_size=3)),
        sources=draw(st.lists(st.builds(delta.Source, st.text(max_size=4), *[st.integers(0, 2**40)] * 3), max_size=2)),
        poison=draw(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 9), st.integers(0, 2**40)), max_size=2)),
    )


@st.composite
def logs(draw: st.DrawFn) -> list[delta.Delta]:
    """Deltas of one writer: no two of the same sequence number touch the same row."""
    found: list[delta.Delta] = []
    taken: set[tuple[int, int]] = set()
    for one in draw(st.lists(deltas(), max_size=6)):
        rows = {(one.seq, row) for row in one.row_numbers.tolist()}
        if not rows & taken:
            found.append(one)
            taken |= rows
    return found


class Folded:
    """A table that was published as zeros, and what was folded into it."""

    def __init__(self, log: list[delta.Delta]) -> None:
        self.weight, self.accumulator = torch.zeros(ROWS, DIM), torch.zeros(ROWS)
        self.seqs = np.full(ROWS, delta.SNAPSHOT_SEQ, dtype=np.int64)
        self.fold(log)

    def fold(self, log: list[delta.Delta]) -> None:
        for one in log:
            delta.fold(one, self.weight, self.accumulator, self.seqs)

    @property
    def bits(self) -> tuple[bytes, bytes, bytes]:
        return self.weight.numpy().tobytes(), self.accumulator.numpy().tobytes(), self.seqs.tobytes()


@given(deltas())
def test_decoding_undoes_encoding(one: delta.Delta) -> None:
    found = delta.decode(delta.encode(one))
    assert found == one
    assert delta.encode(found) == delta.encode(one)
    assert found.vectors.shape == (len(one.row_numbers), DIM)
    assert found.states.shape == (len(one.row_numbers),)


@given(logs())
def test_folding_again_changes_nothing(log: list[delta.Delta]) -> None:
    table = Folded(log)
    once = table.bits
    table.fold(log)
    assert table.bits == once


@given(logs(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_and_repeats_change_nothing(log: list[delta.Delta], random: Any) -> None:
    shuffled = [*log, *log[: len(log) // 2]]
    random.shuffle(shuffled)
    assert Folded(shuffled).bits == Folded(log).bits


@given(logs())
def test_a_row_is_what_its_highest_sequence_number_says(log: list[delta.Delta]) -> None:
    table = Folded(log)
    for row in range(ROWS):
        newest = max((one for one in log if row in one.row_numbers), key=lambda one: one.seq, default=None)
        if newest is None:
            assert table.seqs[row] == delta.SNAPSHOT_SEQ
            assert not table.weight[row].any()
        else:
            place = newest.row_numbers.tolist().index(row)
            assert table.weight[row].numpy().tobytes() == newest.vectors[place].tobytes()
            assert table.accumulator[row].numpy().tobytes() == newest.states[place].tobytes()
            assert table.seqs[row] == newest.seq


@given(logs(), st.integers(0, 6))
def test_a_fold_that_stopped_goes_on_as_if_it_had_not(log: list[delta.Delta], stop: int) -> None:
    table = Folded(log[:stop])
    table.fold(log[stop:])
    assert table.bits == Folded(log).bits


def written(rows: int, records: int, **changes: Any) -> list[delta.Delta]:
    rng = np.random.default_rng(0)
    numbers = rng.permutation(50_000)[:rows]
    weight, state = torch.rand(50_000, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(50_000.0)
    kept = [delta.Record("item", f"i{number}", b"x") for number in range(records)]
    fields: dict[str, Any] = {"records": kept, "trailer": delta.Trailer(times_ms=[5, 7]), **changes}
    parts = list(delta.changed_rows("b-1", 3, numbers, weight, state, **fields))
    assert np.concatenate([part.row_numbers for part in parts]).tolist() == numbers.tolist()
    assert np.concatenate([part.vectors for part in parts]).tobytes() == weight[numbers].numpy().tobytes()
    assert np.concatenate([part.states for part in parts]).tobytes() == state[numbers].numpy().tobytes()
    assert [record for part in parts for record in part.records] == kept
    return parts


@pytest.mark.parametrize(
    ("rows", "records", "parts"),
    [(0, 0, 1), (1, 0, 1), (2_048, 512, 1), (2_049, 0, 2), (5_000, 1, 3), (0, 513, 2), (3_000, 2_000, 4)],
)
def test_what_a_batch_changed_is_cut_without_loss(rows: int, records: int, parts: int) -> None:
    found = written(rows, records)
    assert len(found) == parts
    for part in found:
        assert (part.version, part.bundle, part.seq, part.dim) == (delta.VERSION, "b-1", 3, DIM)
        assert delta.decode(delta.encode(part)) == part
    # The times travel with the last part, which arrives when all the others have.
    assert [part.times_ms for part in found] == [[]] * (parts - 1) + [[5, 7]]


def test_a_part_stays_below_the_limit_of_a_message() -> None:
    rows, weight = np.arange(4_096), torch.rand(4_096, 64)
    for part in delta.changed_rows("b-1", 1, rows, weight, torch.ones(4_096), records=[]):
        assert len(delta.encode(part)) < 2**20


def test_what_was_cut_folds_to_the_table_it_was_cut_from() -> None:
    weight, state = torch.rand(5_000, DIM), torch.rand(5_000)
    folded, states, seqs = torch.zeros(5_000, DIM), torch.zeros(5_000), np.zeros(5_000, dtype=np.int64)
    for part in delta.changed_rows("b", 1, np.arange(5_000), weight, state, records=[]):
        delta.fold(delta.decode(delta.encode(part)), folded, states, seqs)
    assert torch.equal(folded, weight)
    assert torch.equal(states, state)
    assert (seqs == 1).all()


GOOD = delta.Delta(1, "b", 2, 1, b"\0" * 4, b"\0" * 4, b"\0" * 4, [], [])


def changed(**fields: Any) -> bytes:
    return delta.encode(msgspec.structs.replace(GOOD, **fields))


@given(st.binary())
def test_any_other_bytes_are_refused_as_no_event(data: bytes) -> None:
    for decode in (delta.decode, record.decode_item, record.decode_history):
        try:
            decode(data)
        except EventError:
            continue
        pytest.fail(f"{decode.__name__} took {data!r}")


@given(st.sampled_from([GOOD, *written(3, 2)]), st.integers(0, 2**16), st.integers(0, 255))
def test_a_damaged_delta_is_refused_or_is_another_delta_but_nothing_else_goes_wrong(
    one: delta.Delta, place: int, byte: int
) -> None:
    data = bytearray(delta.encode(one))
    data[place % len(data)] = byte
    try:
        found = delta.decode(bytes(data))
    except EventError:
        return
    assert found.vectors.shape == (len(found.row_numbers), found.dim)
    assert found.states.shape == (len(found.row_numbers),)


NOT_QUITE = {
    "nothing": b"",
    "an empty list": b"\x90",
    "cut off": delta.encode(GOOD)[:-1],
    "gone on": delta.encode(GOOD) + b"\0",
    "not UTF-8": delta.encode(GOOD).replace(b"\xa1b", b"\xa1\xff"),
    "a map": msgspec.msgpack.encode({"version": 1}),
    "three quarters of a row": changed(rows=b"\0" * 3),
    "more weights than rows": changed(weights=b"\0" * 8),
    "no state": changed(accumulators=b""),
    "no dimensions": changed(dim=0, rows=b"", weights=b"", accumulators=b""),
    "negative dimensions": changed(dim=-1, rows=b"", weights=b"", accumulators=b""),
    "the number of the snapshot": changed(seq=0),
    "a number that a table cannot hold": changed(seq=2**63),
}


@pytest.mark.parametrize("what", NOT_QUITE)
def test_bytes_that_are_not_quite_a_delta_are_refused(what: str) -> None:
    with pytest.raises(EventError, match="delta"):
        delta.decode(NOT_QUITE[what])


def test_a_delta_of_another_version_is_refused() -> None:
    with pytest.raises(EventError, match="version 3, this release reads 1 to 2"):
        delta.decode(changed(version=3))


ITEM_BYTES = record.encode(record.ItemRecord("e", b"", [], {"a": 1}))
HISTORY_BYTES = record.encode(record.HistoryRecord(["a"], [1]))


NOT_ITEMS = {
    "cut off": ITEM_BYTES[:-1],
    "not UTF-8": ITEM_BYTES.replace(b"\xa1e", b"\xa1\xff"),
    "lists too deep to read": ITEM_BYTES[:-1] + b"\x91" * 100_000 + b"\x01",
    "a history": HISTORY_BYTES,
}
NOT_HISTORIES = {
    "cut off": HISTORY_BYTES[:-1],
    "not UTF-8": HISTORY_BYTES.replace(b"\xa1a", b"\xa1\xff"),
    "an item": ITEM_BYTES,
}


@pytest.mark.parametrize("what", NOT_ITEMS)
def test_bytes_that_are_not_an_item_are_refused(what: str) -> None:
    with pytest.raises(EventError, match="item record"):
        record.decode_item(NOT_ITEMS[what])


@pytest.mark.parametrize("what", NOT_HISTORIES)
def test_bytes_that_are_not_a_history_are_refused(what: str) -> None:
    with pytest.raises(EventError, match="history record"):
        record.decode_history(NOT_HISTORIES[what])


@given(
    st.builds(
        record.ItemRecord,
        st.text(max_size=9),
        st.lists(FLOATS, max_size=6).map(lambda cells: np.array(cells, dtype="<f4").tobytes()),
        st.lists(st.integers(0, 2**16 - 1), max_size=4),
        st.dictionaries(st.text(max_size=4), st.none() | st.text() | st.floats(allow_nan=False) | st.lists(st.text())),
    )
)
def test_an_item_survives_its_bytes(item: record.ItemRecord) -> None:
    assert record.decode_item(record.encode(item)) == item
    assert record.decode_item(record.encode(item)).content().tobytes() == item.vector


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1)), max_size=5))
def test_a_history_survives_its_bytes(visits: list[tuple[str, int]]) -> None:
    history = record.HistoryRecord([item for item, _ in visits], [time for _, time in visits])
    assert record.decode_history(record.encode(history)) == history
