"""The ranker: a network over what the unified table returns. The default is DCN-V2 (Wang et al., WWW 2021).

    x = [pooled lookups, attended history, numeric (B, n), projected content]      logit = w · [cross(x), MLP(x)]

Other kinds are in `models.networks`. Crosses are low-rank (eq. 3 of the paper); cross nets and MLP are TorchRec's (see
`models.networks.dcn`).

Shape letters: B batch, K lookups, D dim, L history length, W width of the attended features together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.networks.dcn import cross_net, mlp
from models.networks.inputs import NetworkInputs, NetworkReads
from models.networks.kinds import DEFAULT, check_logits, network_class, new_network, source_of, wants_sequence
from models.networks.tasks import TaskLosses, Values
from models.ranker.placement import PlacementPath
from models.table.batch import Batch
from models.table.reference import EmbeddingTable
from models.table.schema import Schema


@dataclass(frozen=True)
class NetworkConfig:
    """Kind and shape of the dense part.

    Attributes:
        kind: Kind of the network, or `package.module:Class` of a network of one's own. The attributes `cross_layers`,
            `cross_rank` and `hidden` are the default kind's.
        options: Options of another kind than the default.
        source: sha256 of the file of a network of one's own. Training sets it.
        cross_layers, cross_rank: Layers and rank of the cross net.
        hidden: Widths of the MLP's layers.
        attention: Width of the keys and queries with which a history is weighed.
        content: Width to which an item's content vector is projected.
        uncertainty: True learns a weight for each task beside the descriptor's; see `models.networks.tasks`.
        tasks: Weight of each task's loss by its name, in the order of the outputs. Empty for one label. The descriptor
            sets it.
        judge: Task whose probability is judged. Empty for one label. The descriptor sets it.
    """

    cross_layers: int = 2
    cross_rank: int = 64
    hidden: tuple[int, ...] = (128, 64)
    attention: int = 32
    content: int = 32
    kind: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    uncertainty: bool = False
    tasks: Mapping[str, float] = field(default_factory=dict)
    judge: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as a bundle holds it, without the parts that only other kinds or tasks have."""
        left_out = (*(_OF_OTHERS if self.kind == DEFAULT else ()), *(() if self.tasks else _OF_TASKS))
        return {name: value for name, value in asdict(self).items() if name not in left_out}


_OF_OTHERS = ("kind", "options", "source")
_OF_TASKS = ("uncertainty", "tasks", "judge")


