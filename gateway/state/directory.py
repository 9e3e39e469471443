"""Who may ask, in a database: organisations, their projects, and keys of both.

A project is a tenant of the mesh. Keys of a project let it ask; keys of people have a role in an organisation, or in
all.
Rules: a key leaves here once, when it is made, and only its SHA-256 is kept; what a gateway would refuse is never
written; each change counts the revision up, by which gateways see that there is something new. Everything here may
wait.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import Connection, Row, insert, select, update

from gateway.state.database import Database, DatabaseFailed
from gateway.state.tables import keys, organisations, projects, settings
from gateway.tenants import (
    PREFIX_LETTERS,
    ROLES,
    SCOPES,
    Key,
    Limits,
    Role,
    Scope,
    Tenant,
    Tenants,
    check_name,
    digest,
    new_key,
)
from shared.blocks import tenant_salt
from shared.residency import parse
from shared.tiers import LEAST_WEIGHT, MOST_WEIGHT, TIERS, Tier

MOST = 1 << 53  # what a float counts exactly: buckets are floats
LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class Refused(ValueError):
    """One sentence on why nothing was changed."""


class Project(Struct, frozen=True, kw_only=True):
    """A tenant as people set it up. Money in nano-dollars; None: no limit, all models, all tiers."""

    name: str
    organisation: str
    weight: float = 1.0
    residency: str = ""
    models: tuple[str, ...] | None = None
    tiers: tuple[Tier, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    spend_per_day: int | None = None
    spend_per_month: int | None = None


class Shown(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A key as it is shown; `key`: the key itself, once."""

    owner: str  # the project, or the organisation in which it has its role; * for all of them
    prefix: str
    state: str  # valid, expired, revoked
    created: datetime
    expires: datetime | None = None
    role: Role | None = None
    scopes: tuple[Scope, ...] | None = None
    key: str = ""
    replaces: str = ""


