"""`tessera export`: features, vectors and Semantic IDs of a run or a bundle, for other systems."""

from pathlib import Path
from typing import Annotated, Any

import typer

from features.errors import TesseraError
from features.storage.location import absolute, locate
from tessera.terminal import JsonOption, err_console, out_console, print_json

_BY = ("split", "date")
_ONLINE = ("sqlite", "redis")


def export(
    source: Annotated[Path, typer.Argument(help="The --out of `tessera run` or `tessera features`, or a bundle.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="DIRECTORY",
            help="Directory of the export, or an address such as s3://bucket/export; an earlier export is replaced.",
        ),
    ] = "export",
    by: Annotated[str, typer.Option("--by", help="Partition the examples by split or by date.")] = "split",
    buckets: Annotated[
        int | None, typer.Option("--buckets", min=1, help="Hash partitions of items and users; by default by rows.")
    ] = None,
    feast: Annotated[
        Path | None, typer.Option("--feast", help="Also write a Feast repository with views of the export there.")
    ] = None,
    online: Annotated[
        str, typer.Option("--online", help="Online store of a new repository: sqlite, or redis at TESSERA_REDIS.")
    ] = "sqlite",
    materialize: Annotated[
        str | None,
        typer.Option("--materialize", help="Feast's command: apply the repository and fill its online store."),
    ] = None,
    redis: Annotated[
        bool, typer.Option("--redis", help="Also put items, users and histories into TESSERA_REDIS, as hashes.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write features, vectors and Semantic IDs as parquet, and on request for Feast and as Redis hashes."""
    address = _checked(by, online, feast, materialize, redis)
    destination = absolute(locate(out))
    if not isinstance(destination, Path) and (feast is not None or redis):
        raise TesseraError(f"--out {out}: --feast and --redis read an export on this disk; give --out a directory")
    from rich.progress import Progress

    from models.export import feast as repositories
    from models.export.write import write_export
    from tessera.export_source import open_source

    with Progress(console=err_console) as bar:
        writing = bar.add_task("parquet")
        schema = write_export(
            open_source(source),
            destination,
            by="date" if by == "date" else "split",
            buckets=buckets,
            progress=lambda done, total: bar.update(writing, completed=done, total=total),
        )
        report: dict[str, Any] = {
            "id": schema.id,
            "out": str(destination),
            "rows": {name: table.rows for name, table in schema.tables.items()},
        }
        if feast is not None and isinstance(destination, Path):
            store = address if online == "redis" else None
            files = repositories.write_repository(schema, destination, feast, redis=store)
            report["feast"] = [str(path.absolute()) for path in files]
            if materialize is not None:
                repositories.materialize(materialize, feast)
        if redis and isinstance(destination, Path):
            from serving.store.redis.feature_hashes import features_key, push_export

            pushing = bar.add_task("redis")
            report["hashes"] = push_export(
                address, destination, progress=lambda done, total: bar.update(pushing, completed=done, total=total)
            )
            report["current"] = features_key(schema.name, "current")
    if json:
        print_json(report)
        return
    for name, rows in report["rows"].items():
        out_console.print(f"{name:<10} {rows:>12,} rows")
    out_console.print(f"export     {schema.id} in {report['out']}")
    for path in report.get("feast", ()):
        out_console.print(f"feast      {path}", soft_wrap=True)
    if feast is not None and materialize is None:
        out_console.print(
            f"           cd {feast} && feast apply && feast materialize {repositories.SINCE} $(date -u +%FT%T)"
        )
    if redis:
        out_console.print(f"redis      {report['hashes']:,} hashes; {report['current']} names the export")


def _checked(by: str, online: str, feast: Path | None, materialize: str | None, redis: bool) -> str:
    """Returns the address of Redis where it is needed.

    Raises:
        TesseraError: An option has no such value, or needs another option or setting.
    """
    for option, value, valid in (("--by", by, _BY), ("--online", online, _ONLINE)):
        if value not in valid:
            raise TesseraError(f"{option} {value}: expected {' or '.join(valid)}")
    if feast is None and (materialize is not None or online != "sqlite"):
        raise TesseraError("--online and --materialize are about a Feast repository: name it by --feast DIRECTORY")
    if not redis and online != "redis":
        return ""
    from tessera.settings import Settings

    address = Settings.from_environment().redis
    if not address:
        raise TesseraError("TESSERA_REDIS is not set; set TESSERA_REDIS=redis://host:port/db, the server to write to")
    return address