class Network(nn.Module):
    """DCN-V2 in parallel form: inputs (B, ·) float32 that together are (B, width), logits (B,) out.

    Several tasks share all layers but the head, which then has a row for each: logits (B, T).

    Args:
        width: Width of the input.
        config: Layers of the network.
        seed: Seed of the initial weights.
        plain: True builds the layers without TorchRec, which takes seconds to load. The numbers are the same.
    """

    def __init__(self, width: int, config: NetworkConfig, *, seed: int = 0, plain: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cross = cross_net(width, config.cross_layers, min(config.cross_rank, width), plain=plain)
            self.mlp = mlp(width, config.hidden, plain=plain)
            self.head = nn.Linear(width + config.hidden[-1], max(len(config.tasks), 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, dim=1)
        # The head's two halves are applied apart: concatenating its input would copy x once more.
        of_cross, of_mlp = self.head.weight.split([x.shape[1], self.head.in_features - x.shape[1]], dim=1)
        crossed, deep = functional.linear(self.cross(x), of_cross), functional.linear(self.mlp(x), of_mlp)
        return (crossed + deep + self.head.bias).squeeze(1)


class TargetAttention(nn.Module):
    """Weighs a history by the candidate (after Zhou et al., "Deep Interest Network", KDD 2018).

        a_l = exp(s_l) / (1 + Σ exp(s)),   s_l = (Q candidate) · (K item_l) / √d,   out = Σ a_l item_l

    The 1 gives no weight to a history without relevant items, or without items.

    Args:
        width: W, of an item.
        inner: d, of keys and queries.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)

    def forward(self, candidate: Tensor, items: Tensor, visits: Tensor) -> Tensor:
        """Returns (B, W) from candidates (B, W) and items (B, L, W); each example has its first `visits` (B,) items."""
        keys = self.key(items)
        scores = (keys @ self.query(candidate).unsqueeze(2)).squeeze(2) / math.sqrt(keys.shape[2])
        scores = scores.masked_fill(
            torch.arange(items.shape[1], device=items.device) >= visits.unsqueeze(1), -torch.inf
        )
        weights = torch.softmax(functional.pad(scores, (1, 0)), dim=1)[:, 1:]
        return (weights.unsqueeze(1) @ items).squeeze(1)


class DensePart(nn.Module):
    """Dense part of the ranker: all layers that follow the table.

    Args:
        schema: Outputs of the table, and the other inputs.
        config: Layers of the network.
        seed: Seed of the initial weights.
        plain: See `Network`.
    """

    def __init__(self, schema: Schema, config: NetworkConfig, *, seed: int = 0, plain: bool = False) -> None:
        super().__init__()
        if config.kind != DEFAULT and not config.source:
            config = replace(config, source=source_of(config.kind))
        self.config = config
        self.tasks: TaskLosses | None = None
        if config.tasks:
            self.tasks = TaskLosses(config.tasks, config.judge, uncertainty=config.uncertainty)
        self._schema = schema
        self._columns: dict[str, Tensor] = {}
        columns = _columns(schema)
        self._attended = [feature for feature in schema.features if feature.pooling == "attention"]
        candidates = {feature.column: feature.name for feature in schema.of("item")}
        pooled = [columns[f.name] for f in schema.features if f.pooling != "attention"]
        unattended = torch.cat(pooled) if pooled else torch.zeros(0, dtype=torch.int64)
        self._keep_columns(plain=unattended, **{f"items_{one.name}": columns[one.name] for one in self._attended})
        width = len(unattended) + len(schema.numeric)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._attended:
                candidate = torch.cat([columns[candidates[feature.column]] for feature in self._attended])
                self._keep_columns(candidate=candidate)
                if config.kind == DEFAULT:
                    self.attention = TargetAttention(len(candidate), config.attention)
                width += len(candidate)
            if schema.content:
                self.content = nn.Linear(schema.content, config.content)
                width += config.content
        if config.kind == DEFAULT:
            self.network: nn.Module = Network(width, config, seed=seed, plain=plain)
        else:
            self.network = self._other(len(unattended), seed)
        if schema.placement:
            self.placement = PlacementPath(schema.placement)

    def judged(self, values: Values) -> Values:
        """Returns the judged task's column of values (B, T) of several tasks, or values (B,) of one label."""
        return values if self.tasks is None else self.tasks.judged(values)

    def _other(self, plain: int, seed: int) -> nn.Module:
        """Returns the network of another kind, and makes the attention for a kind that reads no sequence."""
        schema, config = self._schema, self.config
        numbers = len(schema.numeric) + (config.content if schema.content else 0)
        past = len(self._columns["candidate"]) if self._attended else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fields = plain // schema.dim
            tasks = self._outputs
            length = schema.history_length if past else 0
            sequence = NetworkReads(fields, schema.dim, numbers, past, length, tasks)
            pooled = NetworkReads(fields + past // schema.dim, schema.dim, numbers, tasks=tasks)
            made = network_class(config.kind)
            reads = sequence if wants_sequence(made) else pooled
            network = new_network(config.kind, reads, config.options, source=config.source)
            if past and not wants_sequence(made):
                self.attention = TargetAttention(past, config.attention)
        return network

    def forward(self, pooled: Tensor, batch: Batch) -> Tensor:
        """Returns logits (B,), or (B, T) of several tasks, of the table's output (B, K · D) and the batch it came from.

        Without cells of the placement, the constant of the position path takes their place.
        """
        dtype = self._dtype
        pooled = pooled.to(dtype)
        fields = pooled[:, self._columns["plain"]] if self._attended else pooled
        candidate, items = self._history(pooled)
        beside = self.beside(batch)
        attended = []
        if candidate is not None and hasattr(self, "attention"):
            attended = [self.attention(candidate, items, batch.visits)]
        if self.config.kind == DEFAULT:
            logits: Tensor = self.network(fields, *attended, *beside)
        else:
            vectors = torch.cat([fields, *attended], dim=1).view(len(fields), -1, self._schema.dim)
            inputs = NetworkInputs(vectors, torch.cat(beside, dim=1))
            if candidate is not None and not attended:
                inputs = inputs._replace(candidate=candidate, history=items, visits=batch.visits)
            logits = check_logits(self.config.kind, self.network(inputs), len(fields), self._outputs)
        return self.placed(logits, batch)

    def beside(self, batch: Batch) -> list[Tensor]:
        """Returns the inputs of a batch that are no lookups: the projected content, if any, and the numbers."""
        content = [] if batch.content is None else [self.content(batch.content.to(self._dtype))]
        return [*content, batch.numeric.to(self._dtype)]

    def placed(self, logits: Tensor, batch: Batch) -> Tensor:
        """Adds the position path, if the schema has one, to logits (B,). Several tasks have none."""
        if not self._schema.placement:
            return logits
        path = self.placement
        return logits + (path.reference if batch.placement is None else path(batch.placement))

    def _history(self, pooled: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the candidate (B, W) and the history (B, L, W), None without attention."""
        if not self._attended:
            return None, None
        slots = self._schema.history_length
        past = [self._columns[f"items_{one.name}"] for one in self._attended]
        items = torch.cat([pooled[:, own].view(len(pooled), slots, -1) for own in past], dim=2)
        return pooled[:, self._columns["candidate"]], items

    @property
    def _outputs(self) -> int:
        return 1 if self.tasks is None else len(self.tasks.names)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _keep_columns(self, **columns: Tensor) -> None:
        self._columns |= columns

    def _apply(self, move: Callable[..., Tensor], recurse: bool = True) -> "DensePart":
        """Moves the numbers of columns with the parameters. They are no buffers: the schema decides them, so no bundle
        stores them, and no change of precision may touch them."""
        super()._apply(move, recurse)
        device = next(self.network.parameters()).device
        self._columns = {name: own.to(device) for name, own in self._columns.items()}
        return self


class Ranker(nn.Module):
    """Table and dense part together: a batch in, logits (B,) out."""

    def __init__(self, table: nn.Module, network: DensePart) -> None:
        super().__init__()
        self.table_module = table
        self.network = network

    @property
    def table(self) -> EmbeddingTable:
        return cast(EmbeddingTable, self.table_module)

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.network(self.table(batch), batch)
        return logits


def _columns(schema: Schema) -> dict[str, Tensor]:
    """Maps each feature to its columns of the table's output."""
    found: dict[str, Tensor] = {}
    start = 0
    for feature in schema.features:
        width = schema.slots(feature) * feature.chunks * schema.dim
        found[feature.name] = torch.arange(start, start + width)
        start += width
    return found
