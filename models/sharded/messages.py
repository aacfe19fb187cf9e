"""Files by which a training in several processes is described to its processes, and by which they answer."""

from typing import Any

import msgspec

from models.ranker.train import TrainConfig

SPEC, PROGRESS, ERROR, LOSSES = "spec.json", "progress.json", "error-{:05d}.json", "losses.json"
"""Names of the files: the description, the progress, the error of a process, the loss of every step."""
MEETING = "meeting"
"""Name of the file in which the processes meet."""


class RankSpec(msgspec.Struct, frozen=True):
    """Description of a training.

    Attributes:
        frame: Directory of the frame.
        model: Directory that gets the trained ranker.
        schema: Schema of the ranker's input.
        config: Configuration of the training.
        positives: Number of positives in the training part.
        start: Directory of the ranker to start from. Empty: the seed decides the start.
        checkpoint: Directory of the checkpoint. Empty: none is written.
        seconds: Interval of checkpoints, seconds.
        watch: True writes the loss of every step, which costs a message a step.
    """

    frame: str
    model: str
    schema: dict[str, Any]
    config: TrainConfig
    positives: float
    start: str = ""
    checkpoint: str = ""
    seconds: float = 60.0
    watch: bool = False


class RankError(msgspec.Struct, frozen=True):
    """Error of a process: the name of its class, and its message."""

    kind: str
    message: str
