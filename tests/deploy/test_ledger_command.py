"""`tokenmill projects`, `keys --database`, `usage`, `ledger`: gateways read what they write; what is wrong is said."""

import json
import sqlite3
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy import cli
from gateway.ledger import Record, day_of
from gateway.state.books import Books, Budget
from gateway.state.database import open_database
from gateway.state.directory import Directory
from shared.pricing import nanos

NOW = datetime.now(UTC)
AT = round(NOW.timestamp() * 1000)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/kept/mill.db"


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={
        "TOKENMILL_DATABASE": url, "TOKENMILL_TENANTS": "", "COLUMNS": "100", "TERM": "dumb"})


def fine(url: str, *arguments: str) -> str:
    result = run(url, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def records() -> list[Record]:
    price = {"input": nanos("0.10"), "cached_input": nanos("0.05"), "output": nanos("0.40")}
    return [Record(request=f"r{number}", tenant=tenant, day=day_of(AT), at=AT, key=f"tm-0000000{number}", model="m",
                   tier="default", region="*", prompt_tokens=1000, cached_tokens=500, generated_tokens=100 * number,
                   outcome="stop", cost=cost, worker_us=250_000, **price)
            for number, tenant, cost in ((1, "acme", nanos("0.00005")), (2, "acme", None), (3, "bolt", 1000))]


def test_a_key_made_on_the_command_line_opens_a_gateway_that_reads_the_database(url: str, tmp_path: Path) -> None:
    fine(url, "projects", "set", "acme", "--organisation", "big", "--spend-per-day", "5.00", "--concurrency", "3",
         "--residency", "eu", "--tiers", "flex,default", "--models", "a, b")
    made = json.loads(fine(url, "keys", "create", "acme", "--expires", "90d", "--scope", "generate", "--json"))
    database = open_database(url)
    tenant = Directory(database).tenants()[1].asking(
        [(b"authorization", f"Bearer {made['key']}".encode())], NOW.timestamp())
    assert (tenant.name, tenant.organisation, tenant.scopes) == ("acme", "big", ("generate",))
    assert (tenant.limits.spend_per_day, tenant.limits.concurrency) == (nanos("5"), 3)
    assert (tenant.tiers, tenant.models, tenant.residency.zones) == (("flex", "default"), ("a", "b"), ("eu",))
    fine(url, "projects", "set", "acme", "--concurrency", "none", "--residency", "any", "--tiers", "none")
    (project,) = Directory(database).projects()
    assert (project.concurrency, project.residency, project.tiers, project.models) == (None, "", None, ("a", "b"))
    rotated = json.loads(fine(url, "keys", "rotate", made["prefix"], "--overlap", "1h", "--json"))
    fine(url, "keys", "revoke", rotated["prefix"])
    listed = json.loads(fine(url, "keys", "list", "--json"))["keys"]
    assert {line["prefix"]: line["state"] for line in listed} == {
        made["prefix"]: "valid", rotated["prefix"]: "revoked"}
    assert fine(url, "keys", "create", "acme").strip().startswith("tm-")
    assert "viewer of big" in fine(url, "keys", "admin", "viewer", "--organisation", "big", "--json")
    database.close()
    # it holds the secret of the cache salts
    assert stat.S_IMODE((tmp_path / "kept" / "mill.db").stat().st_mode) == 0o600


def test_usage_is_summed_as_it_is_asked_for_and_says_what_was_earned(url: str) -> None:
    database = open_database(url)
    Books(database).settle("g", records(), AT)
    by_tenant = json.loads(fine(url, "usage", "--json"))
    assert by_tenant["by"] == ["tenant"]
    acme, bolt = by_tenant["data"]
    # 500 at 0.10, 500 at 0.05, and 100 or 200 at 0.40 a million
    assert (acme["requests"], acme["generated_tokens"], acme["charged_usd"]) == (2, 300, "0.00027")
    assert (acme["cost_usd"], acme["requests_without_cost"], acme["worker_s"]) == ("0.00005", 1, 0.5)
    assert acme["margin"] == round(1 - 0.00005 / 0.000115, 6) and "day" not in acme
    assert bolt["charged_usd"] == "0.000195"
    assert [line["key"] for line in json.loads(fine(url, "usage", "--by", "day,key", "--json"))["data"]] == [
        "tm-00000001", "tm-00000002", "tm-00000003"]
    rows = fine(url, "usage", "--by", "tenant,model", "--csv").splitlines()
    assert rows[0].startswith("tenant,model,requests,prompt_tokens,cached_tokens,generated_tokens,")
    assert rows[1].startswith("acme,m,2,2000,1000,300,0,0,0.00027,0.00005,")
    page = fine(url, "usage", "--by", "")
    assert "0.000465" in page and page.splitlines()[0].split()[:2] == ["REQUESTS", "PROMPT"]
    assert "nothing was used" in fine(url, "usage", "--since", "2020-01-01", "--until", "2020-01-31")
    assert "nothing was used" in fine(url, "usage", "--tenant", "nobody")
    database.close()


def test_a_ledger_that_adds_up_is_said_to_and_one_that_does_not_is_shown_where(url: str, tmp_path: Path) -> None:
    database = open_database(url)
    books = Books(database)
    books.settle("g", records(), AT)
    books.grant("gone", "acme", day_of(AT), nanos("0.5"), 1, Budget(per_day=nanos("1")), AT - 3_600_000)
    assert "it adds up" in fine(url, "ledger", "check")
    told = json.loads(fine(url, "ledger", "check", "--json"))
    assert (told["adds_up"], told["requests"], told["generated_tokens"], told["held_usd"]) == (True, 3, 600, "0.5")
    assert told["settled_usd"] == "0.000465"
    assert "$0 given back" in fine(url, "ledger", "sweep", "--idle", "7200")
    assert json.loads(fine(url, "ledger", "sweep", "--json")) == {"released_usd": "0.5"}
    database.close()
    by_hand = sqlite3.connect(tmp_path / "kept" / "mill.db")
    by_hand.execute("DROP TRIGGER ledger_no_update")
    by_hand.execute("UPDATE ledger SET amount = amount - 1 WHERE request = 'r2'")
    by_hand.commit()
    by_hand.close()
    result = run(url, "ledger", "check")
    assert result.exit_code == 1 and "request r2 is settled at" in result.stderr
    assert json.loads(run(url, "ledger", "check", "--json").stdout)["adds_up"] is False


@pytest.mark.parametrize(("arguments", "reason"), [
    (["usage", "--by", "hour"], "'hour' is nothing to group by: use day, tenant"),
    (["usage", "--since", "yesterday"], "'yesterday' is no day: write it as 20"),
    (["projects", "set", "acme", "--spend-per-day", "much"], "--spend-per-day: 'much' is no such limit"),
    (["projects", "set", "Acme"], "'Acme' is no tenant's name"),
    (["keys", "create", "acme", "--scope", "all"], "'all' is no scope: use generate, usage"),
    (["keys", "admin", "king"], "'king' is no role"),
    (["keys", "revoke", "tm-00000000"], "there is no key with the prefix 'tm-00000000'"),
])
def test_what_cannot_be_done_is_said_in_one_sentence(url: str, arguments: list[str], reason: str) -> None:
    result = run(url, *arguments)
    assert result.exit_code == 1 and reason in result.stderr and "Traceback" not in result.stderr


def test_the_benchmark_of_a_ledger_leaves_one_that_adds_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deploy.bench import ledger

    monkeypatch.setattr(ledger, "SIZES", ((1, 2), (3, 2)))
    monkeypatch.setattr(ledger, "GRANTS", 2)
    assert ledger.main(["--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["what"] for row in report["rows"]] == ["settle", "settle", "grant", "check"]
    # two reserves and two settles of one; two reserves and six settles; three of a lease of its own; four releases
    assert report["rows"][-1]["entries"] == 4 + 8 + 3 + 4 and "tmp" not in report["command"]


def test_without_a_database_the_commands_say_how_to_name_one() -> None:
    for arguments in (["usage"], ["ledger", "check"], ["projects", "list"], ["keys", "admin", "viewer"]):
        result = run("", *arguments)
        assert result.exit_code == 1 and "--database URL, or TOKENMILL_DATABASE" in result.stderr
    result = run("nonsense://x", "ledger", "check")
    assert result.exit_code == 1 and "names no database" in result.stderr
