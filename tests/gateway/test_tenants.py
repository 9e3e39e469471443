"""Whose key it is, what the tenants file may say, and how it is told what is wrong in it."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway import tenants, tenants_file
from gateway.tenants import EVERYBODY, Key, Tenant, digest, key_in, new_key
from gateway.tenants_file import TenantsFile, Unsettled
from shared.blocks import tenant_salt
from shared.errors import NotAuthorised, PermissionDenied
from shared.messages import Residency
from tests.gateway.tenants_files import SECRET, bearer, write

HEAD = f'secret = "{SECRET}"\n'
KEYED = HEAD + '[tenants.acme]\n[[tenants.acme.keys]]\nprefix = "tm-00000000"\nsha256 = "' + "0" * 64 + '"\n'
NOW_S = 1.8e9


def looks(file: TenantsFile) -> bool:
    """Two looks: what the second one says."""
    file.changed()
    return file.changed()


def asking(found: tenants.Tenants, headers: dict[str, str]) -> Tenant:
    return found.asking([(name.encode(), value.encode()) for name, value in headers.items()], NOW_S)


def test_a_key_opens_its_tenant_and_nothing_else_opens_any(tmp_path: Path) -> None:
    keys = write(tmp_path / "t.toml", acme={"weight": 4.0, "residency": "eu"}, other={})
    found = TenantsFile(tmp_path / "t.toml").read()
    assert found.keyed
    acme = asking(found, bearer(keys["acme"]))
    assert (acme.name, acme.weight, acme.residency) == ("acme", 4.0, Residency(("eu",)))
    assert asking(found, {"x-api-key": keys["other"]}).name == "other"
    assert asking(found, {"authorization": f"bearer  {keys['acme']} "}).name == "acme"
    wrong = [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": f"Basic {keys['acme']}"},
             bearer("none"), bearer("sk-" + "a" * 48), bearer(new_key()), bearer(keys["acme"][:-1]),
             bearer(keys["acme"] + "a"), bearer(keys["acme"][:11] + keys["other"][11:]), bearer("\xfc" * 55)]
    for headers in wrong:
        with pytest.raises(NotAuthorised) as refused:
            asking(found, headers)
        assert "key" in refused.value.message
        assert keys["acme"][11:] not in refused.value.message


@pytest.mark.parametrize(("line", "state"), [("revoked = true", "revoked"),
                                             ("expires = 2026-01-01T00:00:00Z", "expired")])
def test_a_revoked_or_expired_key_opens_nothing_and_says_which_it_was(tmp_path: Path, line: str, state: str) -> None:
    keys = write(tmp_path / "t.toml", line, acme={})
    with pytest.raises(NotAuthorised, match=f"{keys['acme'][:11]}... is {state}"):
        asking(TenantsFile(tmp_path / "t.toml").read(), bearer(keys["acme"]))


def test_a_key_ends_at_the_second_it_expires() -> None:
    key = Key(prefix="tm-00000000", sha256="0" * 64, expires=datetime.fromtimestamp(NOW_S, UTC))
    assert (key.state(NOW_S - 0.001), key.state(NOW_S)) == ("valid", "expired")


def test_two_keys_never_look_alike_and_only_the_digest_of_one_is_kept() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == len({digest(key) for key in made}) == 100
    assert all(len(digest(key)) == 64 and key not in digest(key) for key in made)


def test_without_a_file_everybody_is_the_same_tenant_with_the_salt_there_has_always_been() -> None:
    found = tenants.everybody("tokenmill")
    assert not found.keyed
    one = asking(found, {})
    assert one == asking(found, bearer("none"))
    assert (one.name, one.salt, one.weight) == (EVERYBODY, tenant_salt(b"tokenmill", "default"), 1.0)
    assert not one.limits


def test_salts_differ_between_tenants_and_between_secrets_however_long(tmp_path: Path) -> None:
    salts = set()
    for secret in ("a" * 32, "a" * 70, "a" * 71):  # BLAKE2b alone would tell the last two apart no more
        found = tenants_file.read(f'secret = "{secret}"\n[tenants.a]\n[tenants.b]\n[tenants.default]')
        salts |= {tenant.salt for tenant in found.named.values()}
    salts.add(tenants.everybody("a" * 32).named[EVERYBODY].salt)
    assert len(salts) == 10


@pytest.mark.parametrize(("text", "reason"), [
    ("secret = ", "no TOML"),
    ("[tenants.a]", "needs a secret of 32"),
    ('secret = "short"', "needs a secret of 32"),
    (HEAD + "a = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ("secret = 5", "needs a secret of 32"),
    (HEAD + "[tenants.Acme]", "no tenant's name"),
    (HEAD + "tenant = 1", "unknown field `tenant`"),
    (HEAD + "[tenants.a]\nwait = 4", "tenants.a: .*unknown field `wait`"),
    (HEAD + "[tenants.a]\nweight = 0", "tenants.a.weight: "),
    (HEAD + "[tenants.a]\nweight = 1e9", "tenants.a.weight: "),
    (HEAD + "[tenants.a]\nconcurrency = 0", "tenants.a.concurrency: "),
    (HEAD + "[tenants.a]\ntokens_per_minute = " + "9" * 400, "tenants.a.tokens_per_minute: "),
    (HEAD + "[tenants.a]\nrequests_per_minute = 1.5", "tenants.a.requests_per_minute: "),
    (HEAD + '[tenants.a]\nresidency = "Europe!"', "tenants.a.residency: 'Europe!' is no zone"),
    (HEAD + "[tenants.a]\ntiers = []", "tenants.a.tiers: "),
    (HEAD + '[tenants.a]\ntiers = ["gold"]', r"tenants.a.tiers\[0|\.\.\.\]: "),
    (KEYED.replace("tm-00000000", "sk-00000000"), "tenants.acme.keys"),
    (KEYED.replace('"' + "0" * 64 + '"', '"secret key"'), "tenants.acme.keys"),
    (KEYED + "expires = 2026-01-01T00:00:00", "tenants.acme.keys"),
    (KEYED + "owner = 1", "tenants.acme.keys"),
    (KEYED + "[tenants.b]" + KEYED[len(HEAD):].replace("acme", "b").replace("[tenants.b]", "", 1),
     "two keys have the prefix tm-00000000"),
])
def test_what_is_wrong_in_a_file_is_said_with_its_place_and_never_with_a_secret(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        tenants_file.read(text)
    assert SECRET not in str(refused.value) and "0" * 64 not in str(refused.value)


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the tenants file .*/none.toml: No such file"):
        TenantsFile(tmp_path / "none.toml").read()


def test_a_file_has_changed_when_it_was_written_replaced_or_removed(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    write(path, a={})
    file = TenantsFile(path)
    file.read()
    assert not looks(file)
    other = tmp_path / "new.toml"
    write(other, a={}, b={})
    other.replace(path)
    assert looks(file)
    assert set(file.read().named) == {"a", "b"} and not looks(file)
    path.unlink()
    assert looks(file)
    with pytest.raises(ValueError, match="cannot read"):
        file.read()
    path.write_text("secret = 1")
    assert looks(file)
    with pytest.raises(ValueError, match="is refused"):
        file.read()
    assert not looks(file), "the same words are wrong again"


def test_a_file_that_could_not_be_read_is_tried_again_when_only_its_mode_changed(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.toml"
    write(path, a={})
    file = TenantsFile(path)
    file.read()
    path.chmod(0o640)
    assert looks(file), "its mode is part of what it is"

    def denied(*_: str) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as context:
        context.setattr(Path, "open", denied)
        with pytest.raises(ValueError, match="Permission denied"):
            file.read()
        assert looks(file), "a gateway may be let in by what no look at the file shows"
    assert set(file.read().named) == {"a"} and not looks(file)


def test_a_file_that_is_being_saved_in_place_is_read_when_it_is_whole(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is a file too, without the tenants and limits that come later."""
    path = tmp_path / "t.toml"
    write(path, a={}, b={})
    whole, file = path.read_text(), TenantsFile(path)
    file.read()
    half = whole[:whole.index("[tenants.b]")]
    path.write_text(half)
    assert not file.changed()
    path.write_text(whole + "\n")
    assert not file.changed()
    assert file.changed() and set(file.read().named) == {"a", "b"}
    # between the look and the reading
    path.write_text(whole)
    assert looks(file)
    path.write_text(half)
    with pytest.raises(Unsettled, match="is being written"):
        file.read()
    path.write_text(whole)
    assert looks(file)
    # while it is read
    real = os.fstat

    def meanwhile(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        write_once()
        return found

    with monkeypatch.context() as context:
        once = iter([whole + "\n# more\n"])
        write_once = lambda: [os.write(writer, text.encode()) for text in once]  # noqa: E731
        writer = os.open(path, os.O_WRONLY)
        context.setattr(tenants_file.os, "fstat", meanwhile)
        with pytest.raises(Unsettled):
            file.read()
        os.close(writer)
    assert looks(file) and set(file.read().named) == {"a", "b"} and not looks(file)
    # who replaces it whole disturbs no reader
    other = tmp_path / "new.toml"
    write(other, c={})
    with monkeypatch.context() as context:
        write_once = lambda: other.exists() and other.replace(path)  # noqa: E731
        context.setattr(tenants_file.os, "fstat", meanwhile)
        assert set(file.read().named) == {"a", "b"}
    assert looks(file) and set(file.read().named) == {"c"}


def test_a_policy_is_narrowed_to_the_tenants_zones_or_denied() -> None:
    tenant = Tenant("a", b"", residency=Residency(("eu",)))
    assert tenant.within(Residency()) == Residency(("eu",))
    assert tenant.within(Residency(("eu-north1", "us"))) == Residency(("eu-north1",))
    with pytest.raises(PermissionDenied, match="may go to us, and this key's tenant to eu only"):
        tenant.within(Residency(("us",)))


def test_a_tier_is_the_one_asked_for_or_denied_and_else_the_first_allowed() -> None:
    tenant = Tenant("a", b"", tiers=("flex", "default"))
    assert tenant.tier_of("default", asked=True) == "default"
    assert tenant.tier_of("default", asked=False) == "default"
    assert Tenant("b", b"", tiers=("flex",)).tier_of("default", asked=False) == "flex"
    with pytest.raises(PermissionDenied, match="'priority': ask for flex, default"):
        tenant.tier_of("priority", asked=True)


def test_the_bearer_key_goes_before_the_other_header() -> None:
    first, second = new_key(), new_key()
    assert key_in([(b"x-api-key", second.encode()), (b"authorization", b"Bearer " + first.encode())]) == first
