"""`training-speed --device`: the trainer's step on a GPU beside the way of CTR libraries, eagerly and as a graph.

Both have the same examples, which lie on the device, the same network and the same batches. The peer's table is
`nn.Embedding` over label-encoded values, with dense Adam. Each trains one epoch; test AUC stands in each row. The floor
is the bytes that a step of the table must move over the copy bandwidth that the run measures.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from features.device import CPU, Device, DeviceChoice, DeviceError, resolve
from features.frame import Frame
from models.ranker.loading import assembler, examples
from models.ranker.network import Network, Ranker
from models.ranker.resident_steps import ResidentSteps
from models.ranker.train import Precision, TrainConfig, dense_logits, new_ranker, predict, train
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.device.block import DeviceBlock, of_examples
from models.table.schema import Schema
from tessera.bench.device.end_to_end import end_to_end
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.bench.offline.ctr_data import TrainingSpec, generate, schema_of, star
from tessera.bench.offline.ctr_worker import TRAIN
from tessera.bench.peers.ctr import DIM, Arrays
from tessera.terminal import err_console

BATCHES = (1_024, 4_096, 16_384, 65_536)
OURS, PEER, WIDE_PEER = "unified table", "nn.Embedding + Adam", "nn.Embedding + Adam, 100,000 rows a feature"
PARTS = ("end-to-end", "sizes", "steps", "train")
_PLACES = ("disk", "page cache")
_TARGETS = {1_024: 2.0, 4_096: 1.8, 65_536: 1.5}
_SETTLE, _TIMED = 10, 50
_WAYS: tuple[tuple[Precision, bool], ...] = (("float32", True), ("float32", False), ("bfloat16", True))
_SCORE_ROWS = 50_000
# A step reads each row in the forward and in the backward pass, and writes its gradient and the row.
_PASSES = 4


class DeviceBench:
    """Examples on the device, and the rows that are measured on them."""

    def __init__(self, device: Device, rows: int, test_rows: int, seed: int) -> None:
        self.device = device
        self.training, self.test, _ = generate(TrainingSpec(rows=rows, test_rows=test_rows, seed=seed))
        self.frame = star(self.training, self.test)
        self.schema = replace(schema_of(self.frame), admission=0)
        self.blocks = {
            part: block_of(self.schema, self.frame.part(part), self.frame, device) for part in ("train", "test")
        }
        self.labels = self.test.labels
        self.bandwidth = bandwidth(device)
        self._codes: dict[bool, tuple[Tensor, int]] = {}

    def epoch(self, batch: int, advance: Callable[[NDArray[np.int64]], None]) -> float:
        """Trains one epoch of whole batches. Returns the seconds of a batch, without the first ones."""
        order = np.random.default_rng(1).permutation(self.blocks["train"].size)
        count = len(order) // batch
        settled = min(_SETTLE, count - 1)
        for number in range(settled):
            advance(order[number * batch : (number + 1) * batch])
        self.device.synchronize()
        began = time.perf_counter()
        for number in range(settled, count):
            advance(order[number * batch : (number + 1) * batch])
        self.device.synchronize()
        return (time.perf_counter() - began) / (count - settled)

    def auc(self, logits: Callable[[Batch, Tensor], Tensor]) -> float:
        """Returns the AUC of the test part."""
        block, found = self.blocks["test"], []
        with torch.no_grad():
            for start in range(0, block.size, _SCORE_ROWS):
                index = self.device.put(np.arange(start, min(start + _SCORE_ROWS, block.size)))
                found.append(logits(block.batch(index), index).float().cpu().numpy())
        return float(roc_auc_score(self.labels, np.concatenate(found)))

    def ours(self, batch: int, precision: Precision, *, graph: bool, faster: float = 1.0) -> dict[str, Any]:
        """Measures the unified table and the ranker's network; `faster` multiplies the table's learning rate."""
        self.device.reset_peak()
        config = replace(TRAIN, batch=batch, network_rate=rate_of(batch), table_rate=TRAIN.table_rate * faster)
        ranker = new_ranker(self.schema, config, self.device)
        steps = ResidentSteps(
            self.blocks["train"],
            step_of(ranker, config, precision, self.device),
            batch,
            self.device,
            hides=False,
            graph=graph,
        )
        seconds = self.epoch(batch, lambda rows: steps(rows, None))
        auc = self.auc(lambda one, index: ranker(one))
        row = self._row(OURS, batch, precision, graph, seconds, auc)
        return row if faster == 1.0 else row | {"model": f"{OURS}, rate x {faster:g}"}

    def peer(self, batch: int, precision: Precision, *, graph: bool, wide: bool = False) -> dict[str, Any]:
        """Measures `nn.Embedding` with dense Adam under the same network."""
        self.device.reset_peak()
        values, rows = self._encoded(wide)
        table = nn.Embedding(rows, DIM, device=self.device.torch)
        nn.init.normal_(table.weight, 0, 0.01)
        features = values.shape[1]
        network = Network(features * DIM + len(self.schema.numeric), TRAIN.network).to(self.device.torch)
        numeric, labels = self.blocks["train"].inputs
        at_test = len(self.training.labels)
        optimizers = [adam(own, rate, self.device) for own, rate in ((network, rate_of(batch)), (table, 3e-3))]
        index = torch.zeros(batch, dtype=torch.int64, device=self.device.torch)

        def logits(given: Tensor, at: Tensor) -> Tensor:
            with torch.autocast(self.device.name, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
                found: Tensor = network(table(values[at]).flatten(1), given)
            return found.float()

        def step() -> None:
            loss = functional.binary_cross_entropy_with_logits(logits(numeric[index], index), labels[index])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

        go = (self.device if graph else CPU).captured(step)

        def advance(rows: NDArray[np.int64]) -> None:
            index.copy_(self.device.put(rows), non_blocking=True)
            go()

        seconds = self.epoch(batch, advance)
        auc = self.auc(lambda one, at: logits(one.numeric, at + at_test))
        return self._row(WIDE_PEER if wide else PEER, batch, precision, graph, seconds, auc)

    def _encoded(self, wide: bool) -> tuple[Tensor, int]:
        """Returns the label-encoded values on the device, made once for all peers, and their number of rows."""
        if wide not in self._codes:
            codes, rows = label_encoded(self.training, self.test, wide=wide)
            self._codes[wide] = self.device.put(codes), rows
        return self._codes[wide]

    def _row(
        self, model: str, batch: int, precision: Precision, graph: bool, seconds: float, auc: float
    ) -> dict[str, Any]:
        moved = batch * len(self.schema.features) * self.schema.dim * 4 * _PASSES
        return {
            "model": model,
            "batch": batch,
            "precision": precision,
            "graph": graph,
            "samples_per_second": batch / seconds,
            "test_auc": auc,
            "peak_bytes": self.device.peak_bytes(),
            "floor_share": moved / self.bandwidth / seconds,
        }


def block_of(schema: Schema, part: pl.DataFrame, frame: Frame, device: Device) -> DeviceBlock:
    """Returns the examples of a part on the device."""
    return of_examples(assembler(schema, frame, part, Admission.off()), examples(part), device)


def rate_of(batch: int) -> float:
    """Returns the network's learning rate, which grows with the root of the batch."""
    return float(3e-3 * (batch / 4_096) ** 0.5)


