"""Sentence transformers: any local directory or hub id as the item encoder.

The weights stay in their directory. The saved encoder holds their location and a hash of their files, so that a bundle
refuses to continue with other weights under the same name. Reimers & Gurevych, "Sentence-BERT" (EMNLP 2019).
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.content.encoder import DESCRIPTION, unit
from features.content.passages import passages
from features.content.transformer.reading import Pool, TransformerOptions, apply_reading
from features.device import CPU, Device, named_faults
from features.errors import BundleError, DatasetError

_BATCH, _BATCH_OF_A_CARD = 32, 512


class SentenceEncoder:
    """Encoder by one transformer. Texts are encoded in batches sorted by length.

    A batch pads its texts, which changes the last bits: a text alone and in a batch agree to 1e-5, not bit for bit. A
    GPU reads in half precision: its vectors agree with those of a processor to a cosine of .999.

    Attributes:
        options: Choices of the reading.

    Args:
        model: Local directory or hub id.
        tokens: Most tokens of a text that are read; None for the model's own bound.
        pool, layer, chunks: See `features.content.transformer.reading.TransformerOptions`; None for the model's own.

    Raises:
        DatasetError: The model cannot be loaded, or cannot read as chosen; names the choice.
    """

    def __init__(
        self,
        model: str,
        *,
        tokens: int | None = None,
        pool: Pool | None = None,
        layer: int | None = None,
        chunks: int | None = None,
    ) -> None:
        self._model_name, self.options = model, TransformerOptions(tokens, pool, layer, chunks)
        self._model = open_model(model)
        apply_reading(self._model, self.options, model)
        self._id = f"st{self.options.name}-{_weights_hash(self._model)[:12]}"
        self._dim = int(self._model.get_embedding_dimension())
        self._device = CPU

    @property
    def device(self) -> Device:
        """Device that reads. Set it once, after the encoder is opened: half precision cannot be undone."""
        return self._device

    @device.setter
    def device(self, device: Device) -> None:
        self._device = device
        if not device.is_cpu:
            # The processor's cores tokenise for the device. On a processor they would only take its time.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            self._model.half().to(device.torch)

    @property
    def model(self) -> Any:
        """The opened model, which reads as chosen."""
        return self._model

    @property
    def id(self) -> str:
        return self._id

    @property
    def dim(self) -> int:
        return self._dim

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        filled = [position for position, text in enumerate(texts) if text.strip()]
        if filled:
            vectors[filled] = self._encoded([texts[position] for position in filled])
        return vectors

    def _encoded(self, texts: list[str]) -> NDArray[np.float32]:
        """Returns the vectors (N, D) of texts that are not empty."""
        if self.options.chunks is None:
            return self._read(texts)
        parts = [passages(text, self.options.chunks) or [text] for text in texts]
        of = np.repeat(np.arange(len(texts)), [len(own) for own in parts])
        read = [part for own in parts for part in own]
        sums = np.zeros((len(texts), self.dim))
        np.add.at(sums, of, self._read(read))
        return unit(sums)

    def _read(self, texts: list[str]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D) of texts, each read whole."""
        if self._device.is_cpu:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            return unit(self._model.encode(texts, batch_size=_BATCH, show_progress_bar=False))
        from features.content.transformer import batches

        with named_faults():
            if batches.reads_tokens(self._model):
                return batches.read(self._model, texts, self._device)
            return unit(self._model.encode(texts, batch_size=_BATCH_OF_A_CARD, show_progress_bar=False))

    def save(self, directory: Path, *, model: str | None = None) -> None:
        """Writes the description; `model` replaces the location, such as the name of a directory in `directory`."""
        described = {"kind": "sentence-transformers", "id": self._id, "model": model or self._model_name}
        described |= self.options.to_json()
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(described))


def open_model(model: str) -> Any:
    """Opens a transformer of the sentence-transformers library, on the CPU.

    Args:
        model: Local directory or hub id.

    Raises:
        DatasetError: The model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model, device="cpu")
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"encoder model {model!r} cannot be loaded: expected a local directory or a hub id that can be reached "
            f"({type(error).__name__}: {error})"
        ) from error


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def fit(
    texts: Sequence[str],
    *,
    dim: int,
    seed: int,
    model: str | None = None,
    tokens: int | None = None,
    pool: Pool | None = None,
    layer: int | None = None,
    chunks: int | None = None,
) -> SentenceEncoder:
    """Opens `model`. Texts, dim and seed have no effect, since nothing is fitted."""
    if model is None:
        raise DatasetError(
            "encoder sentence-transformers: no model given; set encoder_model in [run] to a directory or hub id"
        )
    return SentenceEncoder(model, tokens=tokens, pool=pool, layer=layer, chunks=chunks)


def load(directory: Path) -> SentenceEncoder:
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    chosen = {name: description.get(name) for name in ("tokens", "pool", "layer", "chunks")}
    # A model that was tuned lies beside its description, so that the directory can be moved.
    beside = directory / description["model"]
    encoder = SentenceEncoder(str(beside.resolve()) if beside.is_dir() else description["model"], **chosen)
    if encoder.id != description["id"]:
        raise BundleError(
            f"{directory / DESCRIPTION}: the weights at {description['model']} are {encoder.id}, "
            f"the vectors were made by {description['id']}; restore those weights or encode again"
        )
    return encoder
