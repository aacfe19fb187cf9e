"""Trains a peer's retrieval on `retrieval`'s arrays and writes its lists, in the peers' environment without Tessera.

    python retrieval.py --model item-knn|als|bpr|sasrec|hstu DATA RESULT --seed S --length L

All have 64 numbers an item, as the towers. The sequence models have the settings of RecTools' tutorials: batches of
128, Adam at 1e-3, dropout 0.2, two blocks, softmax over the catalogue, early stopping on each user's last training
item, and the weights of the best epoch. HSTU is told the time of the question, as its tutorial does by a context, and
compares by cosine at the temperature of its authors' code (Zhai et al. 2024, "Actions Speak Louder than Words").
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FACTORS, COUNT, EPOCHS, PATIENCE = 64, 50, 100, 5
TEMPERATURE = 0.05


def read(data: Path) -> dict[str, Any]:
    """Reads the arrays by name."""
    return {path.stem: np.load(path) for path in sorted(data.glob("*.npy")) if "-" not in path.stem}


def by_factors(model: str, arrays: dict[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """Fits a model of `implicit`. Returns the lists (M, 50)."""
    import scipy.sparse as sp
    from implicit.als import AlternatingLeastSquares  # type: ignore[import-not-found]
    from implicit.bpr import BayesianPersonalizedRanking  # type: ignore[import-not-found]
    from implicit.nearest_neighbours import CosineRecommender  # type: ignore[import-not-found]

    users, items = int(arrays["user"].max()) + 1, int(arrays["item"].max()) + 1
    ones = np.ones(len(arrays["user"]), dtype=np.float32)
    matrix = sp.csr_matrix((ones, (arrays["user"], arrays["item"])), (users, items))
    matrix.data[:] = 1
    if model == "als":
        fitted = AlternatingLeastSquares(
            factors=FACTORS, iterations=15, alpha=10, regularization=0.05, random_state=seed, num_threads=1
        )
    elif model == "bpr":
        fitted = BayesianPersonalizedRanking(
            factors=FACTORS, iterations=150, random_state=seed, num_threads=1, use_gpu=False
        )
    else:
        fitted = CosineRecommender(K=200, num_threads=1)
    fitted.fit(matrix, show_progress=False)
    asked = arrays["asked"]
    lists, scores = fitted.recommend(asked, matrix[asked], N=COUNT, filter_already_liked_items=True)
    return np.where(np.isfinite(scores) & (scores > -1e30), lists, -1), {}


def last_of_users(interactions: Any, **_: Any) -> Any:
    """Marks each user's last interaction, on which training is stopped."""
    newest = interactions.sort_values("datetime", ascending=False, kind="stable")
    rank = newest.groupby("user_id", sort=False).cumcount()
    return (rank.reindex(interactions.index) == 0).to_numpy()


def unit_of(times: Any) -> str:
    """Returns the unit of times as pandas names it: microseconds or days."""
    return "us" if times.max() > 10**12 else "D"


def visits(arrays: dict[str, Any]) -> Any:
    """Returns the data set of RecTools. Microseconds keep the order of a user's events of one time."""
    import pandas as pd
    from rectools.dataset import Dataset  # type: ignore[import-not-found]

    user, place = arrays["user"], np.arange(len(arrays["user"]))
    first = np.concatenate([[True], user[1:] != user[:-1]])
    within = place - np.maximum.accumulate(np.where(first, place, 0))
    clock = pd.to_datetime(arrays["time"], unit=unit_of(arrays["time"])) + pd.to_timedelta(within, unit="us")
    columns = {"user_id": user, "item_id": arrays["item"], "weight": 1.0, "datetime": clock}
    return Dataset.construct(pd.DataFrame(columns))


def times_of_questions(arrays: dict[str, Any]) -> Any:
    """Returns the context of the questions. HSTU drops a user's newest event as the question, so it is behind all."""
    import pandas as pd

    asked = arrays["asked"]
    behind = pd.to_timedelta(np.bincount(arrays["user"], minlength=int(asked.max()) + 1)[asked], unit="us")
    clock = pd.to_datetime(arrays["asked_time"], unit=unit_of(arrays["time"])) + behind
    return pd.DataFrame({"user_id": asked, "datetime": clock, "weight": 1.0})


def by_sequence(model: str, arrays: dict[str, Any], seed: int, length: int, epochs: int) -> tuple[Any, dict[str, Any]]:
    """Fits a sequence model of RecTools. Returns the lists (M, 50)."""
    import torch
    from pytorch_lightning import Trainer, seed_everything  # type: ignore[import-not-found]
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # type: ignore[import-not-found]
    from rectools.models import HSTUModel, SASRecModel  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    seed_everything(seed)
    data = visits(arrays)
    with tempfile.TemporaryDirectory() as kept:
        best = ModelCheckpoint(dirpath=kept, monitor="val_loss", mode="min", save_weights_only=True)
        stops = EarlyStopping(monitor="val_loss", mode="min", patience=PATIENCE)
        shape: dict[str, Any] = {
            "session_max_len": length,
            "n_factors": FACTORS,
            "n_blocks": 2,
            "n_heads": 4,
            "loss": "softmax",
            "lr": 1e-3,
            "batch_size": 128,
            "dropout_rate": 0.2,
            "deterministic": True,
            "get_val_mask_func": last_of_users,
            "get_trainer_func": lambda: Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                deterministic=True,
                enable_progress_bar=False,
                enable_model_summary=False,
                logger=False,
                callbacks=[stops, best],
            ),
        }
        asked = {"users": arrays["asked"], "dataset": data, "k": COUNT, "filter_viewed": True}
        if model == "hstu":
            shape["lightning_module_kwargs"] = {"logits_t": TEMPERATURE}
            asked["context"] = times_of_questions(arrays)
        fitted = SASRecModel(**shape) if model == "sasrec" else HSTUModel(**shape)
        fitted.fit(data)
        done = int(fitted.fit_trainer.current_epoch)
        # The model trains by a copy of the trainer, and so by copies of the callbacks.
        fitted.load_weights_from_checkpoint(fitted.fit_trainer.checkpoint_callback.best_model_path)
        found = fitted.recommend(**asked)
    lists = np.full((len(arrays["asked"]), COUNT), -1)
    row = {user: number for number, user in enumerate(arrays["asked"].tolist())}
    lists[found["user_id"].map(row).to_numpy(), found["rank"].to_numpy() - 1] = found["item_id"].to_numpy()
    return lists, {"epochs": done}


def main() -> None:
    """Fits the model that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    arrays = read(given.data)
    began, cpu = time.perf_counter(), time.process_time()
    if given.model in ("sasrec", "hstu"):
        lists, about = by_sequence(given.model, arrays, given.seed, given.length, given.epochs)
    else:
        lists, about = by_factors(given.model, arrays, given.seed)
    about |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    path = given.result.with_suffix(".npy")
    kept = np.lib.format.open_memmap(path, "w+", np.dtype(np.int64), lists.shape)
    kept[...] = lists
    kept.flush()
    given.result.with_suffix(".json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
