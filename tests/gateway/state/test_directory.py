"""Projects and keys in a database open what they should and nothing else; gateways see a change as they do a file's."""

from datetime import UTC, datetime, timedelta

import pytest

from gateway.access import Access
from gateway.state.database import Database
from gateway.state.directory import Directory, DirectorySource, Refused
from gateway.tenants import Limits, Tenant
from shared.clock import LoopClock
from shared.errors import NotAuthorised, PermissionDenied
from shared.messages import Residency

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


def asking(directory: Directory, key: str, now: datetime = NOW) -> Tenant:
    _, tenants = directory.tenants()
    return tenants.asking([(b"authorization", f"Bearer {key}".encode())], now.timestamp())


def refused(directory: Directory, key: str, now: datetime = NOW) -> str:
    with pytest.raises(NotAuthorised) as caught:
        asking(directory, key, now)
    return str(caught.value)


def test_a_project_is_the_tenant_that_it_was_set_up_as(database: Database) -> None:
    directory = Directory(database)
    directory.put_project("acme-web", NOW, organisation="acme", weight=2.5, residency="eu,us", models=("a", "b"),
                          tiers=("flex",), requests_per_minute=60, tokens_per_minute=2**50, concurrency=4,
                          spend_per_day=5 * 10**9, spend_per_month=10**11)
    made = directory.create_key("acme-web", NOW, scopes=["generate"])
    tenant = asking(directory, made.key)
    assert (tenant.name, tenant.organisation, tenant.weight) == ("acme-web", "acme", 2.5)
    assert (tenant.residency, tenant.models, tenant.tiers) == (Residency(("eu", "us")), ("a", "b"), ("flex",))
    assert tenant.limits == Limits(60, 2**50, 4, 5 * 10**9, 10**11)
    assert (tenant.key, tenant.scopes) == (made.prefix, ("generate",))
    tenant.need("generate")
    with pytest.raises(PermissionDenied, match=f"the API key {made.prefix}... has not the scope 'usage'"):
        tenant.need("usage")
    directory.put_project("acme-web", NOW, concurrency=None, residency="")
    again = asking(directory, made.key)
    assert (again.limits.concurrency, again.limits.requests_per_minute) == (None, 60)
    assert again.residency == Residency() and again.salt == tenant.salt


def test_projects_have_salts_of_their_own_which_no_other_database_has(database: Database) -> None:
    directory = Directory(database)
    salts = {asking(directory, directory.create_key(name, NOW).key).salt for name in ("one", "two")}
    assert len(salts) == 2 and all(salts)


def test_the_database_has_no_key_in_it(database: Database) -> None:
    directory = Directory(database)
    made = directory.create_key("acme", NOW)
    secret = made.key.rpartition("-")[2]
    assert [shown.key for shown in directory.keys(NOW)] == [""]
    with database.reading() as connection:
        for table in ("keys", "projects", "organisations", "settings"):
            assert secret not in str(connection.exec_driver_sql(f"SELECT * FROM {table}").all())


def test_a_key_opens_until_it_expires_or_is_revoked(database: Database) -> None:
    directory = Directory(database)
    made = directory.create_key("acme", NOW, NOW + timedelta(hours=1))
    assert asking(directory, made.key, NOW + timedelta(minutes=59)).name == "acme"
    assert "is expired" in refused(directory, made.key, NOW + timedelta(hours=1))
    directory.revoke(made.key, NOW)  # who pastes the whole key means its prefix
    assert "is revoked" in refused(directory, made.key)
    assert [key.state for key in directory.keys(NOW)] == ["revoked"]
    assert directory.revoke(made.prefix, NOW).state == "revoked"


