"""Commands `tessera rollout`: versions and the users they serve. The registry holds all of it; servers follow it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tessera.settings import Settings
from tessera.terminal import JsonOption, ModelNameOption, err_console, out_console, print_json

if TYPE_CHECKING:
    from models.registry.release import Release
    from serving.rollout.judge import ArmView, ExperimentState, Judge

_MEASURES: "dict[str, Callable[[ArmView], str]]" = {
    "requests": lambda arm: f"{arm.requests:,}",
    "users": lambda arm: f"{arm.users:,}",
    "outcomes": lambda arm: f"{arm.outcomes:,}",
    "outcomes an answer": lambda arm: f"{arm.rate:.4f}",
    "failed": lambda arm: f"{arm.failed:.2%}",
    "empty": lambda arm: f"{arm.empty:.2%}",
    "p99": lambda arm: f"{arm.p99_ms:.1f} ms",
    "outcomes by prediction": lambda arm: _number(arm.calibration),
    "items hardly known": lambda arm: "–" if arm.novelty is None else f"{arm.novelty:.1%}",
    "kinds": lambda arm: ", ".join(f"{count:,} {kind}" for kind, count in arm.kinds.items()),
}
rollout = typer.Typer(no_args_is_help=True, help="Versions in service: champion, challenger, previous; experiments.")
PlannedOption = Annotated[int, typer.Option(min=100, help="Users of both arms at which the statistics are sharpest.")]
# Equal to `features.shown.message.CLICK`, which would load msgspec for every help.
_CLICK = "click"
OutcomeOption = Annotated[str, typer.Option(help="Outcomes that count: click, or another name of your outcomes.")]
HarmOption = Annotated[
    float, typer.Option(min=0, max=1, help="Allowed loss of the challenger's rate, as a share of the control's.")
]


@rollout.command("list")
def list_releases(model: ModelNameOption = None, json: JsonOption = False) -> None:
    """Show a model's versions, their bundles, aliases, and the reason for each ended challenge."""
    registry = Settings.from_environment().open_registry(create=False)
    releases = registry.releases(registry.resolve(model).model)
    ended = [registry.ended(release) for release in releases]
    if json:
        print_json(
            [
                {"version": release.version, "bundle": release.bundle, "aliases": release.aliases, "ended": reason}
                for release, reason in zip(releases, ended, strict=True)
            ]
        )
        return
    table = Table("version", "bundle", "aliases", "ended")
    for release, reason in zip(releases, ended, strict=True):
        table.add_row(release.version, release.bundle, ", ".join(release.aliases), reason)
    out_console.print(table)


@rollout.command()
def start(
    challenger: Annotated[str, typer.Option(help="Alias, version, or id of a bundle.")] = "challenger",
    share: Annotated[float, typer.Option(help="Share of the layer's users, above 0 and up to 1.")] = 0.1,
    ramp: Annotated[str | None, typer.Option(help="Shares by time: SECONDS:SHARE,… like 0:.01,3600:.1.")] = None,
    layer: Annotated[str, typer.Option(help="Experiments of one layer share its users without overlap.")] = "models",
    name: Annotated[str | None, typer.Option(help="Name of the experiment; by default model and version.")] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Rank without showing the rankings.")] = False,
    model: ModelNameOption = None,
) -> None:
    """Give the challenger's rankings to a share of the users."""
    from serving.rollout.lifecycle import parse_ramp, start

    registry = Settings.from_environment().open_registry(create=False)
    experiment = start(registry, model, challenger, parse_ramp(ramp, share), name=name, layer=layer, shadow=shadow)
    how = "in the shadow of" if shadow else "against"
    share_of_layer = f"{experiment.reserved:.1%} of layer {experiment.layer!r}"
    out_console.print(f"{experiment.name}: {experiment.challenger} {how} {experiment.control}, {share_of_layer}")


