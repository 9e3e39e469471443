"""`tokenmill usage`, `ledger` and `projects`: what was used, whether it adds up, and who may use it.

They read and write the database of a mesh (`--database`); gateways need not run for it.
"""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

import typer

from deploy.database import Url, leave, opened, print_json, table

ledger_app = typer.Typer(no_args_is_help=True, help="The ledger of a mesh.")
projects_app = typer.Typer(no_args_is_help=True, help="Projects: the tenants in a mesh's database, and their limits.")

Json = Annotated[bool, typer.Option("--json", help="as JSON")]
NONE = "none"


@ledger_app.command()
def check(database: Url = "", json: Json = False) -> None:
    """Prove that the ledger adds up: exit code 0, or 1 with a sentence for each thing that does not."""
    import msgspec

    from gateway.state.books import Books
    from shared.pricing import shown

    with opened(database) as found:
        sums, problems = Books(found).check()
    money = {name: shown(getattr(sums, name)) for name in ("reserved", "settled", "released", "held")}
    if json:
        counts = {name: amount for name, amount in msgspec.structs.asdict(sums).items() if name not in money}
        print_json({"adds_up": not problems, **counts, **{f"{name}_usd": usd for name, usd in money.items()},
                    "problems": problems})
    else:
        typer.echo(f"{sums.entries} entries in {sums.leases} leases, {sums.open_leases} of them open\n"
                   f"{sums.requests} requests, {sums.prompt_tokens} tokens of prompts, {sums.generated_tokens} of "
                   f"answers\nreserved ${money['reserved']} = settled ${money['settled']} + released "
                   f"${money['released']} + held ${money['held']}")
        typer.echo("\n".join(problems) or "it adds up", err=bool(problems))
    if problems:
        raise SystemExit(1)


@ledger_app.command()
def sweep(database: Url = "", idle: Annotated[float, typer.Option(
        metavar="SECONDS", help="give back leases of gateways that were not heard of for so long")] = 600.0,
          json: Json = False) -> None:
    """Give back what gateways that are gone had set aside; living ones do this by themselves."""
    from gateway.state.books import Books
    from shared.pricing import shown

    now = round(datetime.now(UTC).timestamp() * 1000)
    with opened(database) as found:
        given_back = Books(found).sweep(now - round(1000 * idle), now)
    if json:
        print_json({"released_usd": shown(given_back)})
    else:
        typer.echo(f"${shown(given_back)} given back")


def usage(database: Url = "", since: Annotated[str, typer.Option(
        metavar="DAY", help="the first day, as 2026-11-01; default: of this month")] = "",
          until: Annotated[str, typer.Option(metavar="DAY", help="the last day; default: today")] = "",
          by: Annotated[str, typer.Option(metavar="NAMES", help="day, tenant, key, model, tier, region, outcome; split "
                                          "by commas")] = "tenant",
          tenant: Annotated[list[str] | None, typer.Option(metavar="NAME", help="of this one alone; may be given "
                                                           "several times")] = None,
          json: Json = False, csv: Annotated[bool, typer.Option("--csv", help="as CSV")] = False) -> None:
    """Show what was used, what was charged for it and what it cost."""
    from gateway.state import usage as sums

    today = datetime.now(UTC).date()
    first = _day(since) if since else today.replace(day=1)
    last = _day(until) if until else today
    names: list[Any] = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in sums.BY:
            leave(f"{name!r} is nothing to group by: use {', '.join(sums.BY)}")
    with opened(database) as found:
        try:
            lines = sums.usage(found, first, last, names, tenant, economics=True)
        except sums.TooMuch as error:
            leave(str(error))
    if json:
        print_json({"object": "usage", "since": first, "until": last, "by": names, "data": lines})
    elif csv:
        typer.echo(sums.as_csv(lines, names, economics=True), nl=False)
    elif not lines:
        typer.echo(f"nothing was used from {first} to {last}")
    else:
        figures = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "charged_usd", "cost_usd")
        cells = [[name.upper().replace("_", " ") for name in (*names, *figures, "margin")]]
        for line in lines:
            assert isinstance(line, sums.Economics)
            cells.append([*(str(getattr(line, name) or "-") for name in names),
                          *(str(getattr(line, name)) for name in figures),
                          "-" if line.margin is None else f"{100 * line.margin:.1f} %"])
        typer.echo(table(cells, len(figures) + 1))