def test_a_rotated_key_has_the_project_scopes_and_life_of_the_one_before(database: Database) -> None:
    directory = Directory(database)
    old = directory.create_key("acme", NOW, NOW + timedelta(days=30), ["usage"])
    later = NOW + timedelta(days=10)
    new = directory.rotate(old.prefix, later, overlap=timedelta(hours=24))
    assert (new.owner, new.scopes, new.replaces) == ("acme", ("usage",), old.prefix)
    assert new.expires == later + timedelta(days=30)
    assert asking(directory, old.key, later + timedelta(hours=23)).name == "acme"
    assert "is expired" in refused(directory, old.key, later + timedelta(hours=24))
    at_once = directory.rotate(new.prefix, later)
    assert "is revoked" in refused(directory, new.key, later)
    assert asking(directory, at_once.key, later).scopes == ("usage",)
    with pytest.raises(Refused, match="is revoked: make another"):
        directory.rotate(new.prefix, later)


def test_people_have_a_role_and_are_no_tenant(database: Database) -> None:
    directory = Directory(database)
    directory.put_project("acme-web", NOW, organisation="acme")
    ann = directory.create_admin("billing", "acme", NOW)
    bob = directory.create_admin("owner", None, NOW)
    one, all_of_them = asking(directory, ann.key), asking(directory, bob.key)
    assert (one.role, one.organisation, one.models) == ("billing", "acme", ())
    assert (all_of_them.role, all_of_them.organisation) == ("owner", "")
    assert one.name not in directory.tenants()[1].named
    one.need("usage")
    with pytest.raises(PermissionDenied):
        one.need("generate")
    with pytest.raises(Refused, match="there is no organisation 'nobody'"):
        directory.create_admin("viewer", "nobody", NOW)
    with pytest.raises(Refused, match="'king' is no role"):
        directory.create_admin("king", None, NOW)  # type: ignore[arg-type]
    assert sorted(key.owner for key in directory.keys(NOW)) == ["*", "acme"]


@pytest.mark.parametrize(("name", "changes", "reason"), [
    ("Acme", {}, "'Acme' is no tenant's name"),
    ("acme", {"organisation": "no such name"}, "is no tenant's name"),
    ("acme", {"weight": 0.0}, "weight: 0 is not from"),
    ("acme", {"residency": "e u"}, "residency: 'e u' is no zone"),
    ("acme", {"tiers": ("fast",)}, "tiers: 'fast' is none"),
    ("acme", {"models": ("a,b",)}, "models: 'a,b' can be no model's name"),
    ("acme", {"concurrency": 0}, "concurrency: 0 is not from 1"),
    ("acme", {"spend_per_day": -1}, "spend_per_day: -1 nano-dollars"),
    ("there", {"organisation": "acme"}, "there is a project of there, and stays one"),
])
def test_what_a_gateway_would_refuse_is_never_written(database: Database, name: str, changes: dict[str, object],
                                                      reason: str) -> None:
    directory = Directory(database)
    directory.put_project("there", NOW)
    before = directory.tenants()[0]
    with pytest.raises(Refused) as caught:
        directory.put_project(name, NOW, **changes)
    assert reason in str(caught.value)
    assert [project.name for project in directory.projects()] == ["there"] and directory.tenants()[0] == before


async def test_a_gateway_follows_what_changes_and_keeps_what_it_knows_while_the_database_is_away(
        database: Database) -> None:
    directory = Directory(database)
    made = directory.create_key("acme", NOW)
    headers = [(b"authorization", f"Bearer {made.key}".encode())]
    access = Access(DirectorySource(database), LoopClock())
    assert access.keyed and access.asking(headers).limits == Limits()
    tenants = access.asking(headers)
    await access.follow()
    assert access.asking(headers) is tenants  # nothing new: nothing was read
    directory.put_project("acme", NOW, concurrency=3)
    await access.follow()
    assert access.asking(headers).limits.concurrency == 3
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO gone")
        connection.exec_driver_sql("UPDATE settings SET value = '77' WHERE name = 'revision'")
    await access.follow()
    assert access.refused and access.asking(headers).limits.concurrency == 3
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE gone RENAME TO keys")
    await access.follow()
    assert not access.refused and access.asking(headers).name == "acme"
