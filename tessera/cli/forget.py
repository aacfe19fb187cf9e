"""Commands about forgotten users: ask for it, list what still holds their ids, and rewrite the log."""

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


def forgotten(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    json: JsonOption = False,
) -> None:
    """List the topics, snapshots, bundles, backfills and ledgers that hold ids of forgotten users, and until when."""
    from dataclasses import asdict

    from serving.leftover import leftovers
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    opened = bundle_at(settings, model, bundle)
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        found = leftovers(
            log,
            opened,
            settings.topics,
            settings.home,
            settings.open_snapshots(),
            schemas=settings.schemas(),
        )
    if json:
        print_json({"places": [asdict(place) for place in found]})
        return
    for place in found:
        what = "messages" if place.kind == "topic" else "ids"
        out_console.print(
            f"{place.kind} {place.name}: {place.count:,} {what}; removed by: {place.until}",
            soft_wrap=True,
            highlight=False,
        )
    if not found:
        out_console.print("no topic, snapshot, bundle, backfill or ledger holds an id of a forgotten user")


def topics_rewrite(
    model: ModelNameOption = None,
    bundle: BundleOption = None,
    delete_records: Annotated[
        bool, typer.Option("--delete-records", help="On Kafka: delete ALL events and deltas before the snapshot.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Remove forgotten users from the messages of the log that the newest snapshot covers."""
    from serving.leftover import owners
    from serving.rollout.ledger_users import hide_in_ledgers
    from streaming.forget.request import ForgottenFeed
    from streaming.forget.retention import rewrite
    from tessera.settings import Settings
    from tessera.stream_service import bundle_at

    settings = Settings.from_environment()
    opened = bundle_at(settings, model, bundle)
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        from serving.store.writer import position_of

        log.create_topics(settings.topics.partitions())
        snapshots = settings.open_snapshots()
        snapshot = snapshots.newest(opened)
        if snapshot is None:
            raise TesseraError(f"{opened.id}: no snapshot; run `tessera stream --once`, which writes one")
        stored = position_of(store, opened.id, settings.topics.deltas) or ()
        done = rewrite(
            log,
            opened,
            settings.topics,
            snapshot,
            stored=stored,
            delete_records=delete_records,
            schemas=settings.schemas(),
            owners=owners(settings.topics),
        )
        pruned = snapshots.prune(opened, snapshot.seq)
        hidden, busy = hide_in_ledgers(settings.home / "judge", ForgottenFeed(log, settings.topics).read_on())
    if json:
        print_json({"messages": done.counts, "newer": done.newer, "snapshots": pruned, "ledgers": hidden})
        return
    changed = ", ".join(f"{count:,} of {topic}" for topic, count in done.counts.items()) or "none"
    newer = f"; {done.newer:,} requests are newer than the snapshot: run it again later" if done.newer else ""
    out_console.print(
        f"messages removed: {changed}; {pruned} older snapshots removed; {hidden} ids removed from ledgers{newer}",
        soft_wrap=True,
    )
    for path in busy:
        out_console.print(f"{path}: a judge runs, and removes the ids at its next look", soft_wrap=True)
    out_console.print("`tessera forgotten` lists the places that still hold ids")
