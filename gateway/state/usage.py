"""What was used: the ledger's settled requests, summed by day and whatever else is asked.

Rules: sums of whole numbers, made by the database; a day is one of UTC, and a request is of the day on which it was
reserved. Everything here may wait.
"""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from datetime import date
from typing import Any, Literal

from msgspec import Struct
from sqlalchemy import func, select

from gateway.state.database import Database
from gateway.state.tables import ledger, projects
from shared.pricing import shown

By = Literal["day", "tenant", "key", "model", "tier", "region", "outcome"]
BY: tuple[By, ...] = ("day", "tenant", "key", "model", "tier", "region", "outcome")
MOST_ROWS = 10_000


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sums of requests that are alike in what they were grouped by; the rest of that is None. Money in dollars."""

    day: str | None = None
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    tier: str | None = None
    region: str | None = None
    outcome: str | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_draft_tokens: int
    charged_usd: str


class Economics(Line, frozen=True, kw_only=True, omit_defaults=True):
    """The same with what only who runs the mesh may know: `cost_usd` of the requests of which it is known."""

    cost_usd: str
    margin: float | None = None  # of those requests; None: nothing was charged for them
    requests_without_cost: int = 0
    worker_s: float = 0.0


class TooMuch(ValueError):
    """More lines than anybody gets at once."""


def usage(database: Database, since: date, until: date, by: Sequence[By] = ("day",),
          tenants: Collection[str] | None = None, economics: bool = False) -> list[Line]:
    """From day `since` to day `until`, both counted in; of these tenants, None: of all.

    Raises TooMuch, DatabaseFailed.
    """
    columns = [ledger.c[name] for name in by]
    known = ledger.c.cost.is_not(None)
    wanted = select(
        *columns, func.count().label("requests"),
        *(func.sum(ledger.c[name]).label(name) for name in (
            "prompt_tokens", "cached_tokens", "generated_tokens", "draft_tokens", "accepted_draft_tokens", "amount",
            "worker_us")),
        func.sum(ledger.c.cost).label("cost"), func.sum(ledger.c.amount).filter(known).label("amount_known"),
        func.count().filter(~known).label("without"),
    ).where(ledger.c.kind == "settle", ledger.c.day >= since.isoformat(), ledger.c.day <= until.isoformat())
    if tenants is not None:
        wanted = wanted.where(ledger.c.tenant.in_(list(tenants)))
    if columns:
        wanted = wanted.group_by(*columns).order_by(*columns)
    else:
        wanted = wanted.having(func.count() > 0)
    with database.reading() as connection:
        rows = connection.execute(wanted.limit(MOST_ROWS + 1)).all()
    if len(rows) > MOST_ROWS:
        raise TooMuch(f"this comes to more than {MOST_ROWS} lines: ask for fewer days, or group by less")
    return [_line(row, by, economics) for row in rows]


def projects_of(database: Database, organisation: str) -> list[str]:
    """Its projects. Raises DatabaseFailed."""
    with database.reading() as connection:
        return list(connection.scalars(select(projects.c.name).where(projects.c.organisation == organisation)))


def as_csv(lines: Iterable[Line], by: Sequence[By], economics: bool = False) -> str:
    """With a line of names."""
    kind = Economics if economics else Line
    names = [*by, *(name for name in kind.__struct_fields__ if name not in BY)]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for line in lines:
        writer.writerow([_cell(getattr(line, name)) for name in names])
    return out.getvalue()


def _line(row: Any, by: Sequence[By], economics: bool) -> Line:
    told: dict[str, Any] = {name: getattr(row, name) for name in (
        *by, "requests")} | {name: int(getattr(row, name)) for name in (
            "prompt_tokens", "cached_tokens", "generated_tokens", "draft_tokens", "accepted_draft_tokens")}
    told["charged_usd"] = shown(int(row.amount))
    if not economics:
        return Line(**told)
    cost, earned = int(row.cost or 0), int(row.amount_known or 0)
    return Economics(**told, cost_usd=shown(cost), margin=round(1 - cost / earned, 6) if earned else None,
                     requests_without_cost=row.without, worker_s=int(row.worker_us) / 1_000_000)


def _cell(value: Any) -> Any:
    # a spreadsheet takes what begins so for a formula, and clients name some of these
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else "" if value is None else value