class Directory:
    """Everybody in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def revision(self) -> int:
        """Another one after each change. Raises DatabaseFailed."""
        with self._database.reading() as connection:
            return int(_setting(connection, "revision"))

    def tenants(self) -> tuple[int, Tenants]:
        """The revision, and everybody who may ask. Raises DatabaseFailed."""
        with self._database.reading() as connection:
            revision = int(_setting(connection, "revision"))
            secret = sha256(_setting(connection, "secret").encode()).digest()
            found: dict[str, list[Key]] = {}
            people: list[tuple[Key, Role, str]] = []
            for row in connection.execute(select(keys)):
                key = _key(row)
                if row.project is None:
                    people.append((key, row.role, row.organisation or ""))
                else:
                    found.setdefault(row.project, []).append(key)
            listed = [_tenant(row, tuple(found.get(row.name, ())), secret)
                      for row in connection.execute(select(projects).order_by(projects.c.name))]
        return revision, Tenants(listed, people=people)

    def projects(self) -> list[Project]:
        """All, by organisation. Raises DatabaseFailed."""
        with self._database.reading() as connection:
            return [_project(row) for row in connection.execute(
                select(projects).order_by(projects.c.organisation, projects.c.name))]

    def put_project(self, name: str, now: datetime, **changes: Any) -> Project:
        """Make a project, or change what `changes` names of the one there is. Raises Refused, DatabaseFailed.

        A new one is of the organisation of that name, or of one with its own name, which is made with it.
        """
        with self._database.writing() as connection:
            row = connection.execute(select(projects).where(projects.c.name == name).with_for_update()).one_or_none()
            if row is None:
                wanted = replace(Project(name=_checked(name), organisation=name), **changes)
            else:
                if changes.get("organisation", row.organisation) != row.organisation:
                    raise Refused(f"{name} is a project of {row.organisation}, and stays one: make another")
                wanted = replace(_project(row), **changes)
            values = _values(wanted)
            if row is None:
                self._need_organisation(connection, wanted.organisation, now)
                connection.execute(insert(projects).values(created=_ms(now), **values))
            else:
                connection.execute(update(projects).where(projects.c.name == name).values(**values))
            _count_up(connection)
        return wanted

    def create_key(self, project: str, now: datetime, expires: datetime | None = None,
                   scopes: Sequence[Scope] | None = None) -> Shown:
        """A new key for a project, which is made when there is none of that name. Raises Refused, DatabaseFailed."""
        with self._database.writing() as connection:
            if connection.scalar(select(projects.c.name).where(projects.c.name == project)) is None:
                self._need_organisation(connection, _checked(project), now)
                connection.execute(insert(projects).values(created=_ms(now), **_values(
                    Project(name=project, organisation=project))))
            return self._add(connection, now, expires, project=project, scopes=_scopes(scopes))

    def create_admin(self, role: Role, organisation: str | None, now: datetime,
                     expires: datetime | None = None) -> Shown:
        """A new key for somebody with this role in an organisation, or in all. Raises Refused, DatabaseFailed."""
        if role not in ROLES:
            raise Refused(f"{role!r} is no role: use {', '.join(ROLES)}")
        with self._database.writing() as connection:
            if organisation is not None and connection.scalar(
                    select(organisations.c.name).where(organisations.c.name == organisation)) is None:
                raise Refused(f"there is no organisation {organisation!r}: a project of it makes it")
            return self._add(connection, now, expires, role=role, organisation=organisation)

    def keys(self, now: datetime) -> list[Shown]:
        """All, by project. Raises DatabaseFailed."""
        with self._database.reading() as connection:
            return [_shown(row, now) for row in connection.execute(
                select(keys).order_by(keys.c.project, keys.c.created, keys.c.prefix))]

    def revoke(self, prefix: str, now: datetime) -> Shown:
        """This key opens nothing any more. Raises Refused, DatabaseFailed."""
        with self._database.writing() as connection:
            row = self._find(connection, prefix)
            if row.revoked is None:
                connection.execute(update(keys).where(keys.c.prefix == row.prefix).values(revoked=_ms(now)))
                _count_up(connection)
            return _shown(self._find(connection, prefix), now)

    def rotate(self, prefix: str, now: datetime, expires: datetime | None = None,
               overlap: timedelta = timedelta()) -> Shown:
        """A new key in the place of this one, which ends after `overlap`. Raises Refused, DatabaseFailed.

        Without `expires` the new one lives as long as the old one was given to live.
        """
        with self._database.writing() as connection:
            row = self._find(connection, prefix)
            old = _shown(row, now)
            if old.state != "valid":
                raise Refused(f"the key {old.prefix} is {old.state}: make another with `tokenmill keys create "
                              f"{old.owner}`")
            if expires is None and old.expires is not None:
                expires = _after(now, old.expires - old.created)
            last = _after(now, overlap) if old.expires is None else min(old.expires, _after(now, overlap))
            connection.execute(update(keys).where(keys.c.prefix == row.prefix).values(
                **({"expires": _ms(last)} if overlap else {"revoked": _ms(now)})))
            return self._add(connection, now, expires, project=row.project, role=row.role,
                             organisation=row.organisation, scopes=row.scopes, replaces=row.prefix)

    def _add(self, connection: Connection, now: datetime, expires: datetime | None, **values: Any) -> Shown:
        key = new_key()
        while connection.scalar(select(keys.c.prefix).where(keys.c.prefix == key[:PREFIX_LETTERS])) is not None:
            key = new_key()
        prefix = key[:PREFIX_LETTERS]
        connection.execute(insert(keys).values(
            prefix=prefix, sha256=digest(key), created=_ms(now), expires=None if expires is None else _ms(expires),
            **values))
        _count_up(connection)
        shown = _shown(self._find(connection, prefix), now)
        return replace(shown, key=key)

    def _find(self, connection: Connection, prefix: str) -> Row[Any]:
        row = connection.execute(select(keys).where(keys.c.prefix == prefix[:PREFIX_LETTERS])).one_or_none()
        if row is None:
            raise Refused(f"there is no key with the prefix {prefix[:PREFIX_LETTERS]!r}: `tokenmill keys list` shows "
                          "them")
        return row

    def _need_organisation(self, connection: Connection, name: str, now: datetime) -> None:
        if connection.scalar(select(organisations.c.name).where(organisations.c.name == _checked(name))) is None:
            connection.execute(insert(organisations).values(name=name, created=_ms(now)))


class DirectorySource:
    """A gateway's view of it (`gateway.access.Source`): read again when the revision has changed."""

    def __init__(self, database: Database) -> None:
        self._directory = Directory(database)
        self._read: int | None = None

    def changed(self) -> bool:
        """Whether it is worth asking: always, for to know it means to wait."""
        return True

    def read(self) -> Tenants | None:
        """Everybody in it; None: as before. Raises ValueError."""
        if self._read is not None and self._directory.revision() == self._read:
            return None
        self._read = None
        revision, found = self._directory.tenants()
        self._read = revision
        return found


