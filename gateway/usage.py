"""`GET /v1/usage`: what a tenant, or the projects of an organisation, used and were charged.

Rules: who asks sees its own: a project's key its project, a person's key the projects of its organisation, or all. What
it cost us, and what is left of the price, is for people who look after all.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from starlette.responses import Response

from gateway.openai.common import encode
from gateway.tenants import Tenant
from shared.errors import BadRequest, MeshUnavailable, MillError, PermissionDenied

if TYPE_CHECKING:
    from gateway.state.database import Database
    from gateway.state.usage import By

MOST_DAYS = 366
BY = ("day", "tenant", "key", "model", "tier", "region", "outcome")


class NoLedger(MillError):
    status, type, code = 404, "invalid_request_error", "no_ledger"


class Asked(NamedTuple):
    """Days, both counted in; what to group by; which tenant alone (empty: all that may be seen)."""

    since: date
    until: date
    by: tuple[str, ...]
    tenant: str
    csv: bool


def asked_usage(query: Mapping[str, str], wall_s: float) -> Asked:
    """What the query of a request asks for. Raises BadRequest."""
    today = datetime.fromtimestamp(wall_s, UTC).date()
    since, until = _day(query, "since", today - timedelta(days=29)), _day(query, "until", today)
    if not 0 <= (until - since).days < MOST_DAYS:
        raise BadRequest(f"from {since} to {until} is not 1 to {MOST_DAYS} days", param="until")
    by = tuple(dict.fromkeys(name.strip() for name in query.get("by", "day").split(",") if name.strip()))
    for name in by:
        if name not in BY:
            raise BadRequest(f"{name!r} is nothing to group by: use {', '.join(BY)}", param="by")
    if query.get("format", "json") not in ("json", "csv"):
        raise BadRequest("format is json or csv", param="format")
    return Asked(since, until, by, query.get("tenant", ""), query.get("format") == "csv")


async def told_usage(database: "Database", who: Tenant, asked: Asked) -> Response:
    """The answer. Raises PermissionDenied, MeshUnavailable, BadRequest."""
    try:
        return await asyncio.to_thread(_told, database, who, asked)
    except ValueError as error:
        from gateway.state.database import DatabaseFailed

        if isinstance(error, DatabaseFailed):
            raise MeshUnavailable("the ledger does not answer: retry later", retry_after_s=2.0) from error
        raise BadRequest(str(error)) from None


def _told(database: "Database", who: Tenant, asked: Asked) -> Response:
    from gateway.state import usage

    by = cast("tuple[By, ...]", asked.by)
    economics = who.role is not None and not who.organisation
    seen = None if economics else [who.name] if who.role is None else usage.projects_of(database, who.organisation)
    if asked.tenant:
        if seen is not None and asked.tenant not in seen:
            raise PermissionDenied(f"this key may not see what {asked.tenant!r} used", param="tenant")
        seen = [asked.tenant]
    lines = usage.usage(database, asked.since, asked.until, by, seen, economics)
    if asked.csv:
        name = f"usage-{asked.since}-{asked.until}.csv"
        return Response(usage.as_csv(lines, by, economics), headers={
            "content-type": "text/csv; charset=utf-8", "content-disposition": f'attachment; filename="{name}"'})
    document: dict[str, Any] = {"object": "usage", "since": asked.since, "until": asked.until, "by": asked.by,
                                "currency": "USD", "data": lines}
    return Response(encode(document), headers={"content-type": "application/json"})


def _day(query: Mapping[str, str], name: str, default: date) -> date:
    try:
        return date.fromisoformat(query[name]) if query.get(name) else default
    except ValueError:
        raise BadRequest(f"{query[name]!r} is no day: write it as 2026-11-27", param=name) from None
