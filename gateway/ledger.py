"""The ledger: what was set aside, what requests came to, what was given back; and whether all of that adds up.

A gateway takes a *lease* of a tenant's budget for a day, so that requests need not ask the database: it reserves an
amount, settles each request that has ended against it, and releases what is left.

    reserve 50 --> settle 7 --> settle 3 --> reserve 20 --> settle 41 --> release 19      one lease: it ends at 0

Rules: entries of a lease are numbered 1, 2, ... without a gap and each carries a digest over itself and the one before
it, so none can be changed, taken out or put in unnoticed. What is left is never below 0. A request is settled once.
What it is settled at follows from its counts and its price, which stand beside it.
Pure. Money in nano-dollars, times in unix milliseconds.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

from shared.pricing import Price, Usage, charge, shown

Kind = Literal["reserve", "settle", "release"]
BEGINNING = ""  # what stands before the first entry of a lease


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request that has ended, as the ledger keeps it: no text, no tokens. `request`: a name never used again."""

    request: str
    tenant: str
    day: str  # on which it was reserved
    at: int
    key: str = ""  # prefix of the key that it came with
    model: str = ""
    tier: str = ""
    region: str = ""  # of its price
    batch: bool = False
    input: int = 0
    cached_input: int = 0
    output: int = 0
    prompt_tokens: int = 0  # charged: of prompts that a worker took, each once
    cached_tokens: int = 0
    generated_tokens: int = 0  # that were written to the client
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    attempts: int = 1
    outcome: str = ""  # stop, length, tool_calls, client_left, an error's code
    worker_us: int = 0  # of workers' time
    cost: int | None = None  # what that costs us; None: not known
    once: str = ""  # the name under which it is charged once, however often it is sent; empty: it has none

    @property
    def amount(self) -> int:
        """What it is charged."""
        return charge(Price(self.input, self.cached_input, self.output),
                      Usage(self.prompt_tokens, self.cached_tokens, self.generated_tokens))


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the ledger. `record`: of a settled request."""

    lease: str
    seq: int
    kind: Kind
    at: int
    tenant: str
    day: str
    amount: int
    digest: str
    record: Record | None = None


class Head(Struct, frozen=True):
    """Where a lease's part of the ledger ends, and what is left of what it reserved."""

    lease: str
    tenant: str
    day: str
    seq: int = 0
    digest: str = BEGINNING
    left: int = 0
    closed: bool = False

    def reserve(self, amount: int, at: int) -> "Written":
        """Set aside so much more."""
        return self._write("reserve", amount, at)

    def settle(self, record: Record) -> "Written":
        """A request has ended; what is left must hold it."""
        assert record.amount <= self.left, "more is settled than was reserved"
        return self._write("settle", record.amount, record.at, record)

    def release(self, at: int) -> "Written":
        """Give back what is left: the end of this lease."""
        return self._write("release", self.left, at)

    def _write(self, kind: Kind, amount: int, at: int, record: Record | None = None) -> "Written":
        assert not self.closed and amount >= 0, "nothing is written behind the end of a lease"
        entry = Entry(lease=self.lease, seq=self.seq + 1, kind=kind, at=at, tenant=self.tenant, day=self.day,
                      amount=amount, digest="", record=record)
        entry = msgspec.structs.replace(entry, digest=digest(self.digest, entry))
        left = self.left + amount if kind == "reserve" else self.left - amount
        return Written(msgspec.structs.replace(self, seq=entry.seq, digest=entry.digest, left=left,
                                               closed=kind == "release"), entry)


class Written(NamedTuple):
    """A new entry, and the head behind it."""

    head: Head
    entry: Entry


def digest(before: str, entry: Entry) -> str:
    """Over `entry` and the digest of the one before it: 32 hexadecimal letters."""
    # a field of a later version has a default, which is not told: what stands there keeps its digest
    told = msgspec.json.encode(msgspec.structs.replace(entry, digest=before))
    return blake2b(told, digest_size=16).hexdigest()


