"""`semantic-ids --device`: RQ-VAE on a GPU beside the same machine's processor: seconds, error and different codes."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.device import CPU, DeviceChoice, resolve
from models.semantic_id.codebook import rqvae
from models.semantic_id.codebook.rqvae import RqVaeConfig
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most

DIM, TOPICS = 384, 2_000


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Returns (count, DIM) float32 unit vectors around topics of topics, as texts of a catalogue are."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((50, DIM), dtype=np.float32)
    fine = coarse[rng.integers(0, 50, TOPICS)] + 0.7 * rng.standard_normal((TOPICS, DIM), dtype=np.float32)
    found = fine[rng.integers(0, TOPICS, count)] + 0.6 * rng.standard_normal((count, DIM), dtype=np.float32)
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def codebook_device(out: Path, choice: DeviceChoice, *, fitted: int, coded: int, steps: int = 1_500) -> BenchResult:
    """Fits on `fitted` vectors and codes `coded` others, on the processor and on the device."""
    device = resolve(choice, fused=False)
    out.mkdir(parents=True, exist_ok=True)
    train, test = vectors(fitted), vectors(coded, seed=1)
    config = RqVaeConfig(steps=steps, codes=min(256, fitted // 8))
    rows: list[dict[str, Any]] = []
    codes: dict[str, NDArray[np.uint16]] = {}
    books = {}
    for name, one in (("cpu", CPU), (device.name, device)):
        if name != "cpu":
            # The first use of a card loads its libraries, once for a process.
            rqvae.fit(train[:4_096], RqVaeConfig(steps=60, codes=32), device=one)
        began = time.perf_counter()
        book = rqvae.fit(train, config, device=one)
        books[name] = book
        seconds = time.perf_counter() - began
        sample = test[:20_000]
        error = float(((sample - book.decode(book.encode(sample))) ** 2).sum(axis=1).mean())
        rows.append({"part": "fit", "device": name, "seconds": seconds, "squared_error": error, "id": book.id})
        print(json.dumps(rows[-1]), flush=True)
    again = rqvae.fit(train, config, device=device)
    rows.append({"part": "fit again", "device": device.name, "same_bits": again.id == books[device.name].id})
    # One codebook, coded by both devices.
    book = books["cpu"]
    threads = torch.get_num_threads()
    for name, one in (("cpu", CPU), (device.name, device)):
        book.device = one
        book.encode(test[:200_000])
        began = time.perf_counter()
        codes[name] = book.encode(test)
        seconds = time.perf_counter() - began
        rows.append({"part": "encode", "device": name, "items_per_second": coded / seconds, "threads": threads})
        print(json.dumps(rows[-1]), flush=True)
    different = int((codes["cpu"] != codes[device.name]).any(axis=1).sum())
    rows.append({"part": "codes", "device": device.name, "items": coded, "different": different})
    for row in rows:
        row["card"] = dict(device.about).get("card", "cpu")
    return BenchResult("semantic-ids-device", f"synthetic-{coded}", 1, rows, claims(rows))


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, each a ratio of the same machine."""
    fit = [row for row in rows if row["part"] == "fit"]
    speed = [row["items_per_second"] for row in rows if row["part"] == "encode"]
    different = next(row["different"] for row in rows if row["part"] == "codes")
    again = next(row["same_bits"] for row in rows if row["part"] == "fit again")
    return [
        at_least("fit: the processor's seconds over the device's", fit[0]["seconds"] / fit[1]["seconds"], 20),
        at_most(
            "fit: the device's error over the processor's", fit[1]["squared_error"] / fit[0]["squared_error"], 1.01
        ),
        at_least("fit twice on the device: equal bits", float(again), 1),
        at_least("encode: the device's items a second over the processor's", speed[1] / speed[0], 8),
        at_most("items whose codes differ from the processor's", different, 0),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Measures the codebook on a device, without the command line's packages."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--fitted", type=int, default=100_000)
    parser.add_argument("--coded", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1_500)
    given = parser.parse_args()
    result = codebook_device(given.out, given.device, fitted=given.fitted, coded=given.coded, steps=given.steps)
    (given.out / "semantic-ids-device.json").write_text(json.dumps(asdict(result)))
    for claim in result.claims:
        print(json.dumps(asdict(claim)))