def adam(module: nn.Module, rate: float, device: Device) -> torch.optim.Adam:
    """Returns Adam that a graph may capture."""
    return torch.optim.Adam(module.parameters(), lr=rate, fused=True, capturable=not device.is_cpu)


def step_of(ranker: Ranker, config: TrainConfig, precision: Precision, device: Device) -> Callable[[Batch], None]:
    """Returns the trainer's step on one batch."""
    optimizer = adam(ranker.network, config.network_rate, device)

    def step(batch: Batch) -> None:
        logits = dense_logits(ranker, ranker.table(batch), batch, precision)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ranker.table.step()

    return step


def label_encoded(training: Arrays, test: Arrays, *, wide: bool) -> tuple[NDArray[np.int64], int]:
    """Returns the values (E, F) of both parts as rows of one table, and its number of rows.

    A value that the training part lacks reads the first row of its feature. `wide` gives each feature as many rows as
    its largest value, as libraries do that are given a vocabulary's size.
    """
    columns, start = [], 0
    for own, held_out in zip(training.values.T, test.values.T, strict=True):
        known = np.arange(100_000) if wide else np.unique(own)
        both = np.concatenate([own, held_out])
        place = np.searchsorted(known, both).clip(max=len(known) - 1)
        columns.append(start + np.where(known[place] == both, place, 0))
        start += len(known)
    return np.stack(columns, axis=1).astype(np.int64), start


