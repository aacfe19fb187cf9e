"""All benchmarks of `tessera bench`: where each one is, what it needs, which data it reads, and which options it takes.

A new benchmark is a function in a module of its own and a row here.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from features.errors import TesseraError
from tessera.bench.harness.needs import CTR, FEAST, RETRIEVAL, RQ, Needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.dataset.descriptor import Dataset
    from tessera.bench.harness.result import BenchResult

Reads = Literal["one", "each split", "given", "optional", "nothing"]


@dataclass(frozen=True)
class Bench:
    """A benchmark as the command finds it.

    Attributes:
        place: `module:function` below `tessera.bench`. The function takes what it reads, if anything, then the
            directory, and by name `seeds`, `console` and what `takes` and `needs` say.
        needs: Conditions, checked before it measures.
        reads: `one` dataset, the synthetic catalogue where none is given; a dataset under `each split` that is asked
            for; one that must be `given`; an `optional` one, whose place None takes; or `nothing`.
        split: Way to split where none is asked for; None for the descriptor's own.
        takes: Options of the command that are for this benchmark and some others.
        synthetic: Sizes of the synthetic catalogue, where they are not the default ones.
    """

    place: str
    needs: Needs = field(default_factory=Needs)
    reads: Reads = "one"
    split: str | None = None
    takes: frozenset[str] = frozenset()
    synthetic: Mapping[str, int] = field(default_factory=dict)

    def load(self) -> "Callable[..., BenchResult]":
        """Imports the function."""
        module, name = self.place.split(":")
        found: Callable[..., BenchResult] = getattr(importlib.import_module(f"tessera.bench.{module}"), name)
        return found

    def prepared(
        self, name: str, path: Path | None, ways: "Sequence[str]", out: Path
    ) -> "tuple[Callable[..., BenchResult], list[Dataset]]":
        """Returns the function with its data and directory, and the datasets that it reads.

        Args:
            name: Name of the benchmark.
            path: Descriptor; None for the synthetic catalogue, or no dataset.
            ways: Ways to split; none for the benchmark's own.
            out: Directory of all benchmarks.

        Raises:
            TesseraError: The benchmark must be given a dataset.
        """
        if self.reads == "nothing":
            return partial(self.load(), out / name), []
        if self.reads == "optional" and path is None:
            return partial(self.load(), None, out / f"{name}-synthetic"), []
        if self.reads == "given" and path is None:
            raise TesseraError(f"bench {name} needs --dataset: a descriptor that both versions understand")
        datasets = self._datasets(path, ways or [self.split], out)
        if self.reads == "each split":
            return partial(self.load(), datasets, out), datasets
        directory = out / f"{name}-{datasets[0].name}"
        directory.mkdir(parents=True, exist_ok=True)
        return partial(self.load(), datasets[0], directory), datasets[:1]

    def _datasets(self, path: Path | None, ways: "Sequence[str | None]", out: Path) -> "list[Dataset]":
        from tessera.demo.synthetic import write_synthetic
        from tessera.terminal import load_with_split

        if path is None:
            sizes: dict[str, Any] = dict(self.synthetic)
            path = write_synthetic(out / "-".join(["synthetic", *map(str, sizes.values())]), **sizes)
        return [load_with_split(path, by) for by in ways]


_PART, _SECONDS, _DEVICE = frozenset({"part"}), frozenset({"seconds"}), frozenset({"device"})

BENCHES = {
    "main-job": Bench("offline.main_job:main_job", reads="each split"),
    # The papers' protocols split at random.
    "multiplexing": Bench("offline.multiplexing:multiplexing", split="random"),
    "compression": Bench("offline.compression:compression", split="random"),
    "training-speed": Bench(
        "offline.training_speed:training_speed", Needs(peers=(CTR,)), reads="nothing", takes=_DEVICE
    ),
    "training-blocks": Bench("offline.training_blocks:training_blocks"),
    "processes": Bench("offline.processes:processes"),
    "rankers": Bench("rankers.kinds:rankers", Needs(ranks=True, peers=(CTR,)), takes=_PART),
    "labels": Bench("rankers.labels:labels", Needs(ranks=True)),
    "retrieval": Bench("retrieval.retrieval:retrieval", Needs(ranks=True, peers=(RETRIEVAL,)), takes=_PART),
    "resize": Bench("offline.resize:resize", split="random"),
    "cold-start": Bench(
        "offline.cold_start:cold_start",
        Needs(content=True),
        split="random",
        takes=frozenset({"part", "held-out"}),
    ),
    "code-value": Bench("encoder.code_value:code_value", Needs(content=True), split="random", takes=_PART),
    "id-churn": Bench("offline.id_churn:id_churn", Needs(content=True), split="random"),
    "codebook-change": Bench("offline.codebook_change:codebook_change", Needs(content=True), split="random"),
    "encoders": Bench("encoder.encoders:encoders", Needs(content=True, ranks=True), takes=_PART | _DEVICE),
    "upgrade": Bench(
        "encoder.upgrade:upgrade", Needs(content=True, ranks=True), split="random", takes=frozenset({"model"})
    ),
    "aspects": Bench("encoder.aspects:aspects", Needs(content=True, ranks=True), split="random"),
    "correction": Bench("encoder.correction:correction", Needs(content=True, ranks=True)),
    "aggregates": Bench("offline.aggregates:aggregates", Needs(ranks=True), takes=_PART),
    "shown": Bench("shown.shown:shown", Needs(ranks=True), split="random"),
    "semantic-ids": Bench(
        "offline.semantic_ids:semantic_ids", Needs(content=True, peers=(RQ,)), reads="optional", takes=_DEVICE
    ),
    "expressions": Bench("online.expressions:expressions", reads="nothing"),
    "drift": Bench("skew.drift:drift", reads="nothing"),
    "stream": Bench("online.stream_rates:stream", Needs(servers=True, peers=(FEAST,))),
    "streaming": Bench("versions.ratios:streaming", reads="given", takes=_PART),
    "freshness": Bench("online.freshness:freshness", Needs(servers=True)),
    "stream-processes": Bench("several.stream_processes:stream_processes", Needs(servers=True)),
    "follow": Bench("several.follow_cost:follow", Needs(servers=True)),
    "online-learning": Bench("online.online_learning:online_learning"),
    "soak": Bench("online.soak:soak", Needs(servers=True), takes=_SECONDS),
    "filtered": Bench("online.filtered:filtered", Needs(content=True), takes=_PART),
    "serving": Bench("online.serving_reads:serving", Needs(servers=True, ranks=True, peers=(FEAST,)), takes=_PART),
    "candidates": Bench("online.candidates:candidates", Needs(servers=True, content=True, ranks=True)),
    "policies": Bench("online.policies:policies", Needs(ranks=True)),
    "swaps": Bench("online.swaps:swaps", Needs(ranks=True), takes=_SECONDS),
    "rollout": Bench("online.rollout_rates:rollout"),
    # The console is measured with this many items.
    "operation": Bench(
        "online.operation:operation",
        Needs(ranks=True),
        synthetic={"users": 5_000, "items": 100_000, "events": 200_000},
    ),
    "growth": Bench("online.growth:growth", Needs(ranks=True)),
    "formats": Bench("online.message_formats:formats"),
}
"""The benchmarks by name, offline ones first."""
NEW_USERS = Bench("offline.new_users:new_users")
"""`cold-start --users`."""


def takers(option: str) -> list[str]:
    """Returns the names of the benchmarks that take an option."""
    return [name for name, bench in BENCHES.items() if option in bench.takes]
