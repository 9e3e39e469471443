"""Keys in the tenants file: made, listed, revoked and rotated.

Rules: whoever writes holds the file's lock and replaces the file whole, so that a gateway reads all of a change or
nothing of it; only the change is made, and what people wrote (comments, order, limits) stays as it is; only its owner
may read the file, and its group where it could before; what a gateway would refuse is never written. A key leaves here
once, when it is made.
"""

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomlkit
from msgspec import Struct
from tomlkit.items import AoT, Array

from gateway import tenants_file
from gateway.tenants import PREFIX_LETTERS, Key, Tenants, check_name, digest, new_key

LOCK_WITHIN_S = 10.0
LATEST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # that a file can say
BEGINNING = """\
# Tenants of this mesh and their keys. Cache salts derive from the secret: whoever changes it empties all caches.
secret = "{secret}"
"""

_SPAN = re.compile(r"(\d+)([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


class KeysFailed(Exception):
    """One clear sentence on why nothing was changed."""


class Row(Struct, omit_defaults=True):
    """A key as it is shown. Times in UTC, None: never, or not known. `key`: the key itself, once."""

    tenant: str
    prefix: str
    state: str
    created: datetime | None
    expires: datetime | None
    key: str = ""
    replaces: str = ""
    scopes: list[str] | None = None  # None: all


def create(path: Path, tenant: str, now: datetime, expires: datetime | None = None) -> Row:
    """A new key for `tenant`, which is added when there is none of that name. Raises KeysFailed."""
    with _failing(path), _editing(path, begin=True) as (change, found):
        check_name(tenant)
        key = _new_key(found)
        change(lambda document: _add(document, tenant, key, now, expires))
    return Row(tenant, key[:PREFIX_LETTERS], "valid", now, expires, key)


def listed(path: Path, now: datetime) -> list[Row]:
    """All keys in the order of the file. Raises KeysFailed."""
    with _failing(path):
        return _rows(tenants_file.TenantsFile(path).read(), now)


def revoke(path: Path, prefix: str, now: datetime) -> Row:
    """This key opens nothing any more. Raises KeysFailed."""
    with _failing(path), _editing(path) as (change, found):
        row = _row(found, prefix, path, now)
        if row.state != "revoked":
            change(lambda document: _entry(document, row).update({"revoked": True}))
    row.state = "revoked"
    return row


def rotate(path: Path, prefix: str, now: datetime, expires: datetime | None = None,
           overlap: timedelta = timedelta()) -> Row:
    """A new key in the place of this one, which ends after `overlap`. Raises KeysFailed.

    Without `expires` the new one lives as long as the old one was given to live, `LATEST` at most.
    """
    with _failing(path), _editing(path) as (change, found):
        row = _row(found, prefix, path, now)
        if row.state != "valid":
            raise KeysFailed(f"the key {row.prefix} is {row.state}: make another with `tokenmill keys create "
                             f"{row.tenant}`")
        if expires is None and row.expires is not None:
            if row.created is None:
                raise KeysFailed(f"it is not known how long the key {row.prefix} was given to live: say --expires")
            expires = _after(now, row.expires - row.created)
        key = _new_key(found)
        last = _after(now, overlap) if row.expires is None else min(row.expires, _after(now, overlap))

        def both(document: Any) -> None:
            _entry(document, row).update({"expires": last} if overlap else {"revoked": True})
            _add(document, row.tenant, key, now, expires)

        change(both)
    return Row(row.tenant, key[:PREFIX_LETTERS], "valid", now, expires, key, row.prefix)


def until(said: str, now: datetime) -> datetime | None:
    """When a key expires: `90d`, `12h`, `30m` from now, or a date, or a time; empty: never. Raises KeysFailed."""
    if not said:
        return None
    try:
        found = now + span(said) if _SPAN.fullmatch(said) else datetime.fromisoformat(said)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise KeysFailed(f"{said!r} is no time: write 90d, 12h or 30m, or a date such as 2030-12-31") from None
    if found <= now:
        raise KeysFailed(f"{said!r} has passed: a key has to expire later than now")
    return found.replace(microsecond=0)


def span(said: str) -> timedelta:
    """`90d`, `12h` or `30m`. Raises KeysFailed."""
    found = _SPAN.fullmatch(said)
    if found is None:
        raise KeysFailed(f"{said!r} is no span of time: write 90d, 12h or 30m")
    try:
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except (ValueError, OverflowError):  # int() itself refuses thousands of digits
        raise KeysFailed(f"{said!r} is too long a span of time: write 90d, 12h or 30m, or leave it out") from None


def _after(now: datetime, lived: timedelta) -> datetime:
    """The sum, where there is one; never a time that cannot be said."""
    return now + lived if lived < LATEST - now else LATEST


# --- the document ----------------------------------------------------------------------------------------------------


def _add(document: Any, tenant: str, key: str, now: datetime, expires: datetime | None) -> None:
    """The same for tomlkit's document and for plain dictionaries."""
    plain = not isinstance(document, tomlkit.TOMLDocument)
    table: Any = {} if plain else tomlkit.table()
    table.update({"prefix": key[:PREFIX_LETTERS], "sha256": digest(key), "created": now})
    if expires is not None:
        table.update({"expires": expires})
    tenants = document.setdefault("tenants", {} if plain else tomlkit.table(is_super_table=True))
    if tenant not in tenants:
        # with a heading of its own, below which people write its limits
        tenants[tenant] = {} if plain else tomlkit.table(is_super_table=False).add(tomlkit.nl())
    entry = tenants[tenant]
    if "keys" not in entry:
        entry["keys"] = [] if plain else tomlkit.aot()
    if isinstance(entry["keys"], Array) and not isinstance(entry["keys"], AoT):
        inline = tomlkit.inline_table()
        inline.update(dict(table))
        table = inline
    elif not plain:
        table.add(tomlkit.nl())
    entry["keys"].append(table)


def _entry(document: Any, row: Row) -> Any:
    return next(key for key in document["tenants"][row.tenant]["keys"] if key["prefix"] == row.prefix)


def _new_key(found: Tenants) -> str:
    taken = {key.prefix for tenant in found.named.values() for key in tenant.keys}
    while (key := new_key())[:PREFIX_LETTERS] in taken:
        pass
    return key


def _rows(found: Tenants, now: datetime) -> list[Row]:
    return [_shown(tenant.name, key, now) for tenant in found.named.values() for key in tenant.keys]


def _shown(tenant: str, key: Key, now: datetime) -> Row:
    return Row(tenant, key.prefix, key.state(now.timestamp()), key.created, key.expires)


def _row(found: Tenants, prefix: str, path: Path, now: datetime) -> Row:
    for row in _rows(found, now):
        if row.prefix == prefix[:PREFIX_LETTERS]:
            return row
    raise KeysFailed(f"{path} has no key with the prefix {prefix[:PREFIX_LETTERS]!r}: `tokenmill keys list` shows them")


# --- the file --------------------------------------------------------------------------------------------------------


Change = Callable[[Callable[[Any], None]], None]


@contextlib.contextmanager
def _editing(path: Path, begin: bool = False) -> Iterator[tuple[Change, Tenants]]:
    """What the file has, and how to change it, while its lock is held."""
    path = path.resolve()  # a link stays one
    if begin:
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if begin and not path.exists():
            text = BEGINNING.format(secret=secrets.token_urlsafe(48))
        else:
            text = path.read_text()
        found = _read(text, path)

        def change(how: Callable[[Any], None]) -> None:
            document, plain = tomlkit.parse(text), tomllib.loads(text)
            how(plain)
            how(document)
            changed = tomlkit.dumps(document)
            # what tomlkit makes of unusual ways to write it is not taken on trust
            if not _says(changed, plain):
                raise KeysFailed(f"{path} is written in a way that cannot be changed safely: give each tenant a table "
                                 "[tenants.NAME] and each key one [[tenants.NAME.keys]] below it")
            _read(changed, path)
            _replace(path, changed)

        yield change, found


def _says(text: str, what: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == what
    except tomllib.TOMLDecodeError:
        return False


def _read(text: str, path: Path) -> Tenants:
    try:
        return tenants_file.read(text)
    except ValueError as error:
        raise KeysFailed(f"the tenants file {path} is refused: {error}") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else writes while the block runs. The lock is a file of its own: the other one is replaced."""
    give_up_s = time.monotonic() + LOCK_WITHIN_S
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise KeysFailed(f"somebody has been writing {path} for {LOCK_WITHIN_S:.0f} s: try again, or end "
                                     "that process") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, on the disk before it is seen."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            _keep_owner(path, file.fileno())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _keep_owner(path: Path, descriptor: int) -> None:
    """A gateway that could read the file before, as its owner or of its group, still can. Others cannot."""
    if not path.exists():
        return
    before, after = path.stat(), os.fstat(descriptor)
    if before.st_uid != after.st_uid or before.st_gid != after.st_gid:
        try:
            os.fchown(descriptor, before.st_uid, before.st_gid)
        except PermissionError:
            if before.st_uid != after.st_uid:
                raise KeysFailed(f"{path} belongs to another user: run this as that user") from None
            if before.st_mode & stat.S_IRGRP:
                raise KeysFailed(f"{path} belongs to a group that reads it and that you are not in: run this as a user "
                                 "of that group") from None
    os.fchmod(descriptor, 0o600 | before.st_mode & stat.S_IRGRP)


@contextlib.contextmanager
def _failing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeysFailed(f"the tenants file {path}: {error.strerror}, nothing was changed") from None
    except ValueError as error:
        raise KeysFailed(str(error)) from None
