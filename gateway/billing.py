"""What requests cost, from before they start until it stands in the ledger.

Rules: no request waits for the database but one that comes with an idempotency key, and one for which its gateway's
lease on a budget is too small: both wait a few seconds at most. What has ended is noted on this gateway's own disk at
once, what runs once a second, and the ledger hears of it from a queue, as often as it takes. Everything is bounded:
when too much is unwritten, new requests are refused. Without a price sheet there is none of this.

    account() --Account--> Answer --counts--> journal --> queue --> Books.settle
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from msgspec import Struct
from msgspec.structs import replace

from gateway.journal import Journal, Note
from gateway.ledger import Record, day_of
from gateway.purse import Purse, budget_of
from gateway.tenants import Tenant
from shared import pricing
from shared.clock import Clock
from shared.errors import BadRequest, MeshUnavailable, Overloaded
from shared.messages import Residency
from shared.pricing import Price, PriceSheet, Usage
from shared.settings import GatewaySettings

if TYPE_CHECKING:
    from gateway.metrics import Metrics
    from gateway.state.books import Books
    from gateway.state.database import Database
    from gateway.state.once import Once, Onces

T = TypeVar("T")

LAST_WORD_S = 0.5  # for workers to say what a stream took that ended here
ASK_S = 5.0  # for the database to grant a lease, or to begin an idempotency key
MOST_UNWRITTEN = 20_000  # records of about 400 bytes
BATCH = 500
GATHER_S = 0.05  # what ends meanwhile is written together: a transaction of 20 takes little longer than one of 1
RETRY_S = 0.5  # first pause after the database failed; doubles
MOST_RETRY_S = 10.0
KEEP_HOUSE_S = 20.0
# a gateway that has not renewed its leases for so long is gone
GONE_S = 600.0
IDLE_S = 60.0  # a lease that nobody uses goes back to the others
NOTE_S = 1.0  # between notes on a request that runs: what a killed gateway forgets of it
STOP_S = 5.0

log = structlog.get_logger("gateway.billing")


class Counts(Struct, frozen=True, kw_only=True):
    """What a request has come to so far, as the ledger's `Record` has it."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    attempts: int = 1
    outcome: str = ""
    worker_us: int = 0
    cost: int | None = None


def _nobody(call: Callable[[], None]) -> int:
    return 0


def _nothing() -> None:
    pass


class Account:
    """One request's: what it is priced at, and what it has reserved. `counts` is told by who answers it."""

    def __init__(self, record: Record, price: Price | None, purse: Purse | None = None, reserved: int = 0,
                 once: "Once | None" = None) -> None:
        self.counts: Callable[[], Counts] = Counts
        # has a function called for each worker that has yet to say what it took; how many these are
        self.hear_out: Callable[[Callable[[], None]], int] = _nobody
        self.hear_no_more: Callable[[], None] = _nothing
        self.unheard = 0
        self.price = price
        self.purse = purse
        self.reserved = reserved
        self.noted = record  # as it was last written to the journal
        self._record = record
        self._once = once

    @property
    def request(self) -> str:
        return self._record.request

    @property
    def lease(self) -> str:
        return "" if self.purse is None else self.purse.lease

    def part(self) -> None:
        """Who answered has gone, and is not kept."""
        self.hear_no_more()
        self.counts, self.hear_out, self.hear_no_more = Counts, _nobody, _nothing

    def record(self, at: int, counts: Counts | None = None) -> Record:
        """It, as it stands, or would stand with these counts: what was charged under its idempotency key before is not
        charged again."""
        counts, before = counts or self.counts(), self._once
        prompt = counts.prompt_tokens - min(counts.prompt_tokens, before.prompt_tokens if before else 0)
        generated = counts.generated_tokens - min(counts.generated_tokens, before.generated_tokens if before else 0)
        return replace(
            self._record, at=at, prompt_tokens=prompt, cached_tokens=min(counts.cached_tokens, prompt),
            generated_tokens=generated, draft_tokens=counts.draft_tokens,
            accepted_draft_tokens=counts.accepted_draft_tokens, attempts=counts.attempts, outcome=counts.outcome,
            worker_us=counts.worker_us, cost=counts.cost)


