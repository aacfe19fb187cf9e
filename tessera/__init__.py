"""Tessera as a library: feature embeddings for recommenders.

    >>> import tessera
    >>> bundle = tessera.load_bundle("out/publish/bundle")
    >>> bundle.rank("r00001", ["a00001", "a00002"])
    array([0..., 0...], dtype=float32)

Names are imported on first use (PEP 562): `import tessera` loads nothing, and `Client` needs httpx and msgspec alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from features.content.kinds import register as register_encoder
    from features.dataset.descriptor import Dataset, load_dataset
    from features.errors import TesseraError
    from models.bundle.bundle import Bundle, load_bundle
    from models.semantic_id.codebook.kinds import register as register_quantizer
    from models.table.frame_batches import FrameBatches, frame_schema
    from models.table.unified import UnifiedTable
    from serving.client import ApiError, AsyncClient, Client
    from tessera.library import check, run
    from tessera.pipeline.run import RunOptions, RunResult

__all__ = [
    "ApiError",
    "AsyncClient",
    "Bundle",
    "Client",
    "Dataset",
    "FrameBatches",
    "RunOptions",
    "RunResult",
    "TesseraError",
    "UnifiedTable",
    "check",
    "frame_schema",
    "load_bundle",
    "load_dataset",
    "register_encoder",
    "register_quantizer",
    "run",
]

# Name → the module that has it. The client needs no other package of Tessera's.
_PLACES = {
    "ApiError": "serving.client",
    "AsyncClient": "serving.client",
    "Bundle": "models.bundle.bundle",
    "Client": "serving.client",
    "Dataset": "features.dataset.descriptor",
    "FrameBatches": "models.table.frame_batches",
    "RunOptions": "tessera.pipeline.run",
    "RunResult": "tessera.pipeline.run",
    "TesseraError": "features.errors",
    "UnifiedTable": "models.table.unified",
    "check": "tessera.library",
    "frame_schema": "models.table.frame_batches",
    "load_bundle": "models.bundle.bundle",
    "load_dataset": "features.dataset.descriptor",
    "register_encoder": "features.content.kinds",
    "register_quantizer": "models.semantic_id.codebook.kinds",
    "run": "tessera.library",
}
_NAMED_OTHERWISE = {"register_encoder": "register", "register_quantizer": "register"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use.

    Raises:
        ImportError: a package of the extra that the name needs is not installed, or a package or module of yours hides
            one of Tessera's. The message says which, and what to do.
    """
    if name not in _PLACES:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}; it has: {', '.join(__all__)}")
    from tessera.install import CHAIN, imported

    place = _PLACES[name]
    top = place.partition(".")[0]
    needs = ("serving",) if place == "serving.client" else CHAIN[: CHAIN.index(top) + 1] if top in CHAIN else CHAIN
    value = getattr(imported(place, needs=needs), _NAMED_OTHERWISE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
