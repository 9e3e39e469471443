"""The tenants file: who may ask, as people write it and `tokenmill keys` keeps it.

Rules: all gateways of a mesh read the same file; what nobody knows is refused by name, so that no limit is lost to a
slip of the pen; an error never repeats the secret or a digest. People save the file in place, so a change is read once
two looks in a row have seen the same file and nobody writes meanwhile; who replaces the file whole is safe from slow
writers too.

    secret = "..."                      # at least 32 characters, for cache salts: whoever changes it empties the caches

    [tenants.acme]
    weight = 4                          # share of a full mesh, 1 when left out
    residency = "eu"                    # zones split by commas; left out: any
    models = ["a"]                      # names or aliases of models; left out: all
    tiers = ["default", "flex"]         # who asks for none gets default, else the first; left out: all
    requests_per_minute = 600           # left out: no limit, as the next two
    tokens_per_minute = 100000          # prompts and answers
    concurrency = 16                    # streams under way
    spend_per_day = 5.00                # dollars, in days and months of UTC; they need a ledger (--database)
    spend_per_month = 100.00

    [[tenants.acme.keys]]
    prefix = "tm-1a2b3c4d"
    sha256 = "..."
    created = 2026-01-01T00:00:00Z
    expires = 2027-01-01T00:00:00Z      # left out: never
    revoked = true                      # left out: false
"""

import os
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from gateway.tenants import Key, Limits, Tenant, Tenants, check_name
from shared.blocks import tenant_salt
from shared.pricing import nanos
from shared.residency import parse
from shared.tiers import LEAST_WEIGHT, MOST_WEIGHT, TIERS, Tier

LEAST_SECRET = 32
Signature = tuple[int, ...]

AtLeastOne = Annotated[int, Meta(ge=1, le=1 << 53)]  # what a float counts exactly: buckets are floats


class _Entry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    weight: Annotated[float, Meta(ge=LEAST_WEIGHT, le=MOST_WEIGHT)] = 1.0
    residency: str = ""
    models: list[str] | None = None
    tiers: Annotated[list[Tier], Meta(min_length=1)] | None = None
    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    concurrency: AtLeastOne | None = None
    spend_per_day: Any = None
    spend_per_month: Any = None
    keys: list[Key] = []


class _File(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    secret: Annotated[str, Meta(min_length=LEAST_SECRET)]
    tenants: dict[str, Any] = {}


class Unsettled(ValueError):
    """Somebody writes the file just now: to be looked at again."""


class TenantsFile:
    """The file of one gateway, to be read again when its times, size or inode changed."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._read: Signature | None = None  # None also after it could not be read: to be tried again
        self._seen: Signature | None = None  # at the last look
        self._settled: Signature | None = None  # what the next reading has to find

    def changed(self) -> bool:
        """Whether it is another file than the one read last, and has been since the look before. Does not wait."""
        before, self._seen = self._seen, _signature(self._path)
        self._settled = self._seen if before == self._seen != self._read else None
        return self._settled is not None

    def read(self) -> Tenants:
        """Everybody in it. Raises ValueError with a sentence that says what is wrong, Unsettled to try again."""
        settled, self._settled, self._read = self._settled, None, None
        try:
            with self._path.open("rb") as file:
                before = _shown(os.fstat(file.fileno()))
                text = file.read()
                # one that is replaced meanwhile stays whole, and the next look sees the other
                written = before[:2] != _shown(os.fstat(file.fileno()))[:2]
        except OSError as error:
            raise ValueError(f"cannot read the tenants file {self._path}: {error.strerror}") from None
        if written or settled not in (None, before):
            raise Unsettled(f"the tenants file {self._path} is being written: try again when that is done")
        try:
            found = read(text.decode())
        except ValueError as error:
            self._read = before  # not to be read again before it is another one
            raise ValueError(f"the tenants file {self._path} is refused: {error}") from None
        self._read = before
        return found


def read(text: str) -> Tenants:
    """The tenants of a file's text. Raises ValueError saying what is wrong where."""
    try:
        return _tenants(text)
    except RecursionError:
        raise ValueError("its tables or lists are nested too deeply: no tenant needs that") from None


def _tenants(text: str) -> Tenants:
    try:
        found = msgspec.convert(tomllib.loads(text), _File)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        if "secret" in str(error):
            raise ValueError(f"it needs a secret of {LEAST_SECRET} characters or more: let `tokenmill keys create` "
                             "begin a file") from None
        raise ValueError(_where(error, "")) from None
    secret = sha256(found.secret.encode()).digest()  # a key of BLAKE2b has 64 bytes at most
    return Tenants([_tenant(name, entry, secret) for name, entry in found.tenants.items()])


def _tenant(name: str, table: Any, secret: bytes) -> Tenant:
    check_name(name)
    try:
        entry = msgspec.convert(table, _Entry)
        residency = parse(entry.residency)
    except msgspec.ValidationError as error:
        raise ValueError(_where(error, f"tenants.{name}")) from None
    except ValueError as error:
        raise ValueError(f"tenants.{name}.residency: {error}") from None
    tiers = TIERS if entry.tiers is None else tuple(dict.fromkeys(entry.tiers))
    return Tenant(name, tenant_salt(secret, name), entry.weight, residency,
                  None if entry.models is None else tuple(entry.models), tiers,
                  Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.concurrency,
                         _money(name, "spend_per_day", entry.spend_per_day),
                         _money(name, "spend_per_month", entry.spend_per_month)), tuple(entry.keys))


def _money(name: str, field: str, said: Any) -> int | None:
    """Nano-dollars. Raises ValueError."""
    try:
        if isinstance(said, bool):
            raise ValueError(f"{said} is no amount of dollars: write such as 5.00")
        return None if said is None else nanos(said)
    except ValueError as error:
        raise ValueError(f"tenants.{name}.{field}: {error}") from None


def _where(error: msgspec.ValidationError, table: str) -> str:
    """msgspec's sentence, led by the path of what is wrong."""
    what, _, path = str(error).partition(" - at `$")
    where = table + path.rstrip("`")
    return f"{where.lstrip('.')}: {what}" if where else what


def _signature(path: Path) -> Signature:
    """Empty for a file that is not there."""
    try:
        return _shown(path.stat())
    except OSError:
        return ()


def _shown(found: os.stat_result) -> Signature:
    # the change of its owner or mode may be what lets it be read
    return found.st_mtime_ns, found.st_size, found.st_ctime_ns, found.st_ino