class Billing:
    """The books of one gateway."""

    def __init__(self, gateway: str, settings: GatewaySettings, clock: Clock, metrics: "Metrics",
                 models: list[str]) -> None:
        """Raises ValueError for prices that cannot be read or are missing, and for a database that cannot be used;
        OSError for a journal that cannot be kept."""
        self.sheet = _sheet(settings, models)
        self.database: Database | None = None
        self._books: Books | None = None
        self._onces: Onces | None = None
        self._journal: Journal | None = None
        self._gateway = gateway
        self._clock = clock
        self._metrics = metrics
        self._purses: dict[tuple[str, str], Purse] = {}
        self._endless: dict[tuple[str, str], str] = {}  # leases of tenants without a budget, by tenant and day
        self._asking: dict[tuple[str, str], asyncio.Lock] = {}
        self._running: dict[str, Account] = {}
        self._to_note: deque[str] = deque()  # requests, in the order in which their turns come
        self._unheard: dict[str, tuple[Account, Record, asyncio.TimerHandle]] = {}  # ended, but for last words
        self._unwritten: deque[tuple[Record, str, Purse | None]] = deque()  # with the lease
        self._some = asyncio.Event()
        self._all_written = asyncio.Event()
        self._all_written.set()
        self._written = 0
        self._failing = False
        self._late: set[asyncio.Task[Any]] = set()  # questions whose askers are gone
        if settings.database:
            self._open(settings)

    def _open(self, settings: GatewaySettings) -> None:
        from gateway.state.books import Books
        from gateway.state.database import open_database
        from gateway.state.once import Onces

        self.database = open_database(settings.database)
        self._books = Books(self.database)
        self._onces = Onces(self.database, round(1000 * (settings.request_timeout_s + 60)))
        if settings.journal:
            self._journal = Journal(Path(settings.journal))
        self._metrics.ledger_unwritten.set_function(lambda: len(self._unwritten))
        self._metrics.ledger_failing.set_function(lambda: self._failing)

    # --- one request -------------------------------------------------------------------------------------------------

    def price(self, model: str, tier: str, residency: Residency) -> Price | None:
        """What `model` costs; None where nothing has a price. Raises BadRequest where only this has none."""
        if self.sheet is None:
            return None
        price = self.sheet.price(model, tier, residency.zones)
        if price is None:
            where = f" in {', '.join(residency.zones)}" if residency.zones else ""
            raise BadRequest(f"the model {model!r} has no price at the tier {tier!r}{where}: ask for another tier, or "
                             "other zones", param="service_tier")
        return price

    @contextlib.asynccontextmanager
    async def account(self, request: str, tenant: Tenant, model: str, tier: str, price: Price | None,
                      most: Usage, once: tuple[str, str] | None = None) -> AsyncIterator[Account]:
        """An account for one request while the block runs; what it came to is settled when the block ends.

        `most`: what it may come to. `once`: digests of its idempotency key and its body. Raises BudgetSpent,
        RateLimited, Overloaded, MeshUnavailable, InProgress, KeyReused.
        """
        record = Record(request=request, tenant=tenant.name, day=day_of(self._now()), at=self._now(), key=tenant.key,
                        model=model, tier=tier)
        if price is not None:
            record = replace(record, region=price.region, batch=price.batch, input=price.input,
                             cached_input=price.cached_input, output=price.output)
        if self._books is None:
            account = Account(record, price)
            try:
                yield account
            finally:
                account.part()
            return
        if len(self._unwritten) + len(self._unheard) >= MOST_UNWRITTEN:
            raise Overloaded("the ledger is too far behind: retry later", retry_after_s=2.0)
        purse, reserved = None, 0
        if price is not None and tenant.limits.of_money:
            reserved = pricing.charge(price, most)
            purse = await self._reserve(tenant, record.day, reserved)
        begun = None
        try:
            if once is not None and self._onces is not None:
                begun = await self._ask(partial(self._onces.begin, tenant.name, *once, self._now()), self._end_once)
                record = replace(record, once=begun.name)
        except BaseException:
            if purse is not None:
                purse.give_back(reserved)
            raise
        account = Account(record, price, purse, reserved, begun)
        self._running[request] = account
        self._to_note.append(request)
        try:
            yield account
        finally:
            self._settle(account)
            if not account.unheard:
                account.part()

    def tick(self) -> None:
        """A tenth of a second has passed: note a tenth of those that run, as far as they have changed."""
        if self._journal is None:
            return
        for _ in range(-(-len(self._to_note) // 10)):
            account = self._running.get(self._to_note.popleft())
            if account is None:
                continue
            self._to_note.append(account.request)
            record = replace(account.record(account.noted.at), outcome="gateway_died")
            if not record.generated_tokens:  # it would have had nothing
                record = replace(record, prompt_tokens=0, cached_tokens=0)
            if record != account.noted:
                account.noted = replace(record, at=self._now())
                self._note(Note(account.noted, account.lease, ended=False))

    # --- life --------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Settle what a gateway before this one left, and write while the block runs. Raises ValueError."""
        if self._books is None:
            yield
            return
        await self._recover(self._books)
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = [tasks.create_task(loop(self._books), name=f"{self._gateway}-{loop.__name__}")
                         for loop in (self._write, self._keep_house)]
                try:
                    yield
                finally:
                    for task in loops:
                        task.cancel()
        finally:
            await self._stop(self._books)

    async def flush(self, within_s: float = ASK_S) -> None:
        """Until all that has ended is in the ledger, or for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._all_written.wait()

    async def _recover(self, books: "Books") -> None:
        notes = self._journal.left() if self._journal is not None else []
        if notes:
            under = {note.record.request: note.lease for note in notes if note.lease}
            settled = await asyncio.to_thread(books.settle, self._gateway, [note.record for note in notes],
                                              self._now(), under)
            log.warning("ledger_recovered", requests=len(notes), settled=settled,
                        cut_off=sum(not note.ended for note in notes))
        if self._journal is not None:
            self._journal.settled()
        # leases under this name are those of an earlier life
        await asyncio.to_thread(books.sweep, self._now() + 1, self._now(), self._gateway)

    async def _write(self, books: "Books") -> None:
        pause_s = RETRY_S
        while True:
            await self._some.wait()
            await self._clock.sleep(GATHER_S)
            batch = [self._unwritten[number] for number in range(min(BATCH, len(self._unwritten)))]
            if not batch:
                self._some.clear()
                continue
            try:
                await self._settle_batch(books, batch)
            except Exception as error:
                self._failed(error)
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, MOST_RETRY_S)
                continue
            self._answered()
            pause_s = RETRY_S
            self._taken(len(batch))

    async def _settle_batch(self, books: "Books", batch: list[tuple[Record, str, Purse | None]]) -> None:
        under = {record.request: name for record, lease, _ in batch
                 if (name := lease or self._endless.get((record.tenant, record.day)))}
        opened: dict[tuple[str, str], str] = {}
        await asyncio.to_thread(books.settle, self._gateway, [record for record, _, _ in batch], self._now(), under,
                                opened)
        self._endless |= opened

    def _taken(self, count: int) -> None:
        for _ in range(count):
            record, _, purse = self._unwritten.popleft()
            if purse is not None:
                purse.written(record.amount)
        self._written += count
        if not self._unwritten and not self._unheard:
            self._all_written.set()
        if self._journal is not None:
            self._journal.written(self._written)

    async def _keep_house(self, books: "Books") -> None:
        while True:
            await self._clock.sleep(KEEP_HOUSE_S)
            try:
                await asyncio.to_thread(books.renew, self._gateway, self._now())
                before = self._now() - round(1000 * GONE_S)
                if given_back := await asyncio.to_thread(books.sweep, before, self._now()):
                    log.info("leases_swept", given_back_usd=pricing.shown(given_back))
                if self._onces is not None:
                    await asyncio.to_thread(self._onces.forget, self._now())
                await self._give_back(books)
                self._answered()
            except Exception as error:
                self._failed(error)

    async def _give_back(self, books: "Books") -> None:
        """Leases of days that have passed, and those that nobody uses."""
        today = day_of(self._now())
        for name, purse in list(self._purses.items()):
            if purse.idle and (purse.day != today or self._clock.now() - purse.used_s >= IDLE_S):
                del self._purses[name]
                self._asking.pop(name, None)
                if purse.lease:
                    await asyncio.to_thread(books.release, purse.lease, self._now())
        for tenant, day in [name for name in self._endless if name[1] != today]:
            # a request of that day may still run: it gets another
            await asyncio.to_thread(books.release, self._endless.pop((tenant, day)), self._now())

    async def _stop(self, books: "Books") -> None:
        """Write what is left and give back all leases, for a while: the journal has the rest."""
        clean = False
        for request in list(self._unheard):
            self._hand_over(request)
        with contextlib.suppress(TimeoutError, ValueError):
            async with asyncio.timeout(STOP_S):
                while self._unwritten:
                    batch = [self._unwritten[number] for number in range(min(BATCH, len(self._unwritten)))]
                    await self._settle_batch(books, batch)
                    self._taken(len(batch))
                clean = not self._running
                await asyncio.to_thread(books.sweep, self._now() + 1, self._now(), self._gateway)
        if self._unwritten:
            log.warning("ledger_unwritten", requests=len(self._unwritten), kept_in_journal=self._journal is not None)
        if self._journal is not None:
            self._journal.close(clean)
        if self.database is not None:
            self.database.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _reserve(self, tenant: Tenant, day: str, amount: int) -> Purse:
        """Room for `amount` in the tenant's budget. Raises BudgetSpent, RateLimited, MeshUnavailable."""
        name = (tenant.name, day)
        purse = self._purse(name)
        if purse.reserve(amount, self._clock.now()):
            return purse
        async with self._asking.setdefault(name, asyncio.Lock()):
            # somebody may have asked, or ended, meanwhile; or everything was given back
            purse = self._purse(name)
            now_s = self._clock.now()
            if purse.reserve(amount, now_s):
                return purse
            if (refusal := purse.refused(amount, now_s)) is not None:
                raise refusal
            assert self._books is not None
            before = purse.free
            granted = await self._ask(partial(
                self._books.grant, self._gateway, tenant.name, day, purse.wanted(amount, tenant.limits),
                amount - before, budget_of(tenant.limits), self._now(), purse.lease), purse.granted)
            purse.granted(granted)
            self._purses[name] = purse
            if (share := purse.passed(granted, tenant.limits)) is not None:
                log.warning("budget_used", tenant=tenant.name, period=granted.period, share=f"{share:.0%}",
                            limit_usd=pricing.shown(purse.limit(granted, tenant.limits)))
            if purse.reserve(amount, self._clock.now()):
                return purse
            raise purse.refuse(amount, granted, tenant.limits, self._clock.now())

    def _purse(self, name: tuple[str, str]) -> Purse:
        purse = self._purses.get(name)
        if purse is None:
            purse = self._purses[name] = Purse(*name, self._clock.now())
        return purse

    async def _ask(self, question: Callable[[], T], late: Callable[[T], object]) -> T:
        """What the database says, in a while; to `late` where nobody waits for it any more. Raises MeshUnavailable."""
        asking = asyncio.create_task(asyncio.to_thread(question))
        try:
            async with asyncio.timeout(ASK_S):
                answer = await asyncio.shield(asking)
            self._answered()
            return answer
        except (TimeoutError, ValueError) as error:
            self._failed(error)
            raise MeshUnavailable("the ledger does not answer, and this request cannot be charged without it: retry "
                                  "later", retry_after_s=2.0) from None
        finally:
            if not asking.done():
                self._late.add(asking)
                asking.add_done_callback(partial(self._heard_late, late))

    def _heard_late(self, late: Callable[[T], object], asked: "asyncio.Task[T]") -> None:
        self._late.discard(asked)
        if not asked.cancelled() and asked.exception() is None:
            late(asked.result())

    def _end_once(self, begun: "Once") -> None:
        """Nobody waits for this key any more."""
        assert self._onces is not None
        ending = asyncio.create_task(asyncio.to_thread(self._onces.end, begun.name, self._now()))
        self._late.add(ending)
        ending.add_done_callback(partial(self._heard_late, bool))

    def _settle(self, account: Account) -> None:
        """It has ended."""
        del self._running[account.request]
        record = account.record(self._now())
        amount = record.amount
        if account.purse is not None:
            account.purse.settle(account.reserved, amount)
        self._all_written.clear()
        self._metrics.charged_usd.labels(record.model).inc(amount / pricing.NANOS)
        account.unheard = account.hear_out(partial(self._heard, account))
        if account.unheard:
            late = asyncio.get_running_loop().call_later(LAST_WORD_S, self._hand_over, account.request)
            self._unheard[account.request] = (account, record, late)
            self._note(Note(record, account.lease, ended=False))
        else:
            self._enqueue(account, record)

    def _heard(self, account: Account) -> None:
        """One more worker has said what it took."""
        account.unheard -= 1
        if not account.unheard:
            self._hand_over(account.request)

    def _hand_over(self, request: str) -> None:
        """Nothing more is waited for: what it took is known, or will not be. What it is charged stays."""
        account, record, late = self._unheard.pop(request, (None, None, None))
        if account is None or record is None or late is None:
            return
        late.cancel()
        counts = account.counts()
        record = replace(record, draft_tokens=counts.draft_tokens, worker_us=counts.worker_us, cost=counts.cost,
                         accepted_draft_tokens=counts.accepted_draft_tokens)
        account.part()
        self._enqueue(account, record)

    def _enqueue(self, account: Account, record: Record) -> None:
        self._note(Note(record, account.lease))
        self._unwritten.append((record, account.lease, account.purse))
        self._some.set()
        if record.cost is not None:
            self._metrics.cost_usd.labels(record.model).inc(record.cost / pricing.NANOS)

    def _note(self, note: Note) -> None:
        if self._journal is None:
            return
        try:
            self._journal.note(note)
            if self._journal.is_full:
                running = [Note(account.noted, account.lease, ended=False) for account in self._running.values()]
                self._journal.turn_over(running + [Note(record, account.lease, ended=False)
                                                   for account, record, _ in self._unheard.values()])
        except OSError as error:
            self._failed(error)

    def _answered(self) -> None:
        if self._failing:
            self._failing = False
            log.info("ledger_answers_again", unwritten=len(self._unwritten))

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning("ledger_failing", reason=str(error) or type(error).__name__, unwritten=len(self._unwritten))

    def _now(self) -> int:
        """Unix milliseconds."""
        return round(self._clock.wall() * 1000)


def _sheet(settings: GatewaySettings, models: list[str]) -> PriceSheet | None:
    """The prices of this gateway. Raises ValueError."""
    if not settings.prices:
        if settings.database:
            raise ValueError("a ledger needs prices: say --prices FILE (deploy/prices.toml is one)")
        return None
    try:
        sheet = pricing.read(Path(settings.prices).read_text())
    except OSError as error:
        raise ValueError(f"cannot read the price sheet {settings.prices}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"the price sheet {settings.prices} is refused: {error}") from None
    if missing := sheet.unpriced(models):
        shown = ", ".join(f"{model} at {tier}" for model, tier in missing)
        raise ValueError(f"the price sheet {settings.prices} has no price for {shown}: add one, or one for all models")
    return sheet


def document(sheet: PriceSheet | None) -> dict[str, Any]:
    """The sheet as JSON: dollars, exact."""
    prices = [] if sheet is None else [{
        "model": price.model, "tier": price.tier, "region": price.region, "input": pricing.shown(price.input, 2),
        "cached_input": pricing.shown(price.cached_input, 2), "output": pricing.shown(price.output, 2)}
        for price in sheet.prices]
    return {"object": "prices", "currency": "USD", "per_tokens": pricing.MILLION, "data": prices}
