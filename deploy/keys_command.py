"""`tokenmill keys`: make, list, revoke and rotate the keys of a tenants file.

A new key goes to standard output, alone, and everything about it to standard error, so that `KEY=$(tokenmill keys
create acme)` works. With `--json` all of it is one document.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from deploy.paths import data_folder

if TYPE_CHECKING:
    from deploy.keys import Row

app = typer.Typer(no_args_is_help=True, help="Keys of the tenants that may use a mesh.")

File = Annotated[Path | None, typer.Option(
    "--tenants", metavar="FILE", envvar="TOKENMILL_TENANTS", show_envvar=False,
    help="the tenants file, as `tokenmill up --tenants` takes it; default: tenants.toml in the data folder")]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]
Expires = Annotated[str, typer.Option(metavar="WHEN", help="90d, 12h, 30m, or a date; default: never")]
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="the first letters of the key, as `list` shows them")]


@app.command()
def create(tenant: Annotated[str, typer.Argument(metavar="TENANT", help="who gets it; made when there is none")],
           tenants: File = None, expires: Expires = "", json: Json = False) -> None:
    """Make a key and show it, once."""
    from deploy import keys

    try:
        now, path = _now(), _path(tenants)
        row = keys.create(path, tenant, now, keys.until(expires, now))
    except keys.KeysFailed as error:
        _leave(str(error))
    _show_new(row, path, json)


@app.command(name="list")
def list_keys(tenants: File = None, json: Json = False) -> None:
    """Show whose keys there are, without the keys."""
    from deploy import keys

    try:
        rows = keys.listed(_path(tenants), _now())
    except keys.KeysFailed as error:
        _leave(str(error))
    if json:
        _print_json({"keys": rows})
    else:
        typer.echo("\n".join(_table(rows)))


@app.command()
def revoke(prefix: Prefix, tenants: File = None, json: Json = False) -> None:
    """Let a key open nothing any more; what runs ends."""
    from deploy import keys

    try:
        row = keys.revoke(_path(tenants), prefix, _now())
    except keys.KeysFailed as error:
        _leave(str(error))
    if json:
        _print_json(row)
    else:
        typer.echo(f"{row.prefix} of {row.tenant} is revoked; gateways know within a second or two")


@app.command()
def rotate(prefix: Prefix, tenants: File = None,
           expires: Annotated[str, typer.Option(metavar="WHEN", help="of the new one: 90d, 12h, 30m, or a date; "
                                                "default: it lives as long as the old one")] = "",
           overlap: Annotated[str, typer.Option(metavar="SPAN", help="how long the old one still opens, e.g. 24h; "
                                                "default: not at all")] = "0m",
           json: Json = False) -> None:
    """Make a key in the place of another, which ends."""
    from deploy import keys

    try:
        now, path = _now(), _path(tenants)
        row = keys.rotate(path, prefix, now, keys.until(expires, now), keys.span(overlap))
    except keys.KeysFailed as error:
        _leave(str(error))
    _show_new(row, path, json)


def _path(said: Path | None) -> Path:
    return said if said is not None else data_folder() / "tenants.toml"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _show_new(row: "Row", path: Path, json: bool) -> None:
    if json:
        _print_json(row)
        return
    typer.echo(row.key)
    ends = f"until {row.expires:%Y-%m-%d %H:%M} UTC" if row.expires else "without end"
    instead = f", instead of {row.replaces}" if row.replaces else ""
    typer.echo(f"a key of {row.tenant}, {ends}{instead}: it is not shown again, its prefix is {row.prefix}\n"
               f"gateways take it with --tenants {path}", err=True)


def _table(rows: "list[Row]") -> list[str]:
    cells = [["TENANT", "PREFIX", "STATE", "CREATED", "EXPIRES"], *(
        [row.tenant, row.prefix, row.state, *(f"{at:%Y-%m-%d %H:%M}" if at else "-" for at in (row.created,
                                                                                               row.expires))]
        for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _print_json(document: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


def _leave(reason: str) -> NoReturn:
    typer.echo(reason, err=True)
    raise SystemExit(1)
