"""Trains one epoch of a peer's DCN-V2 on `training-speed`'s arrays, in the peers' environment without Tessera.

    python ctr.py --peer deepctr|rechub DATA RESULT --rows N --seed S

The network is Tessera's: one low-rank cross layer beside an MLP. Both libraries have it as a mixture of experts, here
of one. Values are label-encoded, so that their tables have the rows there are.
What measures here measures Tessera's worker too, so that the figures mean the same.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

DIM, HIDDEN, BATCH, THREADS = 16, (256, 128), 4_096, 2
CROSS_LAYERS, CROSS_RANK = 1, 16
# Of 1e-3 (both libraries' default), 3e-3 and 1e-2 the one with DeepCTR-Torch's best AUC after an epoch of 400,000 rows.
RATE = 3e-3


@dataclass(frozen=True)
class Clock:
    """Seconds of wall time, of the processor, and, if known, until the first batch was done."""

    seconds: float
    cpu_seconds: float
    setup_seconds: float | None = None


@dataclass(frozen=True)
class PeerRun:
    """Training of one model.

    Attributes:
        rows: examples trained on, once each.
        seconds: of the training alone, its loader included, evaluation and imports not.
        cpu_seconds: processor time of all threads meanwhile; on a busy machine steadier than `seconds`.
        setup_seconds: the share of `seconds` until the first batch was done, where the model tells.
        peak_gb: most memory that was resident from the start of the training on (VmHWM), 1e9 bytes.
        fit_gb: the peak less what was resident when the training began, the data in memory by then.
        test_auc: on all test rows.
        precision: of the dense part's products.
    """

    rows: int
    seconds: float
    cpu_seconds: float
    setup_seconds: float | None
    peak_gb: float
    fit_gb: float
    test_auc: float
    precision: str = "float32"


def save(directory: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Writes each array as NAME.npy, which `numpy.load` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        kept = np.lib.format.open_memmap(directory / f"{name}.npy", "w+", array.dtype, array.shape)
        kept[...] = array
        kept.flush()


@dataclass(frozen=True)
class Arrays:
    """Part of the data: values (N, F) int32, numeric (N, n) float32, labels (N,) float32."""

    values: NDArray[np.int32]
    numeric: NDArray[np.float32]
    labels: NDArray[np.float32]

    @staticmethod
    def load(directory: Path, rows: int | None = None) -> "Arrays":
        """Reads the first `rows` rows, all by default."""
        return Arrays(*(np.load(directory / f"{name}.npy")[:rows] for name in ("values", "numeric", "labels")))

    def save(self, directory: Path) -> None:
        """Writes what `load` reads."""
        save(directory, {name: getattr(self, name) for name in ("values", "numeric", "labels")})

    def head(self, rows: int) -> "Arrays":
        """Returns the first `rows` rows."""
        return Arrays(self.values[:rows], self.numeric[:rows], self.labels[:rows])

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """Returns one array a feature, as peers take them: `C0`, … int64 and `I0`, … float32."""
        named: dict[str, NDArray[np.generic]] = {
            f"C{number}": column.astype(np.int64) for number, column in enumerate(self.values.T)
        }
        return named | {f"I{number}": np.ascontiguousarray(column) for number, column in enumerate(self.numeric.T)}


def label_encoded(train: Arrays, test: Arrays) -> tuple[Arrays, Arrays, list[int]]:
    """Numbers each feature's values by those of the training part, from 1; 0 is a value that it lacks.

    Returns:
        Both parts, and the rows (F,) that a table of each feature needs.
    """
    known = [np.unique(column) for column in train.values.T]

    def encode(part: Arrays) -> Arrays:
        columns = []
        for values, column in zip(known, part.values.T, strict=True):
            index = np.minimum(np.searchsorted(values, column), len(values) - 1)
            columns.append(np.where(values[index] == column, index + 1, 0))
        return Arrays(np.stack(columns, axis=1).astype(np.int32), part.numeric, part.labels)

    return encode(train), encode(test), [len(values) + 1 for values in known]


def resident_gb(field: str) -> float:
    """Returns `VmRSS`, the resident memory, or `VmHWM`, its peak. Unlike ru_maxrss, they exclude the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e9


