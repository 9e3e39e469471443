"""The ledger in a database: leases are granted and given back, requests are settled.

Rules: whatever changes a tenant's sums holds the row of its day, so that two gateways never grant the same dollar; an
entry, its lease's head and the sums are written together or not at all; settling a request again changes nothing, so
whoever does not know whether it was written writes it again. A request is settled whatever the budget says: it was
delivered. Everything here may wait.
"""

import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gateway.ledger import Audit, Entry, Head, Record, Spent, Sums, Written, month_of
from gateway.state.budget import Budget, Granted
from gateway.state.database import Database
from gateway.state.once import ended
from gateway.state.tables import leases, ledger, spending

_RECORD_COLUMNS = tuple(name for name in Record.__struct_fields__ if name not in ("tenant", "day", "at"))
_AT_ONCE = 500  # names in one question: SQLite takes no more than some thousand


class Checked(NamedTuple):
    """What `check` found: nothing wrong when there are no problems."""

    sums: Sums
    problems: list[str]


class Books:
    """The ledger of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def grant(self, gateway: str, tenant: str, day: str, wanted: int, least: int, budget: Budget, at: int,
              lease: str = "") -> Granted:
        """Set aside `wanted` of a tenant's budget, or what there is of it, but `least` or nothing.

        `lease`: to be made larger, if it is open; else a new one. Raises DatabaseFailed.
        """
        with self._database.writing() as connection:
            sums = self._sums(connection, tenant, day)
            left, period = min(((limit - sums[period].spent - sums[period].held, period)
                                for limit, period in ((budget.per_day, day), (budget.per_month, month_of(day)))
                                if limit is not None), default=(wanted, day))
            amount = min(wanted, left) if left >= least else 0
            found = Granted(lease, amount, max(0, left), sums[period].held, period)
            if not amount:
                return found
            head = self._open(connection, lease) if lease else None
            if head is None:
                head = self._begin(connection, gateway, tenant, day, at)
            self._write(connection, [head.reserve(amount, at)])
            return found._replace(lease=head.lease)

    def settle(self, gateway: str, records: Iterable[Record], at: int, under: dict[str, str] | None = None,
               opened: dict[tuple[str, str], str] | None = None) -> int:
        """Write these requests, each once; how many of them were not there yet. Raises DatabaseFailed.

        `under`: the lease of each request, if it has one. One that has ended, or has too little left, is made up for:
        what was delivered is written. `opened` is told the lease of a tenant and day that others may be settled under,
        where there was none; without it such a lease ends at once.
        """
        under = under or {}
        told = list(records)
        by_lease: defaultdict[tuple[str, str, str], list[Record]] = defaultdict(list)
        with self._database.writing() as connection:
            for tenant, day in sorted({(record.tenant, record.day) for record in told}):
                self._sums(connection, tenant, day)
            # behind the locks: whoever writes the same has done so by now
            for record in self._fresh(connection, told):
                by_lease[record.tenant, record.day, under.get(record.request, "")].append(record)
            for (tenant, day, lease), together in sorted(by_lease.items()):
                head = self._settle(connection, gateway, tenant, day, lease, together, at, opened is None)
                if opened is not None and head.lease != lease:
                    opened[tenant, day] = head.lease
            if names := [record.once for record in told if record.once]:
                ended(connection, names, at)
        return sum(map(len, by_lease.values()))

    def release(self, lease: str, at: int) -> int:
        """Give back what is left of a lease; how much that was. Raises DatabaseFailed."""
        with self._database.writing() as connection:
            return self._release(connection, [lease], at)

    def renew(self, gateway: str, at: int) -> None:
        """This gateway lives, and so do its leases. Raises DatabaseFailed."""
        with self._database.writing() as connection:
            connection.execute(update(leases).where(leases.c.gateway == gateway, ~leases.c.closed).values(renewed=at))

    def sweep(self, before: int, at: int, gateway: str = "") -> int:
        """Give back leases that were last renewed before; of `gateway` alone, if it is named. How much that was.

        Raises DatabaseFailed.
        """
        with self._database.writing() as connection:
            wanted = select(leases.c.id).where(~leases.c.closed, leases.c.renewed < before)
            if gateway:
                wanted = wanted.where(leases.c.gateway == gateway)
            return self._release(connection, list(connection.scalars(wanted)), at)

    def spent(self, tenant: str, day: str) -> dict[str, Spent]:
        """Of the day, and of its month. Raises DatabaseFailed."""
        with self._database.reading() as connection:
            rows = connection.execute(select(spending).where(
                spending.c.tenant == tenant, spending.c.period.in_((day, month_of(day)))))
            found = {row.period: Spent(row.held, row.spent) for row in rows}
        return {period: found.get(period, Spent()) for period in (day, month_of(day))}

    def check(self) -> Checked:
        """Read all of it and hold everything against everything. Raises DatabaseFailed.

        What gateways write meanwhile is not seen, in SQLite; PostgreSQL is asked for the same.
        """
        with self._database.reading() as connection:
            if not self._database.is_sqlite:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            audit = Audit(map(_head, connection.execute(select(leases))))
            entries = connection.execution_options(yield_per=1000).execute(
                select(ledger).order_by(ledger.c.lease, ledger.c.seq))
            problems = [problem for _, together in groupby(map(_entry, entries), key=lambda entry: entry.lease)
                        for problem in audit.lease(together)]
            problems += audit.end({(row.tenant, row.period): Spent(row.held, row.spent)
                                   for row in connection.execute(select(spending))})
        return Checked(audit.sums, problems)

    # --- within a transaction ----------------------------------------------------------------------------------------

    def _sums(self, connection: Connection, tenant: str, day: str) -> dict[str, Spent]:
        """A tenant's sums of a day and its month, held until the end of the transaction."""
        added = sqlite.insert(spending) if self._database.is_sqlite else postgresql.insert(spending)
        periods = (month_of(day), day)  # everybody in this order, or two would wait for each other
        connection.execute(added.on_conflict_do_nothing(), [
            {"tenant": tenant, "period": period, "held": 0, "spent": 0} for period in periods])
        found = {}
        for period in periods:
            row = connection.execute(select(spending.c.held, spending.c.spent).where(
                spending.c.tenant == tenant, spending.c.period == period).with_for_update()).one()
            found[period] = Spent(row.held, row.spent)
        return found

    def _open(self, connection: Connection, lease: str) -> Head | None:
        """A lease, held until the end of the transaction; None when it has ended."""
        row = connection.execute(select(leases).where(leases.c.id == lease).with_for_update()).one_or_none()
        return None if row is None or row.closed else _head(row)

    def _begin(self, connection: Connection, gateway: str, tenant: str, day: str, at: int) -> Head:
        head = Head(secrets.token_hex(8), tenant, day)
        connection.execute(insert(leases).values(
            id=head.lease, gateway=gateway, tenant=tenant, day=day, renewed=at, closed=False, seq=0,
            digest=head.digest, left=0))
        return head

    def _fresh(self, connection: Connection, records: Sequence[Record]) -> list[Record]:
        """Those that are not in the ledger, each once."""
        once = list({record.request: record for record in records}.values())
        known: set[str] = set()
        for start in range(0, len(once), _AT_ONCE):
            names = [record.request for record in once[start:start + _AT_ONCE]]
            known.update(connection.scalars(select(ledger.c.request).where(ledger.c.request.in_(names))))
        return [record for record in once if record.request not in known]

    def _settle(self, connection: Connection, gateway: str, tenant: str, day: str, lease: str,
                records: Sequence[Record], at: int, ends: bool) -> Head:
        head = self._open(connection, lease) if lease else None
        passing = ends and head is None
        if head is None:
            head = self._begin(connection, gateway, tenant, day, at)
        written: list[Written] = []
        short = sum(record.amount for record in records) - head.left
        if short > 0 or not head.seq:
            written.append(head.reserve(max(0, short), at))
            head = written[-1].head
        for record in records:
            written.append(head.settle(record))
            head = written[-1].head
        if passing:
            written.append(head.release(at))
        self._write(connection, written)
        return written[-1].head

    def _release(self, connection: Connection, names: Sequence[str], at: int) -> int:
        # in the order of everybody: first the sums, then the leases
        found = connection.execute(select(leases.c.id, leases.c.tenant, leases.c.day).where(
            leases.c.id.in_(names)).order_by(leases.c.tenant, leases.c.day, leases.c.id)).all()
        given_back = 0
        for row in found:
            self._sums(connection, row.tenant, row.day)
            head = self._open(connection, row.id)
            if head is not None:
                given_back += head.left
                self._write(connection, [head.release(at)])
        return given_back

    def _write(self, connection: Connection, written: Sequence[Written]) -> None:
        """Entries of one lease, in order, its head and the sums of its tenant."""
        head = written[-1].head
        connection.execute(insert(ledger), [_row(one.entry) for one in written])
        connection.execute(update(leases).where(leases.c.id == head.lease).values(
            seq=head.seq, digest=head.digest, left=head.left, closed=head.closed))
        settled = sum(one.entry.amount for one in written if one.entry.kind == "settle")
        held = sum(one.entry.amount if one.entry.kind == "reserve" else -one.entry.amount for one in written)
        connection.execute(update(spending).where(
            spending.c.tenant == head.tenant, spending.c.period.in_((head.day, month_of(head.day)))).values(
                held=spending.c.held + held, spent=spending.c.spent + settled))