def bandwidth(device: Device) -> float:
    """Returns the bytes a second that a large copy on the device reads and writes."""
    source = torch.zeros(1 << (28 if not device.is_cpu else 22), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        device.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * len(source) / min(times)


def of_both_devices(bench: DeviceBench, rows: int) -> dict[str, Any]:
    """Trains the same rows by `train` on the processor and on the device; returns both AUCs."""
    kept = bench.frame.replace(
        examples=pl.concat(
            [bench.frame.part("train").head(rows), bench.frame.part("validation"), bench.frame.part("test")]
        )
    )
    found: dict[str, Any] = {"model": "train(), same rows", "rows": rows}
    for name in ("cpu", bench.device.name):
        config = replace(TRAIN, device=name, threads=8 if bench.device.name == "cuda" else TRAIN.threads)
        began = time.perf_counter()
        trained = train(bench.schema, kept, config)
        found[f"seconds_{name}"] = time.perf_counter() - began
        part = kept.part("test")
        scores = predict(trained.ranker, assembler(bench.schema, kept, part, Admission.off()), examples(part))
        found[f"auc_{name}"] = float(roc_auc_score(bench.labels, scores))
    return found


def _end_to_end(bench: DeviceBench, out: Path, batch: int) -> list[dict[str, Any]]:
    config = replace(TRAIN, batch=batch, network_rate=rate_of(batch))
    rows = max(1 << 18, batch) if batch > 8_192 else 4 * batch
    return end_to_end(bench.frame, bench.schema, bench.device, out, config, step_of, block_rows=rows)


def table_sizes(bench: DeviceBench, sizes: tuple[int, ...], batch: int) -> list[dict[str, Any]]:
    """Measures a step by the number of the table's rows, in float16 on a GPU."""
    found = []
    part = bench.frame.part("train").head(max(batch * 8, 500_000))
    for rows in sizes:
        schema = replace(bench.schema, rows=rows)
        block = block_of(schema, part, bench.frame, bench.device)
        config = replace(TRAIN, batch=batch, row_precision="float32" if bench.device.is_cpu else "float16")
        ranker = new_ranker(schema, config, bench.device)
        steps = ResidentSteps(
            block, step_of(ranker, config, "bfloat16", bench.device), batch, bench.device, hides=False
        )
        rng = np.random.default_rng(2)
        for number in range(_SETTLE + _TIMED):
            if number == _SETTLE:
                bench.device.synchronize()
                began = time.perf_counter()
            steps(rng.integers(0, block.size, batch), None)
        bench.device.synchronize()
        speed = _TIMED * batch / (time.perf_counter() - began)
        row = {"model": "table size", "table_rows": rows, "batch": batch, "samples_per_second": speed}
        found.append(row | {"peak_bytes": bench.device.peak_bytes()})
        del ranker, steps, block
        bench.device.reset_peak()
    return found


def training_device(
    out: Path,
    choice: DeviceChoice,
    *,
    seeds: int,
    console: Console,
    rows: int = 3_000_000,
    batches: tuple[int, ...] = BATCHES,
    sizes: tuple[int, ...] = (10**6, 10**9),
    parts: Sequence[str] = PARTS,
) -> BenchResult:
    """Measures everything on one device; a part that fails is a row that says so.

    Args:
        out: Directory of the frame's file.
        choice: Device.
        seeds: Number of seeds of the data.
        console: Shows each row.
        rows: Training rows.
        batches: Examples of a batch.
        sizes: Rows of the tables that are compared.
        parts: Parts to measure, of `PARTS`.
    """
    device = resolve(choice)
    out.mkdir(parents=True, exist_ok=True)
    kept = measured_rows()
    card = device.about.get("card", "cpu")

    def add(seed: int, what: str, make: Callable[[], Any]) -> None:
        try:
            made = make()
        except (RuntimeError, ValueError, DeviceError) as error:
            made = {"model": what, "missing": f"{type(error).__name__}: {str(error)[:300]}"}
        for row in made if isinstance(made, list) else [made]:
            kept.append({**row, "seed": seed, "card": card})
            console.print(f"training-speed: {kept[-1]}")

    for seed in range(seeds):
        bench = DeviceBench(device, rows, min(200_000, rows // 2), seed)
        steps = [
            (model, partial(measure, batch, precision, graph=graph))
            for batch in batches
            for precision, graph in _WAYS
            for model, measure in ((OURS, bench.ours), (PEER, bench.peer))
        ]
        # A large batch has few steps: is the rate of the table what its AUC lacks?
        steps += [(OURS, partial(bench.ours, batches[-1], "float32", graph=True, faster=one)) for one in (2.0, 4.0)]
        wide = partial(bench.peer, batches[min(1, len(batches) - 1)], "float32", graph=True, wide=True)
        of_part: dict[str, list[tuple[str, Callable[[], Any]]]] = {
            "end-to-end": [("end to end", partial(_end_to_end, bench, out, batches[-1]))],
            "sizes": [("table size", partial(table_sizes, bench, sizes, batches[-1]))],
            "steps": [*steps, (WIDE_PEER, wide)],
            "train": [("train(), same rows", partial(of_both_devices, bench, min(rows, 300_000)))],
        }
        for part in parts:
            for what, make in of_part[part]:
                add(seed, what, make)
    return BenchResult("training-speed", f"synthetic-zipf-{rows}", seeds, list(kept), claims(list(kept)))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, each a ratio within the run, judged in the seed with the worst result."""
    whole = [row for row in rows if "missing" not in row]
    found = []
    for batch, target in _TARGETS.items():
        speed = {
            (row["model"], row["seed"]): row["samples_per_second"]
            for row in whole
            if (row.get("batch"), row.get("precision"), row.get("graph")) == (batch, "float32", True)
        }
        ratios = [value / speed[PEER, seed] for (model, seed), value in speed.items() if (model, seed) == (OURS, seed)]
        if ratios:
            found.append(at_least(f"samples/s over {PEER}, both in a graph, batch {batch:,}", min(ratios), target))
    if less := [row["auc_cuda"] - row["auc_cpu"] for row in whole if "auc_cuda" in row]:
        found.append(at_least("test AUC less the processor's, same rows", min(less), -0.001))
    shares = {place: [row["of_the_slower"] for row in whole if row.get("from") == place] for place in _PLACES}
    found += [
        at_least(f"end to end from the {place} over the slower of step and copy", min(own), 0.7)
        for place, own in shares.items()
        if own
    ]
    sizes = [row["samples_per_second"] for row in whole if "table_rows" in row]
    if sizes:
        of_large = min(large / small for small, large in zip(sizes[::2], sizes[1::2], strict=True))
        found.append(at_least("samples/s of 10^9 rows over those of 10^6", of_large, 0.9))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures training on a device, without the command line's packages.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    given = parser.parse_args()
    small: dict[str, Any] = {"batches": (256, 1_024), "sizes": (1_000, 100_000)} if given.small else {}
    result = training_device(
        given.out, given.device, seeds=1, console=err_console, rows=given.rows, parts=given.parts, **small
    )
    (given.out / "training-device.json").write_text(json.dumps(asdict(result)))
    for claim in result.claims:
        print(json.dumps(asdict(claim)))
