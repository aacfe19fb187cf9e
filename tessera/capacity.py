"""Bytes, network and processors for a shop of a given size, each with its formula and source. No simulation.

A line comes from the code (the layout of a row or a record is known) or from a benchmark. Constants of benchmarks are
those of one processor second on the machine in `docs/benchmarks.md`; other machines differ threefold.
Shape letters: R rows of the table, D dimensions of a row, W dimensions of an item's vector.
"""

from dataclasses import dataclass

import numpy as np

from features.errors import TesseraError
from models.bundle.record import HistoryRecord, encode
from models.encoder.advise import index_bytes
from serving.store.page import PAGE_ROWS, page_bytes
from serving.store.protocol import STORAGES, StoredTable

_ID_BYTES = 12
_KEY_BYTES = 100
_ACCUMULATOR_BYTES, _SEQ_BYTES = 4, 8
_DAY_S = 86_400
EVENTS_PER_CPU_S = {256: 14_000, 1_024: 24_000, 8_192: 30_000}
"""Events of a step for each processor second, by the events of the step."""
_ROWS_PER_EVENT = {256: 9.7, 1_024: 5.2, 8_192: 1.2}
_RECORD_BYTES = {256: 444, 1_024: 372, 8_192: 239}
_STORED_ROWS_PER_S = 447_000
_REQUESTS_PER_CPU_S = 75
_EXAMPLES_PER_CPU_S, _FRAME_US, _ENCODE_MS = 33_000, 9.1, 0.144


@dataclass(frozen=True)
class ShopSize:
    """Size of a shop and choices of its bundle.

    Attributes:
        items, users: Distinct ids.
        events_per_s: Events of the stream.
        requests_per_s: Rankings of 500 candidates.
        dim: D.
        vector_dim: W.
        rows: Rows of the table for each id. Admission and budgets lower it.
        storage: Format of the rows in the online store.
        index: Format of the rows of the search index, `float32` or `int8`.
        history: Visits that a user's record keeps.
        event_bytes: Bytes of an event's message.
        days: Days that the log keeps events and deltas.
        replicas: Copies of each message in the log.
        step: Events of a step.
    """

    items: int
    users: int
    events_per_s: float
    requests_per_s: float
    dim: int = 16
    vector_dim: int = 128
    rows: float = 1.0
    storage: str = "float16"
    index: str = "float32"
    history: int = 20
    event_bytes: int = 150
    days: float = 7.0
    replicas: int = 3
    step: int = 1_024


@dataclass(frozen=True)
class Need:
    """One line of an estimate.

    Attributes:
        part: What needs it.
        value: How much, in `unit`.
        unit: `bytes`, `bytes/s`, `processors` or `processor hours`.
        formula: How the value comes about, in numbers.
        source: The code or the benchmark that the constants are of.
    """

    part: str
    value: float
    unit: str
    formula: str
    source: str


def capacity(shop: ShopSize) -> list[Need]:
    """Returns what a shop needs, from memory over network to processors.

    Raises:
        TesseraError: A choice is unknown, or a size is not positive.
    """
    _check(shop)
    rows = round(shop.rows * (shop.items + shop.users))
    row = 4 * shop.dim
    return [*_memory(shop, rows, row), *_traffic(shop, row), *_processors(shop)]


def _memory(shop: ShopSize, rows: int, row: int) -> list[Need]:
    trained = row + _ACCUMULATOR_BYTES + _SEQ_BYTES
    stored = stored_row_bytes(shop.dim, shop.storage)
    record = history_bytes(shop.history)
    item = index_bytes(shop.vector_dim, shop.index) + 4 * shop.vector_dim + _KEY_BYTES
    return [
        Need("trainer: table", rows * trained, "bytes", f"{rows:,} rows x {trained}", "code: weight, accumulator, seq"),
        Need("store: rows", rows * stored, "bytes", f"{rows:,} rows x {stored:.1f} ({shop.storage})", "bench serving"),
        Need("store: histories", shop.users * record, "bytes", f"{shop.users:,} users x {record}", "code: a record"),
        Need("mirror: rows", rows * (row + _SEQ_BYTES), "bytes", f"{rows:,} rows x {row + 8}", "code: float32, seq"),
        Need(
            "server: items", shop.items * item, "bytes", f"{shop.items:,} items x {item} ({shop.index})", "code: index"
        ),
    ]


