"""Runs `tessera stream --follow`: one process trains every bundle that the registry names."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from tessera.settings import Settings
from tessera.terminal import err_console, one_thread, out_console, print_json

if TYPE_CHECKING:
    from streaming.shared.ledger import FollowedBundle
    from streaming.trainer import TrainerOptions
    from tessera.follow.service import FollowService
    from tessera.stream_service import StreamConnections


def follow_releases(
    settings: Settings,
    model: str | None,
    connections: "StreamConnections",
    options: "TrainerOptions",
    *,
    roles: tuple[str, ...],
    metrics_port: str,
    once: bool,
    watch: bool,
    json: bool,
) -> None:
    """Follows the releases until a signal comes, or drains the topics once.

    Args:
        settings: Addresses.
        model: Name of the model. None: the registry holds one model.
        connections: Opens log and store.
        options: Options of each trainer.
        roles: Roles that run here.
        metrics_port: PORT or HOST:PORT of the metrics; "0" for none.
        once: True drains the topics and ends.
        watch: True shows a live view.
        json: True prints the totals as JSON.
    """
    from tessera.cli.serve import log_lines
    from tessera.follow.release import ReleaseWatch
    from tessera.follow.service import FollowService
    from tessera.stream_service import until_stopped

    releases = ReleaseWatch(settings.open_registry(create=False), settings.bundles, model)
    stop = until_stopped()
    one_thread()
    service = FollowService(releases, connections, options, roles=roles)
    err_console.print(f"stream follows {releases.model} from {settings.kafka or settings.home / 'log.db'}")
    with settings.traced("tessera-stream"):
        if once:
            found: dict[str, Any] = {bundle: _counts(totals) for bundle, totals in service.once().items()}
        else:
            log_lines(requests=False)
            service.metrics.serve(metrics_port)
            _run(service, stop, watch=watch)
            found = {name: state.counts for name, state in service.metrics.states.items()}
    if json:
        print_json(found)
        return
    for bundle, counts in found.items():
        out_console.print(
            f"{bundle}: {counts['events']:,} events, {counts['items']:,} items, {counts['neutral']:,} neutral, "
            f"{counts['bad']:,} dead letters; {counts['batches']:,} batches"
        )


def _counts(totals: Any) -> dict[str, int]:
    return {name: getattr(totals, name) for name in ("messages", "events", "items", "neutral", "bad", "batches")}


def _run(service: "FollowService", stop: Any, *, watch: bool) -> None:
    if not watch:
        service.run(stop)
        return
    from rich.live import Live

    def view() -> Table:
        return followed_table(list(service.metrics.states.values()))

    with Live(view(), console=err_console, auto_refresh=False) as screen:
        service.run(stop, on_tick=lambda: screen.update(view(), refresh=True))


def followed_table(bundles: "list[FollowedBundle]") -> Table:
    """Returns what is followed, and how far, as a table."""
    table = Table("bundle", "roles", "state", "batch", "events", "lag", "fresh p50, p99", "log loss", title="followed")
    for one in bundles:
        fresh = "-" if one.freshness_ms is None else f"{one.freshness_ms[0]:,.0f}, {one.freshness_ms[1]:,.0f} ms"
        loss = "-" if one.log_loss is None else f"{one.log_loss:.4f}"
        state = f"{one.state}: {one.why}" if one.why else one.state
        events = f"{one.counts.get('events', 0):,}"
        table.add_row(one.bundle, ", ".join(one.roles), state, f"{one.seq:,}", events, f"{one.lag:,}", fresh, loss)
    return table
