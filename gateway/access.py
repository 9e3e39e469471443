"""Whose request it is, and whether there is room for it in its tenant's limits.

Rules: what cannot be read at the start is an error; what goes bad later is refused, said once in the log, and what was
read before stays. A key that is revoked opens nothing new; what runs ends. What a request took is given back once,
however it ends. Neither keys nor digests reach a log.

    headers --asking--> Tenant --counted--> one request more of this minute
                               --under_way--> its streams, then the tokens they may come to, until it ends
"""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import structlog

from gateway import tenants
from gateway.limits import Headers, Meter
from gateway.tenants import Tenant, Tenants
from gateway.tenants_file import TenantsFile, Unsettled
from shared.clock import Clock
from shared.settings import GatewaySettings

if TYPE_CHECKING:
    from gateway.state.database import Database

log = structlog.get_logger("gateway.access")


class Source(Protocol):
    """Where tenants are kept: a file, or one day a database."""

    def changed(self) -> bool:
        """Whether it is worth reading again. Must not wait."""

    def read(self) -> Tenants | None:
        """Everybody there is; None: the same as at the last reading. May wait: it is called in a thread. Raises
        ValueError with a sentence for people, Unsettled to be asked again."""


class Everybody:
    """The source where nobody needs a key."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def changed(self) -> bool:
        return False

    def read(self) -> Tenants:
        return tenants.everybody(self._secret)


def source_of(settings: GatewaySettings, database: "Database | None") -> Source:
    """Where this gateway's tenants are: in the file, where one is named, else in the database, if there is one."""
    if settings.tenants:
        return TenantsFile(settings.tenants)
    if database is None:
        return Everybody(settings.cache_secret)
    from gateway.state.directory import DirectorySource

    return DirectorySource(database)


class Use:
    """What one request has of its tenant's limits."""

    def __init__(self, meter: Meter, clock: Clock) -> None:
        self.used_tokens = 0  # to be told before it ends
        self._meter = meter
        self._clock = clock
        self._reserved = 0

    def reserve(self, tokens: int) -> None:
        """Set aside what it may come to, once. Raises RateLimited."""
        self._meter.reserve(tokens, self._clock.now())
        self._reserved = tokens

    def settle(self) -> None:
        """Give back what was set aside and not used."""
        self._meter.settle(self._reserved, self.used_tokens if self._reserved else 0, self._clock.now())


class Access:
    """The tenants of one gateway, and what each has used here."""

    def __init__(self, source: Source, clock: Clock, charges: bool = False) -> None:
        """`charges`: whether there is a ledger. Raises ValueError for a source that cannot be read."""
        self._source = source
        self._charges = charges
        self._clock = clock
        self._complaint = ""
        self._meters: dict[str, Meter] = {}
        found = source.read()
        assert found is not None, "nothing was read before"
        self._tenants = self._kept_to(found)

    @property
    def keyed(self) -> bool:
        """Whether a request needs a key."""
        return self._tenants.keyed

    @property
    def refused(self) -> bool:
        """Whether what stands in the source now is not what holds here."""
        return bool(self._complaint)

    def asking(self, headers: Iterable[tuple[bytes, bytes]]) -> Tenant:
        """Whose key came with a request. Raises NotAuthorised."""
        return self._tenants.asking(headers, self._clock.wall())

    def count(self, tenant: Tenant) -> None:
        """One request more of this minute. Raises RateLimited."""
        self._meter(tenant).count(self._clock.now())

    @contextlib.contextmanager
    def under_way(self, tenant: Tenant, streams: int) -> Iterator[Use]:
        """So many streams of one request while the block runs. Raises RateLimited."""
        meter = self._meter(tenant)
        meter.enter(streams)
        use = Use(meter, self._clock)
        try:
            yield use
        finally:
            use.settle()
            meter.leave(streams)

    def headers(self, tenant: Tenant) -> Headers:
        """What an answer to `tenant` says of its limits now; nothing where it has none."""
        return self._meter(tenant).headers(self._clock.now())

    async def follow(self) -> None:
        """Take in what changed in the source. What goes wrong with it, whatever it is, ends no gateway."""
        try:
            if not self._source.changed():
                return
            found = await asyncio.to_thread(self._source.read)
            if found is not None:
                self._kept_to(found)
        except Unsettled:
            return
        except ValueError as error:
            self._refuse(str(error))
            return
        except Exception as error:
            # its words are nobody's here: they may repeat what was read
            self._refuse(f"reading the tenants failed with {type(error).__name__}: this is a fault of the gateway")
            return
        self._complaint = ""
        if found is None:
            return
        self._tenants = found
        self._meters = {name: meter for name, meter in self._meters.items()
                        if name in self._tenants.named or meter.streams}
        for name, meter in self._meters.items():
            tenant = self._tenants.named.get(name)
            if tenant is not None and tenant.limits != meter.limits:
                meter.change(tenant.limits, self._clock.now())
        log.info("tenants_read", tenants=len(self._tenants.named))

    def _kept_to(self, tenants: Tenants) -> Tenants:
        """`tenants`, whose limits this gateway can keep them to. Raises ValueError."""
        limited = [name for name, tenant in tenants.named.items() if tenant.limits.of_money]
        if limited and not self._charges:
            raise ValueError(f"{limited[0]} may spend so much and no more, and this gateway has no ledger to know what "
                             "it spent: start it with --database and --prices")
        return tenants

    def _refuse(self, reason: str) -> None:
        if self._complaint != reason:
            self._complaint = reason
            log.warning("tenants_refused", reason=reason, kept=len(self._tenants.named))

    def _meter(self, tenant: Tenant) -> Meter:
        meter = self._meters.get(tenant.name)
        if meter is None:
            # a request may have come before its tenant's limits changed
            limits = self._tenants.named.get(tenant.name, tenant).limits
            meter = self._meters[tenant.name] = Meter(limits, self._clock.now())
        return meter
