"""`semantic-ids --device`: codebooks on a GPU beside the same machine's processor: seconds, error, different codes."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from features.device import CPU, Device, DeviceChoice, resolve
from models.semantic_id.codebook import residual_kmeans, rqvae_fit
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
from models.semantic_id.codebook.rqvae import RqVaeConfig
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.terminal import err_console

DIM, TOPICS = 384, 2_000


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Returns (count, DIM) float32 unit vectors around topics of topics, as texts of a catalogue are."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((50, DIM), dtype=np.float32)
    fine = coarse[rng.integers(0, 50, TOPICS)] + 0.7 * rng.standard_normal((TOPICS, DIM), dtype=np.float32)
    found = fine[rng.integers(0, TOPICS, count)] + 0.6 * rng.standard_normal((count, DIM), dtype=np.float32)
    unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def codebook_device(
    choice: DeviceChoice,
    *,
    seeds: int,
    console: Console,
    fitted: int = 50_000,
    coded: int = 1_000_000,
    steps: int = 1_500,
) -> BenchResult:
    """Fits on `fitted` vectors and codes `coded` others, on the processor and on the device.

    Args:
        choice: Device.
        seeds: Number of seeds of the vectors.
        console: Shows each row.
        fitted, coded: Numbers of vectors.
        steps: Steps of the training.
    """
    device = resolve(choice, fused=False)
    rows = measured_rows()
    for seed in range(seeds):
        for row in _of_seed(device, seed, RqVaeConfig(steps=steps, codes=min(256, fitted // 8)), fitted, coded):
            rows.append({**row, "seed": seed, "card": device.about.get("card", "cpu")})
            console.print(f"semantic-ids: {rows[-1]}")
    return BenchResult("semantic-ids", f"synthetic-{coded}", seeds, list(rows), claims(list(rows)))


def _of_seed(device: Device, seed: int, config: RqVaeConfig, fitted: int, coded: int) -> Iterator[dict[str, Any]]:
    train, test = vectors(fitted, 2 * seed), vectors(coded, 2 * seed + 1)
    codes: dict[str, NDArray[np.uint16]] = {}
    books = {}
    for name, one in (("cpu", CPU), (device.name, device)):
        if not one.is_cpu:
            # The first use of a card loads its libraries, once for a process.
            rqvae_fit.fit(train[:4_096], RqVaeConfig(steps=60, codes=32), device=one)
        began = time.perf_counter()
        books[name] = rqvae_fit.fit(train, config, device=one)
        seconds = time.perf_counter() - began
        sample = test[:20_000]
        error = float(((sample - books[name].decode(books[name].encode(sample))) ** 2).sum(axis=1).mean())
        yield {"part": "fit", "device": name, "seconds": seconds, "squared_error": error}
    again = rqvae_fit.fit(train, config, device=device)
    yield {"part": "fit again", "device": device.name, "same_bits": again.id == books[device.name].id}
    # One codebook, coded by both devices.
    book = books["cpu"]
    for name, one in (("cpu", CPU), (device.name, device)):
        book.device = one
        book.encode(test[:200_000])
        began = time.perf_counter()
        codes[name] = book.encode(test)
        speed = coded / (time.perf_counter() - began)
        yield {"part": "encode", "device": name, "items_per_second": speed, "threads": torch.get_num_threads()}
    different = int((codes["cpu"] != codes[device.name]).any(axis=1).sum())
    yield {"part": "codes", "device": device.name, "items": coded, "different": different}
    yield from _k_means(device, seed, config.codes, train, test)


def _k_means(
    device: Device, seed: int, count: int, train: NDArray[np.float32], test: NDArray[np.float32]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of residual k-means: its fit on both devices, and one codebook that both code by."""
    config = ResidualKMeansConfig(codes=count, seed=seed)
    codes = {}
    book = residual_kmeans.fit(train[: 4 * count], config, device=device)
    for name, one in (("cpu", CPU), (device.name, device)):
        if one.is_cpu and find_spec("faiss") is None:
            continue
        began = time.perf_counter()
        book = residual_kmeans.fit(train, config, device=one)
        seconds = time.perf_counter() - began
        sample = test[:20_000]
        error = float(((sample - book.decode(book.encode(sample))) ** 2).sum(axis=1).mean())
        yield {"part": "k-means fit", "device": name, "seconds": seconds, "squared_error": error}
    for name, one in (("cpu", CPU), (device.name, device)):
        book.device = one
        book.encode(test[:200_000])
        began = time.perf_counter()
        codes[name] = book.encode(test)
        yield {
            "part": "k-means encode",
            "device": name,
            "items_per_second": len(test) / (time.perf_counter() - began),
            "different": int((codes["cpu"] != codes[name]).any(axis=1).sum()),
        }


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, each a ratio of the same machine, judged in the seed with the worst result."""
    fits = [row for row in rows if row["part"] == "fit"]
    speeds = [row["items_per_second"] for row in rows if row["part"] == "encode"]
    different = max(row["different"] for row in rows if "different" in row)
    means = [row["squared_error"] for row in rows if row["part"] == "k-means fit"]
    again = min(row["same_bits"] for row in rows if row["part"] == "fit again")
    pairs = list(zip(fits[::2], fits[1::2], strict=True))
    of_means = at_most(
        "k-means: the device's error over the processor's",
        max((b / a for a, b in zip(means[::2], means[1::2], strict=False)), default=0.0),
        1.01,
    )
    return [
        at_least(
            "fit: the processor's seconds over the device's", min(a["seconds"] / b["seconds"] for a, b in pairs), 20
        ),
        at_most(
            "fit: the device's error over the processor's",
            max(b["squared_error"] / a["squared_error"] for a, b in pairs),
            1.01,
        ),
        at_least("fit twice on the device: equal bits", float(again), 1),
        at_least(
            "encode: the device's items a second over the processor's",
            min(b / a for a, b in zip(speeds[::2], speeds[1::2], strict=True)),
            8,
        ),
        at_most("items whose codes differ from the processor's", different, 0),
        *([of_means] if len(means) > len(fits) // 2 else []),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Measures the codebook on a device, without the command line's packages."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--fitted", type=int, default=50_000)
    parser.add_argument("--coded", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1_500)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result = codebook_device(
        given.device,
        seeds=1,
        console=err_console,
        fitted=given.fitted,
        coded=given.coded,
        steps=given.steps,
    )
    (given.out / "semantic-ids-device.json").write_text(json.dumps(asdict(result)))
    for claim in result.claims:
        print(json.dumps(asdict(claim)))
