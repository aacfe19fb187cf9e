"""Send events as Arrow batches, a thousand rows a message, as a team's own producer does.

python examples/arrow_batches.py data/noon.jsonl
tessera stream --once
"""

import contextlib
import sys

import pyarrow as pa
from pyarrow import ipc, json

from tessera.settings import Settings

ROWS = 1_000


def message(batch: pa.RecordBatch) -> bytes:
    """Returns one message: an Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def main(lines: str) -> int:
    """Appends the rows of a file of JSON lines to the topic `events`; returns the number of messages."""
    table = json.read_json(lines)
    messages = [(None, message(batch)) for batch in table.combine_chunks().to_batches(max_chunksize=ROWS)]
    settings = Settings.from_environment()
    # On Kafka any client sends the same bytes: producer.send("events", value).
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        log.append(settings.topics.events, messages)
    print(f"{table.num_rows:,} rows in {len(messages):,} messages")
    return len(messages)


if __name__ == "__main__":
    main(sys.argv[1])