def measure(
    rows: int, fit: Callable[[], Clock], score: Callable[[], NDArray[np.floating]], labels: NDArray[np.float32]
) -> PeerRun:
    """Measures memory and time of `fit`, then scores the test rows."""
    # Preparing the data is over: the peak is counted from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_gb("VmRSS")
    clock = fit()
    peak = resident_gb("VmHWM")
    auc = float(roc_auc_score(labels, score()))
    return PeerRun(rows, clock.seconds, clock.cpu_seconds, clock.setup_seconds, peak, peak - before, auc)


def timed(fit: Callable[[], object]) -> Clock:
    """Runs `fit` against the clock."""
    start, cpu = time.perf_counter(), time.process_time()
    fit()
    return Clock(time.perf_counter() - start, time.process_time() - cpu)


def deepctr(train: Arrays, test: Arrays, sizes: list[int], seed: int, rate: float = RATE) -> PeerRun:
    """Trains DeepCTR-Torch's DCN-Mix by its own `fit`."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat  # type: ignore[import-not-found]
    from deepctr_torch.models import DCNMix  # type: ignore[import-not-found]

    columns = [SparseFeat(f"C{number}", size, DIM) for number, size in enumerate(sizes)]
    columns += [DenseFeat(f"I{number}", 1) for number in range(train.numeric.shape[1])]
    model = DCNMix(
        [], columns, cross_num=CROSS_LAYERS, low_rank=CROSS_RANK, num_experts=1, dnn_hidden_units=HIDDEN,
        l2_reg_linear=0, l2_reg_embedding=0, l2_reg_cross=0, l2_reg_dnn=0, seed=seed, device="cpu",
    )  # fmt: skip
    model.compile(torch.optim.Adam(model.parameters(), lr=rate), "binary_crossentropy", metrics=[])
    inputs, held_out = train.columns(), test.columns()
    return measure(
        len(train.labels),
        lambda: timed(lambda: model.fit(inputs, train.labels, batch_size=BATCH, epochs=1, verbose=0)),
        lambda: model.predict(held_out, BATCH).ravel(),
        test.labels,
    )


def rechub(train: Arrays, test: Arrays, sizes: list[int], seed: int, rate: float = RATE) -> PeerRun:
    """Trains torch-rechub's DCN-V2 by its own loader and trainer."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature  # type: ignore[import-not-found]
    from torch_rechub.models.ranking import DCNv2  # type: ignore[import-not-found]
    from torch_rechub.trainers import CTRTrainer  # type: ignore[import-not-found]
    from torch_rechub.utils.data import DataGenerator  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    sparse = [SparseFeature(f"C{number}", size, DIM) for number, size in enumerate(sizes)]
    dense = [DenseFeature(f"I{number}") for number in range(train.numeric.shape[1])]
    mlp = {"dims": list(HIDDEN), "dropout": 0.0, "activation": "relu"}
    model = DCNv2(dense + sparse, CROSS_LAYERS, mlp, use_low_rank_mixture=True, low_rank=CROSS_RANK, num_experts=1)
    trainer = CTRTrainer(model, optimizer_params={"lr": rate}, n_epoch=1, device="cpu")
    held_out = test.columns()
    train_loader, _, test_loader = DataGenerator(train.columns(), train.labels).generate_dataloader(
        x_val=held_out, y_val=test.labels, x_test=held_out, y_test=test.labels, batch_size=BATCH
    )
    return measure(
        len(train.labels),
        lambda: timed(lambda: trainer.train_one_epoch(train_loader)),
        lambda: np.array(trainer.predict(model, test_loader)),
        test.labels,
    )


def main() -> None:
    """Trains one peer and writes `PeerRun` as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, choices=("deepctr", "rechub"))
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, default=RATE)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    train, test, sizes = label_encoded(Arrays.load(args.data / "train", args.rows), Arrays.load(args.data / "test"))
    run = {"deepctr": deepctr, "rechub": rechub}[args.peer]
    args.result.write_text(json.dumps(asdict(run(train, test, sizes, args.seed, args.rate))))


if __name__ == "__main__":
    main()
