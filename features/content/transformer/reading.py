"""Options by which a transformer reads a text: the tokens that it reads, its exit layer, its pooling, and chunks.

    text ─▶ chunks ─▶ layers up to the exit ─▶ token states ─▶ pooling ─▶ unit vector ─▶ mean of the chunks

An option that is not set leaves the model as it was saved. Each option that is set is a part of the space's id.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from features.errors import DatasetError

Pool = Literal["mean", "cls", "last", "max", "latent"]
POOLS: tuple[Pool, ...] = get_args(Pool)
_NAMES_OF_LIBRARY = {"last": "lasttoken"}
_LEAST = {"tokens": 1, "layer": 0, "chunks": 1}


@dataclass(frozen=True)
class TransformerOptions:
    """Choices of a transformer base; None leaves the choice to the model.

    Attributes:
        tokens: Most tokens of a text, or of a chunk, that are read.
        pool: Function from the states of the tokens to one vector. `latent` needs a model that carries trained latent
            attention.
        layer: Number of layers that run; 0 is the table of the tokens.
        chunks: Most words of a chunk. The vector of a text is the mean of its chunks' vectors.

    Raises:
        DatasetError: A value is unknown or out of its range; names it.
    """

    tokens: int | None = None
    pool: Pool | None = None
    layer: int | None = None
    chunks: int | None = None

    def __post_init__(self) -> None:
        if self.pool is not None and self.pool not in POOLS:
            raise DatasetError(f"pool: expected one of {', '.join(POOLS)}, got {self.pool!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise DatasetError(f"{name}: expected a whole number of {least} or more, got {value!r}")

    @property
    def name(self) -> str:
        """Part of the space's id; "" if nothing is set."""
        parts = (
            None if self.tokens is None else str(self.tokens),
            self.pool,
            None if self.layer is None else f"layer{self.layer}",
            None if self.chunks is None else f"chunks{self.chunks}",
        )
        return "".join(f"-{part}" for part in parts if part is not None)

    def to_json(self) -> dict[str, Any]:
        """Returns the choices that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def apply_reading(model: Any, reading: TransformerOptions, directory: str) -> None:
    """Changes an opened sentence-transformers model so that it reads as chosen; chunks are cut by the encoder.

    Args:
        model: Opened model.
        reading: Choices.
        directory: Directory or hub id of the model; latent attention is read from it.

    Raises:
        DatasetError: The model has fewer layers, no pooling, or no trained latent attention.
    """
    if reading.tokens is not None:
        model.max_seq_length = reading.tokens
    if reading.layer is not None:
        _cut_layers(model, reading.layer)
    if reading.pool is None:
        return
    place = pooling_place(model)
    if reading.pool == "latent":
        from features.content.transformer.latent import load_latent

        model[place] = load_latent(Path(directory), width=int(model[place].embedding_dimension))
        return
    width, keeps_prompt = int(model[place].embedding_dimension), model[place].include_prompt
    mode = _NAMES_OF_LIBRARY.get(reading.pool, reading.pool)
    model[place] = type(model[place])(width, pooling_mode=mode, include_prompt=keeps_prompt)


def pooling_place(model: Any) -> int:
    """Returns the place of the pooling among the modules of a sentence-transformers model.

    Raises:
        DatasetError: The model has no pooling.
    """
    found = [place for place, module in enumerate(model) if hasattr(module, "pooling_mode")]
    if not found:
        raise DatasetError("pool: the model has no pooling of token states; leave pool out")
    return found[0]


def _cut_layers(model: Any, count: int) -> None:
    """Removes the layers above the exit."""
    from torch.nn import ModuleList

    transformer = getattr(model[0], "auto_model", None)
    lists = [
        (parent, name, child)
        for parent in (transformer.modules() if transformer is not None else ())
        for name, child in parent.named_children()
        if isinstance(child, ModuleList)
    ]
    if not lists:
        raise DatasetError("layer: the model has no list of layers; leave layer out")
    parent, name, layers = max(lists, key=lambda one: len(one[2]))
    if count > len(layers):
        raise DatasetError(f"layer: expected 0 to {len(layers)}, the layers of the model, got {count}")
    setattr(parent, name, ModuleList(list(layers)[:count]))