@projects_app.command(name="list")
def list_projects(database: Url = "", json: Json = False) -> None:
    """Show all projects with their limits, and what they have spent."""
    import msgspec

    from gateway.ledger import month_of
    from gateway.state.books import Books
    from gateway.state.directory import Directory
    from shared.pricing import shown

    day = datetime.now(UTC).date().isoformat()
    with opened(database) as found:
        rows = [(project, Books(found).spent(project.name, day)) for project in Directory(found).projects()]
    if json:
        print_json({"projects": [
            msgspec.structs.asdict(project) | {
                "spend_per_day": _usd(project.spend_per_day), "spend_per_month": _usd(project.spend_per_month),
                "spent_today": shown(spent[day].spent), "spent_this_month": shown(spent[month_of(day)].spent)}
            for project, spent in rows]})
        return
    cells = [["ORGANISATION", "PROJECT", "REQUESTS/MIN", "TOKENS/MIN", "STREAMS", "$ TODAY", "OF", "$ THIS MONTH",
              "OF"]]
    for project, spent in rows:
        limits = (project.requests_per_minute, project.tokens_per_minute, project.concurrency)
        cells.append([project.organisation, project.name, *("-" if most is None else str(most) for most in limits),
                      shown(spent[day].spent), _usd(project.spend_per_day) or "-",
                      shown(spent[month_of(day)].spent), _usd(project.spend_per_month) or "-"])
    typer.echo(table(cells, 7))


@projects_app.command(name="set")
def set_project(
    name: Annotated[str, typer.Argument(metavar="PROJECT", help="made when there is none of that name")],
    database: Url = "",
    organisation: Annotated[str, typer.Option(metavar="NAME", help="of a new one; default: its own name")] = "",
    weight: Annotated[float | None, typer.Option(metavar="N", help="share of a full mesh")] = None,
    residency: Annotated[str, typer.Option(metavar="ZONES", help="zones split by commas, or any")] = "",
    models: Annotated[str, typer.Option(metavar="NAMES", help="split by commas, or none for no such limit")] = "",
    tiers: Annotated[str, typer.Option(metavar="NAMES", help="split by commas, or none for no such limit")] = "",
    requests_per_minute: Annotated[str, typer.Option(metavar="N", help="or none, as the next four")] = "",
    tokens_per_minute: Annotated[str, typer.Option(metavar="N", help="prompts and answers")] = "",
    concurrency: Annotated[str, typer.Option(metavar="N", help="streams under way")] = "",
    spend_per_day: Annotated[str, typer.Option(metavar="USD", help="as 5.00")] = "",
    spend_per_month: Annotated[str, typer.Option(metavar="USD", help="as 100.00")] = "",
    json: Json = False,
) -> None:
    """Make a project, or change what is named of the one there is; gateways know within a second or two."""
    from gateway.state.directory import Directory
    from shared.pricing import nanos

    changes: dict[str, Any] = {"organisation": organisation} if organisation else {}
    if weight is not None:
        changes["weight"] = weight
    if residency:
        changes["residency"] = "" if residency == "any" else residency
    for field, said in (("models", models), ("tiers", tiers)):
        if said:
            changes[field] = None if said == NONE else tuple(part.strip() for part in said.split(","))
    for field, said in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute),
                        ("concurrency", concurrency), ("spend_per_day", spend_per_day),
                        ("spend_per_month", spend_per_month)):
        if said:
            try:
                changes[field] = None if said == NONE else (nanos if field.startswith("spend") else int)(said)
            except ValueError:
                leave(f"--{field.replace('_', '-')}: {said!r} is no such limit: write a number, or none")
    with opened(database) as found:
        project = Directory(found).put_project(name, datetime.now(UTC), **changes)
    if json:
        print_json(project)
    else:
        typer.echo(f"{project.name} of {project.organisation}: `tokenmill keys create {project.name}` makes a key")


def _day(said: str) -> date:
    try:
        return date.fromisoformat(said)
    except ValueError:
        leave(f"{said!r} is no day: write it as {date.today() - timedelta(days=1)}")


def _usd(amount: int | None) -> str | None:
    from shared.pricing import shown

    return None if amount is None else shown(amount, 2)