@rollout.command()
def status(
    model: ModelNameOption = None,
    outcome: OutcomeOption = _CLICK,
    planned: PlannedOption = 200_000,
    harm: HarmOption = 0.0,
    json: JsonOption = False,
) -> None:
    """Join impressions and outcomes, and show the state of the experiments; nothing is changed."""
    settings = Settings.from_environment()
    with _judge(settings, model, outcome, planned, harm, copy=True) as judge:
        _say_look(judge.look(), [], judge.aside, json=json)


@rollout.command()
def watch(
    model: ModelNameOption = None,
    outcome: OutcomeOption = _CLICK,
    planned: PlannedOption = 200_000,
    harm: HarmOption = 0.0,
    every_s: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, act on the result, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Judge repeatedly; roll back experiments that breach a guardrail, and record the reason."""
    from serving.rollout.look_log import LookLog
    from tessera.stream_service import until_stopped

    settings = Settings.from_environment()
    stopped = until_stopped()
    while not stopped.is_set():
        try:
            registry = settings.open_registry(create=False)
            looks = LookLog(registry, registry.resolve(model).model)
            with _judge(settings, model, outcome, planned, harm) as judge:
                while not stopped.is_set():
                    began = time.monotonic()
                    states = judge.look()
                    ended = judge.act(states)
                    for experiment, standing in zip(judge.experiments, states, strict=True):
                        looks.note(experiment, standing, time.time())
                    _say_look(states, ended, judge.aside, json=json)
                    if once:
                        return
                    stopped.wait(max(0.0, every_s - (time.monotonic() - began)))
        except Exception as error:
            # Log or registry are unavailable and raise any error. A judge that ends would roll nothing back.
            if once:
                raise
            message = f" {type(error).__name__}: {error}; tried again"
            err_console.print(Text.assemble(("no look", "yellow"), message), soft_wrap=True)
            stopped.wait(every_s)


@rollout.command()
def stop(
    name: Annotated[str, typer.Argument(help="Name of the experiment.")],
    why: Annotated[str, typer.Option(help="Reason; shown with the challenger.")] = "stopped by hand",
    model: ModelNameOption = None,
) -> None:
    """End an experiment: its users get the champion."""
    from models.registry.release import CHALLENGER
    from serving.rollout.lifecycle import stop

    release = stop(Settings.from_environment().open_registry(create=False), model, name, why=why)
    now = "stays the challenger" if CHALLENGER in release.aliases else "is no challenger any more"
    out_console.print(f"{name}: ended; {release.model} version {release.version} {now}")


@rollout.command()
def report(
    name: Annotated[str, typer.Argument(help="Name of a running or ended experiment.")],
    html: Annotated[Path | None, typer.Option(help="File of the page.")] = None,
    model: ModelNameOption = None,
    outcome: OutcomeOption = _CLICK,
    planned: PlannedOption = 200_000,
    harm: HarmOption = 0.0,
    json: JsonOption = False,
) -> None:
    """Report on an experiment; the page and the figures are kept with the challenger's run in MLflow."""
    import tempfile

    from serving.rollout.guardrails import Guardrails
    from serving.rollout.judge import familiar_items, interval_text
    from serving.rollout.report import report
    from tessera.pages.rollout_page import write_page

    settings = Settings.from_environment()
    registry = settings.open_registry(create=False)

    def known(bundle: str) -> dict[str, int]:
        opened = registry.open(registry.release(model, bundle), settings.bundles)
        counts = opened.history.group_by("user_id").len()
        visits = dict(zip(counts["user_id"].to_list(), counts["len"].to_list(), strict=True))
        return dict.fromkeys(opened.users["user_id"].to_list(), 0) | visits

    with contextlib.closing(settings.open_log()) as log:
        rule = Guardrails(outcome=outcome, planned=planned, harm=harm)
        familiar = familiar_items(registry, model, settings.bundles)
        document = report(registry, log, settings.topics, name, model=model, rule=rule, known=known, familiar=familiar)
    with tempfile.TemporaryDirectory() as aside:
        page = html or Path(aside) / "rollout.html"
        write_page(document, page)
        release = registry.release(document["model"], document["challenger"])
        registry.documents.put(release, f"rollout-{name}.json", document)
        registry.documents.put_page(release, f"rollout-{name}.html", page.read_text(encoding="utf-8"))
    if json:
        print_json(document)
    else:
        last = document["points"][-1]
        out_console.print(f"{name}: {document['decision']}")
        out_console.print(f"  difference {last['estimate']:+.4f}, {interval_text(last['low'], last['high'])}")
        if html is not None:
            out_console.print(f"page     {html.absolute()}")


@rollout.command()
def promote(
    name: Annotated[str, typer.Argument(help="Alias, version, or id of a bundle.")] = "challenger",
    model: ModelNameOption = None,
) -> None:
    """Make a release the champion; the previous champion becomes `previous`, and experiments against it end."""
    from serving.rollout.lifecycle import promoted

    registry = Settings.from_environment().open_registry(create=False)
    _say(promoted(registry, registry.release(model, name)))


@rollout.command()
def rollback(model: ModelNameOption = None) -> None:
    """Make the previous champion the champion again."""
    from models.registry.release import PREVIOUS
    from serving.rollout.lifecycle import promoted

    registry = Settings.from_environment().open_registry(create=False)
    _say(promoted(registry, registry.release(model, PREVIOUS)))


@contextlib.contextmanager
def _judge(
    settings: Settings, model: str | None, outcome: str, planned: int, harm: float, *, copy: bool = False
) -> "Iterator[Judge]":
    from serving.rollout.guardrails import Guardrails
    from serving.rollout.judge import familiar_items, judging, ledger_path

    registry = settings.open_registry(create=False)
    rule = Guardrails(outcome=outcome, planned=planned, harm=harm)
    familiar = familiar_items(registry, model, settings.bundles)
    topics = settings.topics
    path = ledger_path(settings.home, settings.kafka, topics, registry.resolve(model).model, rule)
    with contextlib.closing(settings.open_log()) as log:
        with judging(registry, log, topics, model=model, rule=rule, familiar=familiar, ledger=path, copy=copy) as judge:
            yield judge


def _say_look(
    states: "Sequence[ExperimentState]", ended: "Sequence[Release]", aside: dict[str, int], *, json: bool
) -> None:
    if json:
        print_json({"experiments": states, "aside": aside, "rolled_back": [release.bundle for release in ended]})
        return
    _show(states, aside)
    for release in ended:
        err_console.print(Text.assemble(("rolled back", "red"), f" {release.model} version {release.version}"))


def _show(states: "Sequence[ExperimentState]", aside: dict[str, int]) -> None:
    from serving.rollout.judge import interval_text

    if not states:
        out_console.print("no experiment runs")
    for state in states:
        title = f"{state.experiment}: {state.challenger} against {state.control}, {state.share:.1%} of the users"
        out_console.print(title + (", in the shadow" if state.shadow else ""), soft_wrap=True)
        if not state.shadow:
            out_console.print(_arms_table(state.arms))
        if state.shadow:
            rates = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in state.shadowed.items())
            out_console.print(f"  {rates}")
        else:
            since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(state.since))
            out_console.print(
                f"  since {since}: difference {state.estimate:+.4f}, {interval_text(state.low, state.high)}; "
                f"split p {state.split_p:.2g}"
            )
        for breach in state.breaches:
            out_console.print(Text.assemble("  ", ("breach", "red"), f" {breach}"))
    if aside:
        out_console.print("quarantined: " + ", ".join(f"{count:,} {why}" for why, count in aside.items()))


def _arms_table(arms: "dict[str, ArmView]") -> Table:
    table = Table("")
    for name in arms:
        table.add_column(name, justify="right")
    for label, shown in _MEASURES.items():
        table.add_row(label, *(shown(arm) for arm in arms.values()))
    return table


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _say(release: "Release") -> None:
    aliases = ", ".join(release.aliases)
    out_console.print(f"{release.model} version {release.version}, bundle {release.bundle}: {aliases}")