def _traffic(shop: ShopSize, row: int) -> list[Need]:
    delta = delta_bytes(shop.dim, shop.step)
    kept = shop.days * _DAY_S * shop.replicas
    arriving, leaving = shop.events_per_s * shop.event_bytes, shop.events_per_s * delta
    each = f"{shop.events_per_s:,.0f} events/s x"
    keeps = f"x {shop.days:g} days x {shop.replicas} copies"
    return [
        Need("log: events in", arriving, "bytes/s", f"{each} {shop.event_bytes}", "size of a message, assumed"),
        Need("log: deltas in", leaving, "bytes/s", f"{each} {delta:.0f}, steps of {shop.step:,}", "bench stream"),
        Need("log: disk", (arriving + leaving) * kept, "bytes", f"{arriving + leaving:,.0f} bytes/s {keeps}", "sum"),
    ]


def _processors(shop: ShopSize) -> list[Need]:
    speed, changed = EVENTS_PER_CPU_S[shop.step], _ROWS_PER_EVENT[shop.step]
    events = shop.events_per_s
    written, day = events * changed, events * _DAY_S
    found = [
        ("trainer", events / speed, f"{events:,.0f} events/s / {speed:,}", "bench stream"),
        (
            "store: writes",
            written / _STORED_ROWS_PER_S,
            f"{written:,.0f} rows/s / {_STORED_ROWS_PER_S:,}",
            "bench stream",
        ),
        (
            "servers",
            shop.requests_per_s / _REQUESTS_PER_CPU_S,
            f"{shop.requests_per_s:,.0f} requests/s of 500 / {_REQUESTS_PER_CPU_S}",
            "bench serving --part workers",
        ),
    ]
    hours = [
        ("frame of a day", day * _FRAME_US / 1e6, f"{day:,.0f} events x {_FRAME_US} µs", "10^7 events, once"),
        (
            "one epoch of a day",
            day / _EXAMPLES_PER_CPU_S,
            f"{day:,.0f} examples / {_EXAMPLES_PER_CPU_S:,}",
            "bench training-speed",
        ),
        (
            "encode all items",
            shop.items * _ENCODE_MS / 1e3,
            f"{shop.items:,} items x {_ENCODE_MS} ms (lsa)",
            "10^6 items, once",
        ),
    ]
    return [Need(part, value, "processors", formula, source) for part, value, formula, source in found] + [
        Need(part, seconds / 3_600, "processor hours", formula, source) for part, seconds, formula, source in hours
    ]


def shown(need: Need) -> str:
    """Returns the value of a need as people read it: `41.6 GB`, `1.2 MB/s`, `4.2 processors`."""
    if not need.unit.startswith("bytes"):
        value = f"{need.value:,.0f}" if need.value >= 100 else f"{need.value:.2g}"
        return f"{value} {need.unit}"
    size, names = need.value, ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1_000 and len(names) > 1:
        size /= 1_000
        names.pop(0)
    return f"{size:.3g} {names[0]}{need.unit.removeprefix('bytes')}"


def stored_row_bytes(dim: int, storage: str) -> float:
    """Returns the bytes of a row in Redis, all counted: a page in jemalloc's next larger size, and its key."""
    page = page_bytes(StoredTable(PAGE_ROWS, dim, storage))
    step = 2 ** max(4, int(np.ceil(np.log2(page))) - 3)
    return float(-(-page // step) * step + _KEY_BYTES) / PAGE_ROWS


def history_bytes(visits: int) -> int:
    """Returns the bytes of a full record of a user in Redis, with its key."""
    record = HistoryRecord(["i" * _ID_BYTES] * visits, [1_700_000_000] * visits)
    return len(encode(record)) + _KEY_BYTES


def delta_bytes(dim: int, step: int) -> float:
    """Returns the bytes of deltas that an event causes: its share of the changed rows, and of records."""
    return _ROWS_PER_EVENT[step] * (4 * dim + 4 + _ACCUMULATOR_BYTES) + _RECORD_BYTES[step]


def _check(shop: ShopSize) -> None:
    if shop.storage not in STORAGES:
        raise TesseraError(f"--storage {shop.storage!r}: choose one of {', '.join(STORAGES)}")
    if shop.index not in ("float32", "int8"):
        raise TesseraError(f"--index {shop.index!r}: choose float32 or int8")
    if shop.step not in EVENTS_PER_CPU_S:
        known = ", ".join(str(step) for step in EVENTS_PER_CPU_S)
        raise TesseraError(f"--step {shop.step}: was not measured; choose one of {known}")
