"""The estimate of a shop's needs: exact where the layout is known, and printed as the page has it."""

from dataclasses import replace
from pathlib import Path

import pytest

from features.errors import TesseraError
from models.bundle.record import HistoryRecord, encode
from tessera.capacity import Need, ShopSize, capacity, history_bytes, shown, stored_row_bytes

PAGE = Path(__file__).parents[3] / "docs/operate/capacity.md"
SIZES = [(10**power, 10.0 ** (power - 3)) for power in (6, 7, 8, 9)]


def needs(shop: ShopSize) -> dict[str, Need]:
    return {need.part: need for need in capacity(shop)}


def test_the_page_has_the_lines_that_the_command_prints() -> None:
    found = [needs(ShopSize(size, size, rate, rate / 10)) for size, rate in SIZES]
    head = ["items and users, each", *(f"10^{len(str(size)) - 1}" for size, _ in SIZES)]
    rates = ["events / rankings a second", *(f"{rate:,.0f} / {rate / 10:,.0f}" for _, rate in SIZES)]
    lines = [rates, *([part, *(shown(one[part]) for one in found)] for part in found[0])]
    table = ["| " + " | ".join(line) + " |" for line in [head, ["--"] * len(head), *lines]]
    assert "\n".join(table).replace("| -- |", "|--|").replace(" -- |", "--|") in PAGE.read_text()


@pytest.mark.parametrize(("storage", "measured"), [("float32", 81), ("float16", 41.6), ("int8", 29.6)])
def test_a_row_takes_the_bytes_that_redis_was_seen_to_take(storage: str, measured: float) -> None:
    assert stored_row_bytes(16, storage) == pytest.approx(measured, rel=0.01)


def test_a_full_record_is_the_record_that_the_stream_writes() -> None:
    record = HistoryRecord(["i" * 12] * 20, [1_700_000_000] * 20)
    assert history_bytes(20) - history_bytes(0) == len(encode(record)) - len(encode(HistoryRecord([], [])))


def test_needs_grow_with_what_causes_them() -> None:
    shop = ShopSize(10**6, 10**6, 1_000, 100)
    before = needs(shop)
    for change, parts in [
        (replace(shop, items=2 * 10**6), {"server: items": 2, "trainer: table": 1.5, "store: histories": 1}),
        (replace(shop, users=2 * 10**6), {"store: histories": 2, "store: rows": 1.5, "server: items": 1}),
        (replace(shop, rows=0.1), {"trainer: table": 0.1, "mirror: rows": 0.1, "store: histories": 1}),
        (replace(shop, events_per_s=3_000), {"log: deltas in": 3, "trainer": 3, "servers": 1, "log: disk": 3}),
        (replace(shop, requests_per_s=300), {"servers": 3, "trainer": 1}),
        (replace(shop, days=14), {"log: disk": 2, "log: deltas in": 1}),
    ]:
        after = needs(change)
        assert {part: after[part].value / before[part].value for part in parts} == pytest.approx(parts)
    assert needs(replace(shop, step=8_192))["log: deltas in"].value < before["log: deltas in"].value / 1.5
    assert needs(replace(shop, index="int8"))["server: items"].value < before["server: items"].value


def test_choices_that_were_not_measured_are_refused() -> None:
    shop = ShopSize(10, 10, 1, 1)
    for change, message in [
        (replace(shop, step=100), "choose one of 256, 1024, 8192"),
        (replace(shop, storage="float8"), "choose one of float32, float16, int8"),
        (replace(shop, index="int4"), "choose float32 or int8"),
    ]:
        with pytest.raises(TesseraError, match=message):
            capacity(change)


def test_values_are_read_in_their_unit() -> None:
    assert shown(Need("", 41.6e9, "bytes", "", "")) == "41.6 GB"
    assert shown(Need("", 999, "bytes/s", "", "")) == "999 B/s"
    assert shown(Need("", 1_250, "processors", "", "")) == "1,250 processors"
    assert shown(Need("", 2.184, "processor hours", "", "")) == "2.2 processor hours"
