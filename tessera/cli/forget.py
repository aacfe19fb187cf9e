"""Command `tessera forget`: asks to forget users, and removes what the log still holds of them."""

import contextlib
from typing import Annotated

import typer

from features.errors import TesseraError
from tessera.terminal import BundleOption, JsonOption, ModelNameOption, out_console, print_json


def forget(
    users: Annotated[list[str], typer.Argument(metavar="USER", help="Ids of users.")],
    json: JsonOption = False,
) -> None:
    """Forget users: remove what the stream and the store hold of them, and leave their older events out."""
    from features.value.canonical import scalar
    from streaming.forget.removal import SHARED
    from streaming.forget.request import forget as ask
    from tessera.settings import Settings

    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        ids = list(dict.fromkeys(scalar(user) or "" for user in users))
        requests = ask(log, settings.topics, ids, by="command line")
    if json:
        print_json({"requested": [request.user for request in requests], "shared": list(SHARED)})
        return
    for request in requests:
        out_console.print(f"requested {request.user}", highlight=False)
    out_console.print(
        f"the stream removes them at its next batch; these keep what they learnt: {', '.join(SHARED)}\n"
        "`tessera topics rewrite` removes old messages from the log; to train again without the users: "
        '`tessera topics export forgotten forgotten.jsonl`, [events] forgotten = "forgotten.jsonl", `tessera run`',
        soft_wrap=True,
        highlight=False,
    )


def topics_rewrite(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    delete_records: Annotated[
        bool, typer.Option("--delete-records", help="On Kafka: delete ALL events and deltas before the snapshot.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Remove forgotten users from the messages of the log that the newest snapshot covers."""
    from streaming.forget.retention import rewrite
    from streaming.snapshot import Snapshots
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    opened = bundle_at(settings, model, bundle)
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        from serving.store.writer import position_of

        log.create_topics(settings.topics.partitions())
        snapshots = Snapshots(settings.snapshots)
        snapshot = snapshots.newest(opened)
        if snapshot is None:
            raise TesseraError(f"{opened.id}: no snapshot; run `tessera stream --once`, which writes one")
        stored = position_of(store, opened.id, settings.topics.deltas) or 0
        done = rewrite(
            log,
            opened,
            settings.topics,
            snapshot,
            stored=stored,
            delete_records=delete_records,
            schemas=settings.schemas(),
        )
        pruned = snapshots.prune(opened, snapshot.seq)
    if json:
        print_json({"messages": done.counts, "newer": done.newer, "snapshots": pruned})
        return
    changed = ", ".join(f"{count:,} of {topic}" for topic, count in done.counts.items()) or "none"
    newer = f"; {done.newer:,} requests are newer than the snapshot: run it again later" if done.newer else ""
    out_console.print(f"messages removed: {changed}; {pruned} older snapshots removed{newer}", soft_wrap=True)
