"""`tessera encoder tune --layers`: tunes the top layers of a run's transformer; the result is another encoder.

    OUT/encoders/NAME/           the encoder, for `tessera encoder upgrade --to` or a warm start
    OUT/encoders/NAME/model/     its model, for `encoder_model` in [run]
    OUT/encoders/NAME/tune.json  its pairs, choices and recalls
    OUT/encoders/.NAME.states/   states of the tokens below the tuned layers, used again by the next fit
    OUT/encoders/.NAME.state     the state of a fit that was stopped

The run's stages are only read. An encoder appears whole or not at all, and the earlier encoder stays until then.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from features.content.chain import Chain
from features.content.content import FieldReader, contents, joined_fields
from features.content.encoder import Encoder
from features.content.kinds import load_encoder
from features.content.sentence import SentenceEncoder
from features.durable import recover_directory, replace_directory
from features.errors import DatasetError
from features.jobs.sample import take_rows
from features.jobs.shard import each_shard
from features.lock import locked
from models.encoder.tuning.layer_fit import tune_layers
from models.encoder.tuning.layers import LayerOptions, TokenStates, kept_states, save_tuned
from tessera.encoders.run_items import RunItems
from tessera.encoders.tune import REPORT, view_directory
from tessera.pipeline.artifact import write_json
from tessera.pipeline.stage import finished_key

ENCODERS, MODEL = "encoders", "model"


@dataclass(frozen=True)
class TunedEncoder:
    """Result of a tune of layers.

    Attributes:
        directory: Directory of the encoder.
        encoder: Id of the encoder.
        pairs: Number of pairs by source.
        recalls: Recall of held-out items before the fit and after each round, the mean over sources and exits.
    """

    directory: Path
    encoder: str
    pairs: dict[str, int]
    recalls: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain objects."""
        return asdict(self) | {"directory": str(self.directory)}


def tune_encoder(
    run: Path,
    name: str,
    pairs: Sequence[str],
    options: LayerOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TunedEncoder:
    """Fits top layers, or latent attention, on a run's items and writes the encoder into the run's directory.

    Args:
        run: Directory of a run with the stages `encode` and `frame`, whose encoder is a transformer.
        name: Name of the encoder.
        pairs: Sources of pairs of items.
        options: Choices of the fit.
        progress: Called after each round with the finished rounds and the most.

    Raises:
        TesseraError: A stage is missing, the encoder is no transformer whose layers can be tuned, a source gives no
            pair of items, or another tune holds the encoder.
    """
    for stage in ("encode", "frame"):
        finished_key(run / stage)
    directory = run / ENCODERS / view_directory(run, name).name
    found = load_encoder(run / "encode" / "encoder")
    base = _transformer(found)
    with locked(directory, wait_s=0):
        recover_directory(directory)
        catalogue = RunItems(run)
        tasks = catalogue.tasks(pairs, options.seed)
        read = _states(catalogue, found, base, directory.with_name(f".{name}.states"), options)
        state = directory.with_name(f".{name}.state")
        tuned, recalls = tune_layers(base.model, read, tasks, options, checkpoint=state, progress=progress)
        made = directory.with_name(f".{name}.made")
        shutil.rmtree(made, ignore_errors=True)
        place = made / "base" if isinstance(found, FieldReader) else made
        place.mkdir(parents=True)
        save_tuned(base.model, tuned, place / MODEL)
        exit_layer = None if tuned.exits[-1] == tuned.total else tuned.exits[-1]
        chosen = base.options.to_json() | {"pool": "latent" if tuned.pooling else None, "layer": exit_layer}
        own = SentenceEncoder(str(place / MODEL), **chosen)
        encoder: Encoder = own
        if isinstance(found, FieldReader):
            encoder = FieldReader(own, found.fields)
            encoder.describe(made)
        own.save(place, model=MODEL)
        counts = {source: task.pairs for source, task in zip(pairs, tasks, strict=True)}
        result = TunedEncoder(directory, encoder.id, counts, recalls)
        write_json(made / REPORT, result.to_json() | {"options": asdict(options)})
        replace_directory(made, directory)
        state.unlink(missing_ok=True)
    return result


def _transformer(encoder: Encoder) -> SentenceEncoder:
    """Returns the transformer of a run's encoder."""
    inner = encoder.base if isinstance(encoder, FieldReader) else encoder
    if not isinstance(inner, SentenceEncoder):
        kind = "several encoders side by side" if isinstance(inner, Chain) else inner.id
        raise DatasetError(
            f"--layers: the run's encoder is {kind}; only the layers of sentence-transformers can be tuned, "
            'so tune a head, or run with encoder = "sentence-transformers"'
        )
    return inner


def _states(
    catalogue: RunItems, found: Encoder, base: SentenceEncoder, directory: Path, options: LayerOptions
) -> TokenStates:
    """Returns the states of the run's items."""
    texts = contents(take_rows(each_shard(catalogue.run / "encode" / "texts"), catalogue.found.rows))
    if isinstance(found, FieldReader):
        texts = joined_fields(texts, found.fields)
    return kept_states(base.model, base.id, texts, directory, options)
