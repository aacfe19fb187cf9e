"""The kinds of networks by name, and networks of one's own by `package.module:Class`.

A new kind is a class, see `RankerNetwork`, and one line in `KINDS`.
"""

import hashlib
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from features.config import nearest
from features.errors import BundleError, DatasetError
from models.networks.deepfm import DeepFm
from models.networks.din import Din
from models.networks.dlrm import Dlrm
from models.networks.inputs import NetworkReads
from models.networks.mmoe import Mmoe
from models.networks.self_attention import SelfAttention

DEFAULT = "dcn-v2"
"""The network of `models.ranker.network`, which has options of its own."""

KINDS: dict[str, type[nn.Module]] = {
    "dlrm": Dlrm,
    "deepfm": DeepFm,
    "din": Din,
    "mmoe": Mmoe,
    "self-attention": SelfAttention,
}


def check(kind: str, options: Mapping[str, Any]) -> None:
    """Checks that a kind exists and takes the options.

    Raises:
        DatasetError: The kind is unknown, cannot be imported, or does not take an option.
    """
    if kind == DEFAULT:
        if options:
            raise DatasetError(f"ranker.options: {DEFAULT} has none; set {', '.join(_OWN)} in [run.ranker]")
        return
    taken = inspect.signature(network_class(kind).__init__).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        return
    known = [name for name, one in taken.items() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            valid = f"; valid: {', '.join(known)}" if known else ""
            raise DatasetError(f"ranker.options.{name}: {kind} has no such option{valid}")


_OWN = ("cross_layers", "cross_rank", "hidden", "attention")


def network_class(kind: str) -> type[nn.Module]:
    """Returns the class of a kind.

    Raises:
        DatasetError: The kind is unknown, or its class cannot be imported or is no torch module.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, colon, name = kind.partition(":")
    if not colon:
        known = [DEFAULT, *KINDS]
        raise DatasetError(
            f"ranker {kind!r} is unknown; the nearest is {nearest(kind, known)!r} (valid: {', '.join(known)}, or "
            "package.module:Class of your own)"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise DatasetError(
            f"ranker {kind}: it cannot be imported ({error}); install its package, or add its directory to PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise DatasetError(f"ranker {kind}: {name} is no class of torch.nn.Module; see docs/extend/ranker.md")
    return found


def source_of(kind: str) -> str:
    """Returns the sha256 of the file that defines a class of one's own. Empty for a kind of Tessera."""
    if kind == DEFAULT or kind in KINDS:
        return ""
    path = sys.modules[network_class(kind).__module__].__file__
    return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def new_network(kind: str, reads: NetworkReads, options: Mapping[str, Any], *, source: str = "") -> nn.Module:
    """Returns a fresh network. The caller has set the seed.

    Args:
        kind: Name of the kind, or `package.module:Class`.
        reads: Shapes of the inputs.
        options: Options of the kind.
        source: The `source_of` with which the network was trained. Empty if it was not trained yet.

    Raises:
        DatasetError: The kind is unknown or cannot be imported, or its class refuses the options.
        BundleError: The class is another one than that of the training.
    """
    made = network_class(kind)
    if source and (now := source_of(kind)) != source:
        raise BundleError(
            f"ranker {kind}: its file has sha256 {now[:12]}…, the bundle was trained with {source[:12]}…; install the "
            "version of the training, or train again"
        )
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return partial(made, reads)(**given)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"ranker {kind}: {error}; see [run.ranker.options]") from error


def wants_sequence(kind: type[nn.Module]) -> bool:
    """Returns True if networks of a class read the history as a sequence."""
    return bool(getattr(kind, "sequence", False))


def reads_sequence(kind: str) -> bool:
    """Returns True if a kind reads the history as a sequence, which the table then returns item by item."""
    return kind != DEFAULT and wants_sequence(network_class(kind))


def check_logits(kind: str, logits: torch.Tensor, size: int, tasks: int = 1) -> torch.Tensor:
    """Returns the logits of a network of one's own.

    Raises:
        DatasetError: They are not one float an example, or one an example and task.
    """
    expected = (size,) if tasks == 1 else (size, tasks)
    if logits.shape != expected or not logits.is_floating_point():
        each = "a logit an example" if tasks == 1 else "a logit an example and task (NetworkReads.tasks)"
        raise DatasetError(
            f"ranker {kind}: its forward returned {logits.dtype} of shape {tuple(logits.shape)}, expected floats of "
            f"shape {expected}, {each}"
        )
    return logits
