"""Who asks, and what they may: tenants, their keys and their limits.

Rules: a key is 256 random bits, and only its SHA-256 is kept; its first letters (`tm-` and eight more) are no secret
and find it; digests are compared in constant time. Where nobody needs a key everybody is `default`. Cache salts derive
from a secret of the installation (law 10): whoever does not know it cannot guess the name of a block.
Pure: the caller passes unix seconds.
"""

import re
import secrets
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from hmac import compare_digest
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from shared.blocks import tenant_salt
from shared.errors import NotAuthorised, PermissionDenied
from shared.messages import Residency
from shared.residency import intersect
from shared.tiers import TIERS, Tier

EVERYBODY = "default"
PREFIX_LETTERS = 11
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_KEY = re.compile(r"tm-[0-9a-f]{8}-[0-9A-Za-z_-]{43}")
_NO_KEY = "0" * 64  # the digest of none

Scope = Literal["generate", "usage"]
SCOPES: tuple[Scope, ...] = ("generate", "usage")  # ask models; read what was used
# of people: owner and admin may change who may ask, billing may read and set what is spent, viewer may read
Role = Literal["owner", "admin", "billing", "viewer"]
ROLES: tuple[Role, ...] = ("owner", "admin", "billing", "viewer")


class Key(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key, without the key. Times with their zone."""

    prefix: Annotated[str, Meta(pattern="^tm-[0-9a-f]{8}$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    created: Annotated[datetime, Meta(tz=True)] | None = None
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    revoked: bool = False
    scopes: tuple[Scope, ...] | None = None  # None: all

    def state(self, wall_s: float) -> str:
        """valid, expired or revoked."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires is not None and self.expires.timestamp() <= wall_s else "valid"


class Limits(Struct, frozen=True):
    """Of one tenant at one gateway; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None  # streams under way
    # nano-dollars in a day and a month of UTC, at all gateways of one database
    spend_per_day: int | None = None
    spend_per_month: int | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in self.__struct_fields__)

    @property
    def of_money(self) -> bool:
        """Whether it needs a ledger."""
        return not (self.spend_per_day is self.spend_per_month is None)


class Tenant(Struct, frozen=True):
    """Who asks, once a key has said so. `models`: names or aliases, None for all."""

    name: str
    salt: bytes
    weight: float = 1.0
    residency: Residency = Residency()
    models: tuple[str, ...] | None = None
    tiers: tuple[Tier, ...] = TIERS
    limits: Limits = Limits()
    keys: tuple[Key, ...] = ()
    organisation: str = ""
    key: str = ""  # prefix of the one that it came with
    scopes: tuple[Scope, ...] | None = None  # of that one; None: all
    role: Role | None = None  # of a person, who is no tenant, in `organisation`, or in all if that is empty

    def need(self, scope: Scope) -> None:
        """Raises PermissionDenied where this key's scopes do not have it."""
        if self.scopes is not None and scope not in self.scopes:
            raise PermissionDenied(f"the API key {self.key}... has not the scope {scope!r}: use another")

    def within(self, policy: Residency) -> Residency:
        """A request's policy narrowed to the tenant's zones. Raises PermissionDenied when nothing is left."""
        both = intersect(policy, self.residency)
        if both is None:
            raise PermissionDenied(f"this request may go to {', '.join(policy.zones)}, and this key's tenant to "
                                   f"{', '.join(self.residency.zones)} only")
        return both

    def tier_of(self, tier: Tier, asked: bool) -> Tier:
        """The tier to serve; the first allowed one for who did not ask. Raises PermissionDenied."""
        if tier in self.tiers:
            return tier
        if not asked:
            return self.tiers[0]
        raise PermissionDenied(f"this key's tenant may not use the service tier {tier!r}: ask for "
                               f"{', '.join(self.tiers)}, or leave it out", param="service_tier")


class Tenants:
    """Everybody who may ask. `keyed`: a key says who it is."""

    def __init__(self, tenants: Iterable[Tenant], everybody: Tenant | None = None,
                 people: Iterable[tuple[Key, Role, str]] = ()) -> None:
        """`everybody`: who asks without a key. `people`: keys with a role in an organisation (empty: in all).

        Raises ValueError when two keys have one prefix.
        """
        self.named = {tenant.name: tenant for tenant in tenants}
        self.keyed = everybody is None
        self._everybody = everybody
        self._by_prefix: dict[str, tuple[Tenant, Key]] = {}
        for tenant in self.named.values():
            for key in tenant.keys:
                self._let_in(tenant, key)
        for key, role, organisation in people:
            # '@' is in no tenant's name
            self._let_in(Tenant(f"@{organisation}", b"", models=(), organisation=organisation, role=role),
                         replace(key, scopes=("usage",)))

    def asking(self, headers: Iterable[tuple[bytes, bytes]], wall_s: float) -> Tenant:
        """Whose key came with a request. Raises NotAuthorised."""
        if self._everybody is not None:
            return self._everybody
        said = key_in(headers)
        if not said:
            raise NotAuthorised("no API key came with this request: send it as `Authorization: Bearer KEY`")
        tenant, key = self._by_prefix.get(said[:PREFIX_LETTERS], (None, None))
        same = compare_digest(digest(said), key.sha256 if key else _NO_KEY)
        if tenant is None or key is None or not same:
            raise NotAuthorised("this API key is not known here: check it, or ask for another")
        if (state := key.state(wall_s)) != "valid":
            raise NotAuthorised(f"the API key {key.prefix}... is {state}: ask for another")
        return tenant


    def _let_in(self, tenant: Tenant, key: Key) -> None:
        if key.prefix in self._by_prefix:
            raise ValueError(f"two keys have the prefix {key.prefix}: take one out and create another")
        self._by_prefix[key.prefix] = (replace(tenant, key=key.prefix, scopes=key.scopes), key)


def everybody(secret: str) -> Tenants:
    """Nobody needs a key, and all are one tenant."""
    tenant = Tenant(EVERYBODY, tenant_salt(secret.encode(), EVERYBODY))
    return Tenants([tenant], tenant)


def check_name(name: str) -> str:
    """`name`, which can be a tenant's. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no tenant's name: use small letters, digits, '-' and '_', at most 63")
    return name


def new_key() -> str:
    """A key that nobody can guess, to be shown once."""
    return f"tm-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """What is kept of a key."""
    return sha256(key.encode()).hexdigest()


def key_in(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key of a request: `Authorization: Bearer KEY`, else `x-api-key: KEY`; empty when none came."""
    other = ""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, rest = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return _shaped(rest)
        elif name == b"x-api-key":
            other = value.decode("latin-1")
    return _shaped(other)


def _shaped(said: str) -> str:
    """Only what could be a key is hashed; the rest is a key that nobody has."""
    said = said.strip()
    return said if not said or _KEY.fullmatch(said) else "?"
