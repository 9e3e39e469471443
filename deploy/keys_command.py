"""`tokenmill keys`: make, list, revoke and rotate the keys of a tenants file, or of a database.

A new key goes to standard output, alone, and everything about it to standard error, so that `KEY=$(tokenmill keys
create acme)` works. With `--json` all of it is one document. A tenants file that is named
goes before a database, as it does for gateways.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.database import Url, leave, opened, print_json, table
from deploy.paths import data_folder

if TYPE_CHECKING:
    from deploy.keys import Row
    from gateway.state.directory import Shown

app = typer.Typer(no_args_is_help=True, help="Keys of the tenants that may use a mesh.")

File = Annotated[Path | None, typer.Option(
    "--tenants", metavar="FILE", envvar="TOKENMILL_TENANTS", show_envvar=False,
    help="the tenants file, as `tokenmill up --tenants` takes it; default: tenants.toml in the data folder")]
Json = Annotated[bool, typer.Option("--json", help="as JSON")]
Expires = Annotated[str, typer.Option(metavar="WHEN", help="90d, 12h, 30m, or a date; default: never")]
Scopes = Annotated[list[str] | None, typer.Option(
    "--scope", metavar="NAME", help="generate or usage; may be given several times; default: both; of a database")]
Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="the first letters of the key, as `list` shows them")]


@app.command()
def create(tenant: Annotated[str, typer.Argument(metavar="TENANT", help="who gets it; made when there is none")],
           tenants: File = None, database: Url = "", expires: Expires = "", scope: Scopes = None,
           json: Json = False) -> None:
    """Make a key and show it, once."""
    from deploy import keys

    try:
        now, path = _now(), _path(tenants)
        ends = keys.until(expires, now)
        if _in_database(tenants, database):
            with opened(database) as found:
                from gateway.state.directory import Directory

                row = _row(Directory(found).create_key(tenant, now, ends, scope))  # type: ignore[arg-type]
                _show_new(row, f"--database {found.name}", json)
            return
        if scope:
            leave("scopes are of keys in a database: --database URL")
        row = keys.create(path, tenant, now, ends)
    except keys.KeysFailed as error:
        leave(str(error))
    _show_new(row, f"--tenants {path}", json)


@app.command()
def admin(role: Annotated[str, typer.Argument(metavar="ROLE", help="owner, admin, billing or viewer")],
          organisation: Annotated[str, typer.Option(metavar="NAME", help="where; default: in all")] = "",
          database: Url = "", expires: Expires = "", json: Json = False) -> None:
    """Make a key for somebody who looks after an organisation: it reads usage and asks no model."""
    from deploy import keys

    try:
        now = _now()
        ends = keys.until(expires, now)
    except keys.KeysFailed as error:
        leave(str(error))
    with opened(database) as found:
        from gateway.state.directory import Directory

        made = Directory(found).create_admin(role, organisation or None, now, ends)  # type: ignore[arg-type]
        _show_new(_row(made), f"--database {found.name}", json)


@app.command(name="list")
def list_keys(tenants: File = None, database: Url = "", json: Json = False) -> None:
    """Show whose keys there are, without the keys."""
    from deploy import keys

    if _in_database(tenants, database):
        with opened(database) as found:
            from gateway.state.directory import Directory

            rows = [_row(shown) for shown in Directory(found).keys(_now())]
    else:
        try:
            rows = keys.listed(_path(tenants), _now())
        except keys.KeysFailed as error:
            leave(str(error))
    if json:
        print_json({"keys": rows})
    else:
        typer.echo(_table(rows))


@app.command()
def revoke(prefix: Prefix, tenants: File = None, database: Url = "", json: Json = False) -> None:
    """Let a key open nothing any more; what runs ends."""
    from deploy import keys

    if _in_database(tenants, database):
        with opened(database) as found:
            from gateway.state.directory import Directory

            row = _row(Directory(found).revoke(prefix, _now()))
    else:
        try:
            row = keys.revoke(_path(tenants), prefix, _now())
        except keys.KeysFailed as error:
            leave(str(error))
    if json:
        print_json(row)
    else:
        typer.echo(f"{row.prefix} of {row.tenant} is revoked; gateways know within a second or two")


@app.command()
def rotate(prefix: Prefix, tenants: File = None, database: Url = "",
           expires: Annotated[str, typer.Option(metavar="WHEN", help="of the new one: 90d, 12h, 30m, or a date; "
                                                "default: it lives as long as the old one")] = "",
           overlap: Annotated[str, typer.Option(metavar="SPAN", help="how long the old one still opens, e.g. 24h; "
                                                "default: not at all")] = "0m",
           json: Json = False) -> None:
    """Make a key in the place of another, which ends."""
    from deploy import keys

    try:
        now, path = _now(), _path(tenants)
        ends, overlapping = keys.until(expires, now), keys.span(overlap)
        if _in_database(tenants, database):
            with opened(database) as found:
                from gateway.state.directory import Directory

                row = _row(Directory(found).rotate(prefix, now, ends, overlapping))
                _show_new(row, f"--database {found.name}", json)
            return
        row = keys.rotate(path, prefix, now, ends, overlapping)
    except keys.KeysFailed as error:
        leave(str(error))
    _show_new(row, f"--tenants {path}", json)


def _in_database(tenants: Path | None, database: str) -> bool:
    return tenants is None and bool(database)


def _row(shown: "Shown") -> "Row":
    from deploy.keys import Row

    owner = shown.owner if shown.role is None else f"{shown.role} of {'all' if shown.owner == '*' else shown.owner}"
    return Row(owner, shown.prefix, shown.state, shown.created, shown.expires, shown.key, shown.replaces,
               None if shown.scopes is None else list(shown.scopes))


def _path(said: Path | None) -> Path:
    return said if said is not None else data_folder() / "tenants.toml"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _show_new(row: "Row", where: str, json: bool) -> None:
    if json:
        print_json(row)
        return
    typer.echo(row.key)
    ends = f"until {row.expires:%Y-%m-%d %H:%M} UTC" if row.expires else "without end"
    instead = f", instead of {row.replaces}" if row.replaces else ""
    typer.echo(f"a key of {row.tenant}, {ends}{instead}: it is not shown again, its prefix is {row.prefix}\n"
               f"gateways take it with {where}", err=True)


def _table(rows: "list[Row]") -> str:
    cells = [["TENANT", "PREFIX", "STATE", "CREATED", "EXPIRES"], *(
        [row.tenant, row.prefix, row.state, *(f"{at:%Y-%m-%d %H:%M}" if at else "-" for at in (row.created,
                                                                                               row.expires))]
        for row in rows)]
    return table(cells)