def day_of(at: int) -> str:
    """`2026-11-27`: the day of a time, in UTC."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d")


def month_of(day: str) -> str:
    """`2026-11`."""
    return day[:7]


# --- whether it adds up ----------------------------------------------------------------------------------------------


class Spent(Struct):
    """Of one tenant in one period."""

    held: int = 0
    spent: int = 0


class Sums(Struct):
    """What a ledger comes to."""

    entries: int = 0
    leases: int = 0
    open_leases: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reserved: int = 0
    settled: int = 0
    released: int = 0
    held: int = 0


class Audit:
    """Reads a ledger from its first entry to its last, lease by lease, and says what does not add up.

    `heads`: the leases as their own table has them.
    """

    def __init__(self, heads: Iterable[Head]) -> None:
        self.sums = Sums()
        self.spent: dict[tuple[str, str], Spent] = {}  # (tenant, period)
        self._heads = {head.lease: head for head in heads}
        self._read: set[str] = set()

    def lease(self, entries: Iterable[Entry]) -> Iterator[str]:
        """All entries of one lease in order; yields a sentence for each thing that is wrong."""
        head: Head | None = None
        for entry in entries:
            if head is None:
                head = Head(entry.lease, entry.tenant, entry.day)
                self._read.add(entry.lease)
            where = f"lease {entry.lease}, entry {entry.seq}"
            if (entry.lease, entry.tenant, entry.day) != (head.lease, head.tenant, head.day):
                yield f"{where}: it is of another tenant or day than its lease"
            if entry.seq != head.seq + 1:
                yield f"{where}: entry {head.seq + 1} should stand here"
            if head.closed:
                yield f"{where}: it stands behind the end of its lease"
            if entry.digest != digest(head.digest, entry):
                yield f"{where}: its digest is not that of what stands there: it or the one before it was changed"
            yield from self._entry(where, entry, head.left)
            left = head.left + entry.amount if entry.kind == "reserve" else head.left - entry.amount
            if left < 0:
                yield f"{where}: {shown(-left)} more is settled or released than was reserved"
            if entry.kind == "release" and left:
                yield f"{where}: {shown(abs(left))} is left of a lease that has ended"
            head = Head(head.lease, head.tenant, head.day, entry.seq, entry.digest, left,
                        head.closed or entry.kind == "release")
        if head is None:
            return
        self.sums.leases += 1
        self.sums.open_leases += not head.closed
        self._add(head.tenant, head.day, held=head.left)
        self.sums.held += head.left
        if (known := self._heads.get(head.lease)) != head:
            yield f"lease {head.lease}: its table says {_told(known)}, its entries {_told(head)}"

    def end(self, spending: dict[tuple[str, str], Spent]) -> Iterator[str]:
        """Behind the last lease. `spending`: as its table has it; yields a sentence for each thing that is wrong."""
        for lease in self._heads.keys() - self._read:
            if self._heads[lease].seq:
                yield f"lease {lease}: its table says {_told(self._heads[lease])}, and it has no entries"
        for tenant, period in sorted(self.spent.keys() | spending.keys()):
            nothing = Spent()
            have, said = self.spent.get((tenant, period), nothing), spending.get((tenant, period), nothing)
            if have != said:
                yield (f"{tenant}, {period}: the ledger comes to {shown(have.spent)} spent and {shown(have.held)} "
                       f"held, the table of sums says {shown(said.spent)} and {shown(said.held)}")
        if self.sums.reserved != self.sums.settled + self.sums.released + self.sums.held:
            yield (f"{shown(self.sums.reserved)} was reserved, and {shown(self.sums.settled)} settled, "
                   f"{shown(self.sums.released)} released and {shown(self.sums.held)} held make another sum")

    def _entry(self, where: str, entry: Entry, left: int) -> Iterator[str]:
        self.sums.entries += 1
        match entry.kind:
            case "reserve":
                self.sums.reserved += entry.amount
            case "release":
                self.sums.released += entry.amount
            case "settle":
                self.sums.settled += entry.amount
                self._add(entry.tenant, entry.day, spent=entry.amount)
        record = entry.record
        if record is None:
            return
        self.sums.requests += 1
        self.sums.prompt_tokens += record.prompt_tokens
        self.sums.generated_tokens += record.generated_tokens
        if record.amount != entry.amount:
            yield (f"{where}: request {record.request} is settled at {shown(entry.amount)}, and its tokens come to "
                   f"{shown(record.amount)}")
        if min(record.prompt_tokens, record.cached_tokens, record.generated_tokens) < 0:
            yield f"{where}: request {record.request} has less than no tokens"

    def _add(self, tenant: str, day: str, held: int = 0, spent: int = 0) -> None:
        for period in (day, month_of(day)):
            sums = self.spent.setdefault((tenant, period), Spent())
            sums.held += held
            sums.spent += spent


def _told(head: Head | None) -> str:
    if head is None:
        return "nothing"
    return f"{head.seq} entries, {shown(head.left)} left, {'closed' if head.closed else 'open'}, {head.digest[:8]}"