# --- rows ------------------------------------------------------------------------------------------------------------


def _tenant(row: Row[Any], its: tuple[Key, ...], secret: bytes) -> Tenant:
    project = _project(row)
    return Tenant(project.name, tenant_salt(secret, project.name), project.weight, parse(project.residency),
                  project.models, project.tiers or TIERS,
                  Limits(project.requests_per_minute, project.tokens_per_minute, project.concurrency,
                         project.spend_per_day, project.spend_per_month), its, project.organisation)


def _project(row: Row[Any]) -> Project:
    return Project(
        name=row.name, organisation=row.organisation, weight=row.weight, residency=row.residency,
        models=_split(row.models), tiers=_split(row.tiers), requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute, concurrency=row.concurrency, spend_per_day=row.spend_per_day,
        spend_per_month=row.spend_per_month)


def _values(project: Project) -> dict[str, Any]:
    """Columns of a project. Raises Refused for what a gateway would refuse."""
    try:
        parse(project.residency)
    except ValueError as error:
        raise Refused(f"residency: {error}") from None
    if not LEAST_WEIGHT <= project.weight <= MOST_WEIGHT:
        raise Refused(f"weight: {project.weight:g} is not from {LEAST_WEIGHT} to {MOST_WEIGHT:g}")
    for tier in project.tiers or ():
        if tier not in TIERS:
            raise Refused(f"tiers: {tier!r} is none: use {', '.join(TIERS)}")
    for model in project.models or ():
        if not re.fullmatch(r"[^\s,]+", model):
            raise Refused(f"models: {model!r} can be no model's name")
    for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        if (most := getattr(project, field)) is not None and not 1 <= most <= MOST:
            raise Refused(f"{field}: {most} is not from 1 to {MOST}")
    for field in ("spend_per_day", "spend_per_month"):
        if (most := getattr(project, field)) is not None and not 0 <= most < 1 << 62:
            raise Refused(f"{field}: {most} nano-dollars is no limit")
    return {"name": project.name, "organisation": project.organisation, "weight": project.weight,
            "residency": project.residency, "models": _joined(project.models), "tiers": _joined(project.tiers),
            **{field: getattr(project, field) for field in (
                "requests_per_minute", "tokens_per_minute", "concurrency", "spend_per_day", "spend_per_month")}}


def _key(row: Row[Any]) -> Key:
    return Key(prefix=row.prefix, sha256=row.sha256, created=_time(row.created),
               expires=None if row.expires is None else _time(row.expires), revoked=row.revoked is not None,
               scopes=_split(row.scopes))


def _shown(row: Row[Any], now: datetime) -> Shown:
    return Shown(owner=row.project or row.organisation or "*", prefix=row.prefix,
                 state=_key(row).state(now.timestamp()), created=_time(row.created),
                 expires=None if row.expires is None else _time(row.expires), role=row.role,
                 scopes=_split(row.scopes), replaces=row.replaces or "")


def _scopes(said: Sequence[Scope] | None) -> str | None:
    for scope in said or ():
        if scope not in SCOPES:
            raise Refused(f"{scope!r} is no scope: use {', '.join(SCOPES)}")
    return _joined(said)


def _setting(connection: Connection, name: str) -> str:
    found: str | None = connection.scalar(select(settings.c.value).where(settings.c.name == name))
    if found is None:
        raise DatabaseFailed(f"the database has no setting {name!r}: it was changed by hand")
    return found


def _count_up(connection: Connection) -> None:
    here = settings.c.name == "revision"
    now = int(connection.execute(select(settings.c.value).where(here).with_for_update()).scalar_one())
    connection.execute(update(settings).where(here).values(value=str(now + 1)))


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise Refused(str(error)) from None


def _split(said: str | None) -> Any:
    return None if said is None else tuple(said.split(",")) if said else ()


def _joined(names: Sequence[str] | None) -> str | None:
    return None if names is None else ",".join(dict.fromkeys(names))


def _after(now: datetime, lived: timedelta) -> datetime:
    return now + lived if lived < LATEST - now else LATEST


def _ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
