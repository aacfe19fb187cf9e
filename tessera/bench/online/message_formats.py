"""Measures messages of one set of rows in every format: the speed of decoding, and the table that the step trains.

The formats take turns chunk by chunk in one process. CPU seconds of one thread are counted, so that other work of the
machine does not decide a ratio. Decoding ends in the inbox of the step. Shaping ends in the frame of its events.
"""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.message import event_rows
from features.wire.arrow import encode_batch
from features.wire.decoder import event_decoder
from features.wire.registry import RegisteredSchema, SchemaRegistry
from features.wire.schemas import Schemas, framed, inferred_schema, open_schema
from models.bundle.bundle import Bundle
from streaming.inbox import Inbox
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S, live_data
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.terminal import one_thread

ROWS, CHUNK, ROUNDS = 100_000, 1_000, 3
_FORMATS = ("json", "avro", "protobuf", "arrow")
_LEAST = 2.0


@dataclass(frozen=True)
class _KnownSchemas(SchemaRegistry):
    """Schemas by id, without a server."""

    known: dict[int, RegisteredSchema] = field(default_factory=dict)

    def schema(self, number: int) -> RegisteredSchema | None:
        return self.known.get(number)


@dataclass(frozen=True)
class SentRows:
    """The same rows in every format.

    Attributes:
        messages: Chunks of messages by format. A chunk of Arrow is one message.
        schemas: Schemas of Avro and Protobuf.
    """

    messages: dict[str, list[list[Message]]]
    schemas: Schemas


def sent_rows(lines: list[bytes], *, rows: int, chunk: int) -> SentRows:
    """Returns rows in every format.

    Args:
        lines: Events as JSON objects, which repeat up to the number of rows.
        rows: Number of rows.
        chunk: Rows of a chunk, and of an Arrow batch.
    """
    objects = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines[:rows]]
    registry = _KnownSchemas("http://nowhere")
    messages: dict[str, list[list[Message]]] = {}
    now = time.time_ns() // 1_000_000
    for number, kind in enumerate(_FORMATS):
        if kind == "json":
            single = lines[:rows]
        elif kind != "arrow":
            registry.known[number] = schema = inferred_schema(kind.upper(), objects)
            opened = open_schema(schema)
            single = [framed(number, schema, opened.encode(row)) for row in objects]
        messages[kind] = []
        for start in range(0, rows, chunk):
            index = [place % len(objects) for place in range(start, min(start + chunk, rows))]
            values = [encode_batch([objects[i] for i in index])] if kind == "arrow" else [single[i] for i in index]
            # An event is appended at one place of the log in every format.
            offsets = range(start, start + len(values))
            messages[kind].append(
                [Message("events", 0, at, None, value, now) for at, value in zip(offsets, values, strict=True)]
            )
    return SentRows(messages, Schemas(registry))


def measure(bundle: Bundle, sent: SentRows, *, seed: int, round_: int) -> list[dict[str, Any]]:
    """Returns a row for each format: CPU seconds to decode, and to decode and shape, and the ratio to JSON's."""
    events = bundle.dataset.events
    decoders = {kind: event_decoder(events, sent.schemas) for kind in sent.messages}
    decoding, shaping = dict.fromkeys(_FORMATS, 0.0), dict.fromkeys(_FORMATS, 0.0)
    rows, total = 0, sum(map(len, sent.messages["json"]))
    for number in range(len(sent.messages["json"])):
        for kind in _FORMATS:
            decode, began = decoders[kind], time.process_time()
            inbox = Inbox(by_column=True)
            for message in sent.messages[kind][number]:
                inbox.add(message, decode.read(message.value))
            taken = inbox.rows(decode.columns)
            decoded = time.process_time()
            event_rows(taken, events, version=bundle.canonical)
            shaped = time.process_time()
            if number:
                decoding[kind] += decoded - began
                shaping[kind] += shaped - began
        rows += len(sent.messages["json"][number]) * (number > 0)
    return [
        {
            "part": "decode",
            "seed": seed,
            "round": round_,
            "format": kind,
            "rows_per_cpu_s": rows / decoding[kind],
            "json_over_own": decoding["json"] / decoding[kind],
            "shaped_rows_per_cpu_s": rows / shaping[kind],
            "shaped_json_over_own": shaping["json"] / shaping[kind],
            "bytes_per_row": sum(len(m.value) for part in sent.messages[kind] for m in part) / total,
        }
        for kind in _FORMATS
    ]


def trained(bundle: Bundle, sent: SentRows, *, seed: int) -> list[dict[str, Any]]:
    """Returns a row for each format: the sha256 of the table that the step trains, and the number of events."""
    found = []
    for kind in _FORMATS:
        step = Step(bundle, Topics(), lateness_s=NEVER_LATE_S, schemas=sent.schemas)
        applied = [step.apply(chunk) for chunk in sent.messages[kind]]
        table = step.ranker.table
        sha = hashlib.sha256(table.weight.numpy().tobytes() + table.accumulator.numpy().tobytes()).hexdigest()
        count = sum(outcome.events for outcome in applied)
        bad = sum(outcome.rejected for outcome in applied)
        found.append({"part": "table", "seed": seed, "format": kind, "events": count, "rejected": bad, "sha256": sha})
    return found


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, judged by the median round."""
    ratios = [row["json_over_own"] for row in rows if row["part"] == "decode" and row["format"] == "arrow"]
    tables = {row["seed"]: set[str]() for row in rows if row["part"] == "table"}
    for row in rows:
        if row["part"] == "table":
            tables[row["seed"]].add(row["sha256"])
    same = sum(len(found) == 1 for found in tables.values())
    return [
        at_least("Arrow decodes, times as fast as JSON", float(np.median(ratios)), _LEAST),
        at_least("seeds with one table in all formats", same, len(tables)),
    ]


def formats(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    rows: int = ROWS,
    chunk: int = CHUNK,
) -> BenchResult:
    """Measures messages in every format. A seed chooses the first event."""
    one_thread()
    data = live_data(dataset, out, console)
    found = measured_rows()
    for seed in range(seeds):
        start = seed * len(data.messages) // (seeds + 1)
        lines = data.messages[start:] + data.messages[:start]
        sent = sent_rows(lines, rows=rows, chunk=chunk)
        for round_ in range(ROUNDS):
            found += measure(data.bundle, sent, seed=seed, round_=round_)
        found += trained(data.bundle, sent, seed=seed)
    return BenchResult("formats", dataset.name, seeds, found, claims(found))