def total(database: Database) -> int:
    """Entries of a ledger. Raises DatabaseFailed."""
    with database.reading() as connection:
        return connection.scalar(select(func.count()).select_from(ledger)) or 0


def _row(entry: Entry) -> dict[str, Any]:
    record = dict.fromkeys(_RECORD_COLUMNS) if entry.record is None else {
        name: getattr(entry.record, name) for name in _RECORD_COLUMNS}
    return {"lease": entry.lease, "seq": entry.seq, "kind": entry.kind, "at": entry.at, "tenant": entry.tenant,
            "day": entry.day, "amount": entry.amount, "digest": entry.digest, **record}


def _entry(row: Row[Any]) -> Entry:
    record = None if row.request is None else Record(
        tenant=row.tenant, day=row.day, at=row.at, once=row.once or "",
        **{name: getattr(row, name) for name in _RECORD_COLUMNS if name != "once"})
    return Entry(lease=row.lease, seq=row.seq, kind=row.kind, at=row.at, tenant=row.tenant, day=row.day,
                 amount=row.amount, digest=row.digest, record=record)


def _head(row: Row[Any]) -> Head:
    return Head(row.id, row.tenant, row.day, row.seq, row.digest, row.left, row.closed)


def entries_of(rows: Iterable[Row[Any]]) -> Iterator[Entry]:
    """Rows of the ledger as entries."""
    return map(_entry, rows)
