"""`tokenmill keys`: what it writes a gateway reads, what people wrote stays, and nobody's change gets lost."""

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy import cli, keys
from deploy.keys import KeysFailed
from gateway.tenants import digest
from gateway.tenants_file import TenantsFile
from tests.deploy.command import HOME

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)
WRITTEN = """\
# kept by hand
secret = "{secret}"

[tenants.acme]  # our best client
weight = 4
residency = "eu"

[[tenants.acme.keys]]
prefix = "tm-00000000"  # Anna's
sha256 = "{digest}"

# for tests
[tenants.lab]
requests_per_minute = 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "tenants.toml"


@pytest.fixture
def written(path: Path) -> Path:
    path.parent.mkdir()
    path.write_text(WRITTEN.format(secret="s" * 40, digest=digest("somebody's")))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["keys", *arguments], env={"COLUMNS": "100", "TERM": "dumb"})


def opens(path: Path, key: str, wall_s: float = NOW.timestamp()) -> str:
    """Whose it is, or what is said instead."""
    try:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        return TenantsFile(path).read().asking(headers, wall_s).name
    except Exception as error:
        return str(error)


def test_a_first_key_begins_a_file_that_nobody_else_may_read_and_opens_its_tenant(path: Path) -> None:
    row = keys.create(path, "acme", NOW)
    assert opens(path, row.key) == "acme"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert row.key not in path.read_text() and row.key.startswith(row.prefix) and len(row.prefix) == 11
    secret = path.read_text().split('secret = "')[1].split('"')[0]
    assert len(secret) >= 64
    other = keys.create(path.with_name("other.toml"), "acme", NOW)
    assert secret not in path.with_name("other.toml").read_text() and other.key != row.key
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "other.toml", "other.toml.lock", "tenants.toml", "tenants.toml.lock"]


def test_all_that_people_wrote_stays_and_only_the_change_is_made(written: Path) -> None:
    before = written.read_text()
    written.chmod(0o644)
    row = keys.create(written, "acme", NOW, NOW + timedelta(days=90))
    lab = keys.create(written, "lab", NOW)
    new = keys.create(written, "new", NOW)
    keys.revoke(written, "tm-00000000", NOW)
    after = written.read_text()
    lines = iter(after.splitlines())
    for line in before.splitlines():
        assert line in lines, f"{line!r} is gone or stands elsewhere"
    assert stat.S_IMODE(written.stat().st_mode) == 0o640
    found = TenantsFile(written).read()
    assert (found.named["acme"].weight, found.named["acme"].residency.zones) == (4.0, ("eu",))
    assert found.named["lab"].limits.requests_per_minute == 10
    assert [key.prefix for key in found.named["acme"].keys] == ["tm-00000000", row.prefix]
    assert [opens(written, each.key) for each in (row, lab, new)] == ["acme", "lab", "new"]
    assert "[tenants.new]" in after


@pytest.mark.parametrize("text", [
    'secret = "{secret}"\ntenants = {{ acme = {{ weight = 2 }} }}\n',
    'secret = "{secret}"\n[tenants]\nacme.weight = 2\n[tenants.other]\nweight = 3\n',
    'secret = "{secret}"\n[tenants.acme]\nweight = 2\nkeys = []\n',
    'secret = "{secret}"\n[tenants.acme]\nweight = 2\nkeys = [{{ prefix = "tm-00000000", sha256 = "{digest}" }}]\n',
    'secret = "{secret}"\n[[tenants.acme.keys]]\nprefix = "tm-00000000"\nsha256 = "{digest}"\n[tenants.b]\n'
    '[[tenants.b.keys]]\nprefix = "tm-00000001"\nsha256 = "{digest}"\n[tenants.c]\n',
])
def test_a_file_written_in_another_way_is_changed_rightly_or_not_at_all(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text.format(secret="s" * 40, digest="0" * 64))
    before, bytes_before = TenantsFile(path).read(), path.read_bytes()
    try:
        row = keys.create(path, "acme", NOW)
    except KeysFailed as error:
        assert "give each tenant a table [tenants.NAME]" in str(error)
        assert path.read_bytes() == bytes_before
        return
    after = TenantsFile(path).read()
    assert opens(path, row.key) == "acme"
    assert {name: (tenant.weight, len(tenant.keys) + (name == "acme")) for name, tenant in before.named.items()} == {
        name: (tenant.weight, len(tenant.keys)) for name, tenant in after.named.items()}


def test_a_revoked_key_opens_nothing_and_stays_in_the_list(written: Path) -> None:
    row = keys.create(written, "lab", NOW)
    for _ in range(2):
        assert keys.revoke(written, row.prefix, NOW).state == "revoked"
    assert opens(written, row.key) == f"the API key {row.prefix}... is revoked: ask for another"
    assert [(each.tenant, each.prefix, each.state) for each in keys.listed(written, NOW)] == [
        ("acme", "tm-00000000", "valid"), ("lab", row.prefix, "revoked")]


def test_a_rotated_key_ends_and_the_new_one_lives_as_long_as_it_was_given_to_live(written: Path) -> None:
    old = keys.create(written, "acme", NOW, NOW + timedelta(days=30))
    later = NOW + timedelta(days=10)
    new = keys.rotate(written, old.prefix, later)
    assert (new.tenant, new.replaces, new.expires) == ("acme", old.prefix, later + timedelta(days=30))
    assert "revoked" in opens(written, old.key) and opens(written, new.key) == "acme"
    third = keys.rotate(written, new.prefix, later, overlap=timedelta(hours=2))
    at_s = (later + timedelta(hours=2)).timestamp()
    assert [opens(written, new.key, wall_s) for wall_s in (at_s - 1, at_s)] == [
        "acme", f"the API key {new.prefix}... is expired: ask for another"]
    assert opens(written, third.key) == "acme"
    with pytest.raises(KeysFailed, match=f"{old.prefix} is revoked: make another with `tokenmill keys create acme`"):
        keys.rotate(written, old.prefix, later)
    # never longer than it would have lived
    short = keys.create(written, "lab", NOW, NOW + timedelta(hours=1))
    keys.rotate(written, short.prefix, NOW, overlap=timedelta(days=1))
    (row,) = [row for row in keys.listed(written, NOW) if row.prefix == short.prefix]
    assert row.expires == NOW + timedelta(hours=1)


@pytest.mark.parametrize(("text", "reason"), [("secret = ", "no TOML"), ("[tenants.a]", "needs a secret"),
                                              (WRITTEN.format(secret="s" * 40, digest="zz"), "tenants.acme.keys")])
def test_a_file_that_no_gateway_takes_is_left_as_it_is(path: Path, text: str, reason: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    for change in (lambda: keys.create(path, "a", NOW), lambda: keys.revoke(path, "tm-00000000", NOW)):
        with pytest.raises(KeysFailed, match=reason):
            change()
    assert path.read_text() == text


def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(written: Path) -> None:
    before = written.read_text()
    for change, reason in (
            (lambda: keys.create(written, "Not A Name", NOW), "is no tenant's name"),
            (lambda: keys.revoke(written, "tm-ffffffff", NOW), "has no key with the prefix 'tm-ffffffff'"),
            (lambda: keys.rotate(written, "tm-ffffffff", NOW), "has no key with the prefix"),
            (lambda: keys.listed(written.with_name("none"), NOW), "cannot read the tenants file"),
            (lambda: keys.revoke(written.with_name("none"), "tm-00000000", NOW), "No such file")):
        with pytest.raises(KeysFailed, match=reason):
            change()
    assert written.read_text() == before


@pytest.mark.parametrize(("said", "expected"), [
    ("", None), ("90d", NOW + timedelta(days=90)), ("12h", NOW + timedelta(hours=12)),
    ("30m", NOW + timedelta(minutes=30)), ("2030-12-31", datetime(2030, 12, 31, tzinfo=UTC)),
    ("2030-12-31T12:00:00+02:00", datetime(2030, 12, 31, 10, tzinfo=UTC))])
def test_when_a_key_expires_can_be_said_as_a_span_or_a_date(said: str, expected: datetime | None) -> None:
    assert keys.until(said, NOW) == expected


@pytest.mark.parametrize("said", ["soon", "5", "5y", "0d", "2020-01-01", "-1d", "99999999999d", "9999999d",
                                  "9999-12-31T23:59:59-12:00", "9" * 5000 + "d"])
def test_a_time_that_is_none_or_has_passed_is_refused(said: str) -> None:
    with pytest.raises(KeysFailed, match=f"'{said}'"):
        keys.until(said, NOW)


@pytest.mark.parametrize("said", ["99999999999d", "9" * 5000 + "h"])
def test_a_span_that_no_time_has_is_refused(said: str) -> None:
    with pytest.raises(KeysFailed, match="too long a span"):
        keys.span(said)


def test_a_key_that_lives_to_the_end_of_time_is_made_listed_and_rotated(written: Path) -> None:
    """Dates near the last one there is once ended in a traceback."""
    far = keys.until("9999-12-31", NOW)
    assert far == datetime(9999, 12, 31, tzinfo=UTC)
    old = keys.create(written, "acme", NOW, far)
    new = keys.rotate(written, old.prefix, NOW + timedelta(days=2), overlap=keys.span("9999999d"))
    assert new.expires == keys.LATEST and opens(written, new.key) == opens(written, old.key) == "acme"
    endless = keys.create(written, "lab", NOW)
    keys.rotate(written, endless.prefix, NOW, overlap=keys.span("9999999d"))
    ends = {row.prefix: row.expires for row in keys.listed(written, NOW)}
    assert (ends[old.prefix], ends[endless.prefix]) == (far, keys.LATEST)


@pytest.mark.parametrize("more", [("--overlap", "99999999999d"), ("--expires", "9999-12-31T23:59:59-12:00")])
def test_a_time_out_of_reach_is_one_sentence_of_the_command(written: Path, more: tuple[str, str]) -> None:
    before = written.read_text()
    result = run("rotate", "tm-00000000", "--tenants", str(written), *more)
    assert result.exit_code == 1 and more[1] in result.stderr and "Traceback" not in result.stderr
    assert written.read_text() == before


def test_a_link_to_the_file_stays_a_link(written: Path) -> None:
    link = written.parent / "link.toml"
    link.symlink_to(written.name)
    row = keys.create(link, "lab", NOW)
    assert link.is_symlink() and opens(written, row.key) == "lab"


@pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o640, 0o640), (0o660, 0o640), (0o664, 0o640),
                                               (0o440, 0o640), (0o604, 0o600)])
def test_a_gateway_that_read_the_file_by_its_group_still_does_after_a_key_was_revoked(written: Path, before: int,
                                                                                   after: int) -> None:
    """Once the file was always written 0600: such a gateway read it no more, and the revoked key went on opening."""
    written.chmod(before)
    group = written.stat().st_gid
    for change in (lambda: keys.create(written, "lab", NOW), lambda: keys.revoke(written, "tm-00000000", NOW)):
        change()
        assert (stat.S_IMODE(written.stat().st_mode), written.stat().st_gid) == (after, group)


def test_a_group_that_reads_the_file_and_cannot_be_kept_is_one_sentence(written: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    real = os.fstat

    def of_another_group(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[stat.ST_GID] += 1
        return os.stat_result(fields)

    monkeypatch.setattr(keys.os, "fchown", denied)
    monkeypatch.setattr(keys.os, "fstat", of_another_group)
    written.chmod(0o640)
    before = written.read_text()
    with pytest.raises(KeysFailed, match="a group that reads it and that you are not in"):
        keys.revoke(written, "tm-00000000", NOW)
    assert written.read_text() == before
    written.chmod(0o600)
    assert keys.revoke(written, "tm-00000000", NOW).state == "revoked"


def test_of_many_who_write_at_once_nobodys_key_is_lost_and_readers_see_whole_files(written: Path) -> None:
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(len(TenantsFile(written).read().named["lab"].keys))

    reader = threading.Thread(target=read)
    reader.start()
    script = ("import sys; from datetime import UTC, datetime; from pathlib import Path; from deploy import keys\n"
              "for _ in range(5): print(keys.create(Path(sys.argv[1]), 'lab', datetime.now(UTC)).key)")

    def write(_: int) -> list[str]:
        made = subprocess.run([sys.executable, "-c", script, str(written)], capture_output=True, text=True, timeout=60,
                              cwd=HOME, env=os.environ | {"PYTHONPATH": str(HOME)}, check=True)
        return made.stdout.split()

    with ThreadPoolExecutor(4) as writers:
        made = [key for each in writers.map(write, range(4)) for key in each]
    done.set()
    reader.join()
    assert len(set(made)) == 20 and {opens(written, key) for key in made} == {"lab"}
    assert len(TenantsFile(written).read().named["lab"].keys) == 20
    assert seen == sorted(seen) and seen


def test_a_lock_that_is_held_for_long_is_one_sentence(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOCK_WITHIN_S", 0.05)
    before = written.read_text()
    with keys._locked(written), pytest.raises(KeysFailed, match="somebody has been writing"):
        keys.create(written, "lab", NOW)
    assert written.read_text() == before


def test_a_write_that_fails_leaves_the_file_and_no_litter(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys.os, "fsync", full)
    with pytest.raises(KeysFailed, match=r"tenants\.toml: No space left on device, nothing was changed"):
        keys.create(written, "lab", NOW)
    assert written.read_text() == before
    assert sorted(entry.name for entry in written.parent.iterdir()) == ["tenants.toml", "tenants.toml.lock"]


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands_make_list_rotate_and_revoke(path: Path) -> None:
    made = run("create", "acme", "--tenants", str(path), "--expires", "90d")
    key = made.stdout.strip()
    assert made.exit_code == 0 and opens(path, key) == "acme"
    assert "not shown again" in made.stderr and f"--tenants {path}" in made.stderr and key not in made.stderr
    rotated = run("rotate", key[:11], "--tenants", str(path), "--overlap", "24h")
    assert rotated.exit_code == 0 and opens(path, rotated.stdout.strip()) == "acme" == opens(path, key)
    revoked = run("revoke", key[:11], "--tenants", str(path))
    assert revoked.stdout == f"{key[:11]} of acme is revoked; gateways know within a second or two\n"
    shown = run("list", "--tenants", str(path)).stdout
    assert [line.split()[:3] for line in shown.splitlines()] == [
        ["TENANT", "PREFIX", "STATE"], ["acme", key[:11], "revoked"], ["acme", rotated.stdout[:11], "valid"]]
    assert key not in shown and digest(key) not in shown


def test_with_json_each_command_gives_one_document(path: Path) -> None:
    at = ("--tenants", str(path), "--json")
    made = json.loads(run("create", "acme", *at).stdout)
    assert set(made) == {"tenant", "prefix", "state", "created", "expires", "key"}
    assert made["created"].endswith("Z") and made["expires"] is None and opens(path, made["key"]) == "acme"
    rotated = json.loads(run("rotate", made["prefix"], *at).stdout)
    assert rotated["replaces"] == made["prefix"]
    revoked = json.loads(run("revoke", rotated["prefix"], *at).stdout)
    assert (revoked["state"], "key" in revoked) == ("revoked", False)
    rows = json.loads(run("list", *at).stdout)["keys"]
    assert [(row["prefix"], row["state"], "key" in row) for row in rows] == [
        (made["prefix"], "revoked", False), (rotated["prefix"], "revoked", False)]


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "tm-00000000"), ("rotate", "tm-00000000")])
def test_a_command_without_a_file_is_one_sentence(path: Path, arguments: tuple[str, ...]) -> None:
    path.parent.mkdir()
    result = run(*arguments, "--tenants", str(path))
    assert result.exit_code == 1 and result.stdout == ""
    assert str(path) in result.stderr and "Traceback" not in result.stderr


def test_the_file_is_found_in_the_environment_and_else_in_the_data_folder(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("TOKENMILL_TENANTS", raising=False)
    assert run("create", "acme").exit_code == 0
    assert (tmp_path / "data" / "tenants.toml").exists()
    monkeypatch.setenv("TOKENMILL_TENANTS", str(tmp_path / "named.toml"))
    assert run("create", "acme").exit_code == 0
    assert (tmp_path / "named.toml").exists()
