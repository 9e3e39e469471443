"""The ledger adds up: whatever gateways do at once, no budget is overrun, nothing counted twice, nothing hidden."""

import random
import threading
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from gateway.ledger import Record, Spent
from gateway.state.books import Books, Budget
from gateway.state.database import Database
from gateway.state.tables import leases, ledger, spending

DAY, MONTH, NEXT = "2026-11-27", "2026-11", "2026-11-28"
AT = 1_764_200_000_000


def record(request: str, amount: int, tenant: str = "acme", day: str = DAY, **more: Any) -> Record:
    """A request that comes to `amount` nano-dollars."""
    return Record(request=request, tenant=tenant, day=day, at=AT, output=1_000_000, generated_tokens=amount,
                  outcome="stop", **more)


def sums(books: Books, tenant: str = "acme", day: str = DAY) -> list[tuple[int, int]]:
    return [(spent.spent, spent.held) for spent in books.spent(tenant, day).values()]


def test_a_lease_is_reserved_settled_and_released_and_the_ledger_ends_at_nothing(database: Database) -> None:
    books = Books(database)
    budget = Budget(per_day=1000, per_month=1500)
    granted = books.grant("g", "acme", DAY, 400, 10, budget, AT)
    assert (granted.amount, granted.left, granted.held) == (400, 1000, 0)
    assert sums(books) == [(0, 400), (0, 400)]
    assert books.settle("g", [record("a", 150), record("b", 50)], AT, dict.fromkeys("ab", granted.lease)) == 2
    assert sums(books) == [(200, 200), (200, 200)]
    assert books.release(granted.lease, AT) == 200
    assert sums(books) == [(200, 0), (200, 0)]
    assert books.release(granted.lease, AT) == 0  # it has ended
    checked = books.check()
    assert checked.problems == []
    assert (checked.sums.reserved, checked.sums.settled, checked.sums.released, checked.sums.held) == (400, 200, 200, 0)
    assert (checked.sums.entries, checked.sums.requests, checked.sums.generated_tokens) == (4, 2, 200)


def test_what_is_left_of_a_budget_is_granted_down_to_the_least_that_helps(database: Database) -> None:
    books = Books(database)
    budget = Budget(per_day=1000, per_month=1100)
    first = books.grant("g", "acme", DAY, 700, 1, budget, AT)
    second = books.grant("h", "acme", DAY, 700, 200, budget, AT)
    assert (second.amount, second.left, second.held, second.period) == (300, 300, 700, DAY)
    assert books.grant("h", "acme", DAY, 700, 1, budget, AT).amount == 0
    tomorrow = books.grant("g", "acme", NEXT, 700, 50, budget, AT)  # the month has 100 left
    assert (tomorrow.amount, tomorrow.period) == (100, MONTH)
    assert books.grant("g", "acme", NEXT, 10, 1, budget, AT)[1:] == (0, 0, 1100, MONTH)
    assert books.grant("g", "other", DAY, 700, 50, budget, AT).amount == 700
    # the same lease, larger
    books.release(second.lease, AT)
    more = books.grant("g", "acme", DAY, 100, 100, Budget(per_day=1000), AT, first.lease)
    assert (more.lease, more.amount) == (first.lease, 100)
    assert books.settle("g", [record("a", 800)], AT, {"a": first.lease}) == 1
    assert books.check().problems == []


def test_settling_again_changes_nothing_whoever_does_it(database: Database) -> None:
    books = Books(database)
    assert books.settle("g", [record("a", 5), record("a", 5), record("b", 7)], AT) == 2
    assert books.settle("h", [record("b", 7), record("c", 1), record("a", 5)], AT) == 1
    assert sums(books) == [(13, 0), (13, 0)]
    checked = books.check()
    assert (checked.problems, checked.sums.requests, checked.sums.open_leases) == ([], 3, 0)


def test_requests_without_a_budget_are_settled_under_one_lease_which_others_are_told(database: Database) -> None:
    books, opened = Books(database), dict[tuple[str, str], str]()
    books.settle("g", [record("a", 5), record("b", 7), record("c", 1, "bolt")], AT, {}, opened)
    assert set(opened) == {("acme", DAY), ("bolt", DAY)}
    acme, again = opened["acme", DAY], dict[tuple[str, str], str]()
    books.settle("g", [record("d", 2)], AT, {"d": acme}, again)
    assert again == {} and books.check().sums.open_leases == 2 and sums(books) == [(14, 0), (14, 0)]
    books.release(acme, AT)
    books.settle("g", [record("e", 2)], AT, {"e": acme}, again)
    assert set(again) == {("acme", DAY)} and again["acme", DAY] != acme
    assert books.check().problems == []


def test_what_was_delivered_is_settled_also_when_its_lease_has_ended_or_is_too_small(database: Database) -> None:
    books = Books(database)
    small = books.grant("g", "acme", DAY, 10, 1, Budget(per_day=10), AT).lease
    books.settle("g", [record("a", 25)], AT, {"a": small})
    books.release(small, AT)
    books.settle("g", [record("b", 5), record("c", 5, day=NEXT)], AT, {"b": small, "c": "never there"})
    assert sums(books) == [(30, 0), (35, 0)]
    assert books.check().problems == []


def test_leases_of_gateways_that_are_gone_are_given_back(database: Database) -> None:
    books = Books(database)
    budget = Budget(per_day=100)
    lost, kept, closed = (books.grant(name, "acme", DAY, 30, 1, budget, AT).lease for name in "xgg")
    books.release(closed, AT)
    books.settle("x", [record("a", 10)], AT, {"a": lost})
    books.renew("g", AT + 60_000)
    assert books.sweep(AT + 30_000, AT + 60_000) == 20
    assert sums(books)[0] == (10, 30)
    assert books.sweep(AT + 90_000, AT + 90_000, "somebody else") == 0
    assert books.sweep(AT + 90_000, AT + 90_000, "g") == 30
    assert books.grant("g", "acme", DAY, 5, 1, budget, AT, kept).lease != kept
    assert books.check().problems == []


def test_gateways_that_ask_at_the_same_time_never_get_the_same_dollar(database: Database) -> None:
    books, budget = Books(database), Budget(per_day=1000, per_month=1000)
    granted, failed = [], []

    def gateway(name: str) -> None:
        try:
            dice = random.Random(name)
            for number in range(12):
                one = books.grant(name, "acme", DAY, dice.randint(1, 90), 1, budget, AT)
                granted.append(one.amount)
                if one.amount:
                    used = dice.randint(0, one.amount)
                    books.settle(name, [record(f"{name}{number}", used)], AT, {f"{name}{number}": one.lease})
                    granted.append(used - one.amount)
                    books.release(one.lease, AT)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=gateway, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    (spent, held), _ = sums(books)
    assert held == 0 and spent == sum(granted) <= 1000
    checked = books.check()
    assert checked.problems == [] and checked.sums.settled == spent


@pytest.mark.parametrize("seed", range(6))
def test_after_any_history_the_ledger_adds_up_and_says_what_was_settled(database: Database, seed: int) -> None:
    dice, books = random.Random(seed), Books(database)
    open_leases: list[str] = []
    settled: dict[str, Record] = {}
    for number in range(60):
        tenant, day = dice.choice(["acme", "bolt"]), dice.choice([DAY, NEXT])
        match dice.choice(["grant", "grant", "settle", "settle", "again", "release", "sweep"]):
            case "grant":
                lease = dice.choice(["", *open_leases])
                one = books.grant("g", tenant, day, dice.randint(1, 100), dice.randint(0, 50), Budget(500, 800), AT)
                if lease:
                    books.grant("g", *_owner(database, lease), 5, 1, Budget(), AT, lease)
                open_leases += [one.lease] if one.amount else []
            case "settle":
                made = [record(f"{number}-{i}", dice.randint(0, 60), tenant, day) for i in range(dice.randint(0, 4))]
                settled |= {one.request: one for one in made}
                books.settle("g", made, AT, {one.request: lease for one in made for lease in _of(
                    database, open_leases, tenant, day) if dice.random() < 0.7})
            case "again":
                books.settle("g", dice.sample(list(settled.values()), min(3, len(settled))), AT)
            case "release" if open_leases:
                books.release(dice.choice(open_leases), AT)
            case _:
                books.sweep(AT + 1 if dice.random() < 0.2 else AT, AT)
    checked = books.check()
    assert checked.problems == []
    assert checked.sums.settled == sum(one.amount for one in settled.values())
    assert checked.sums.requests == len(settled)
    for tenant in ("acme", "bolt"):
        for day in (DAY, NEXT):
            of_day = [one.amount for one in settled.values() if (one.tenant, one.day) == (tenant, day)]
            assert books.spent(tenant, day)[day].spent == sum(of_day)


def _owner(database: Database, lease: str) -> tuple[str, str]:
    with database.reading() as connection:
        row = connection.execute(select(leases).where(leases.c.id == lease)).one()
        return row.tenant, row.day


def _of(database: Database, names: list[str], tenant: str, day: str) -> list[str]:
    return [name for name in names if _owner(database, name) == (tenant, day)]


def _without_guard(database: Database, statement: Any) -> None:
    """What somebody may do who owns the database."""
    with database.writing() as connection:
        if database.is_sqlite:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS ledger_no_update")
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS ledger_no_delete")
        else:
            connection.exec_driver_sql("DROP TRIGGER IF EXISTS ledger_append_only ON ledger")
        connection.execute(statement)


@pytest.mark.parametrize(("statement", "problem"), [
    (update(ledger).where(ledger.c.request == "b").values(amount=6), "is settled at 0.000000006, and its tokens come"),
    (update(ledger).where(ledger.c.request == "b").values(generated_tokens=6, amount=6), "its digest is not that"),
    (update(ledger).where(ledger.c.request == "b").values(key="tm-00000000"), "its digest is not that"),
    (update(ledger).where(ledger.c.request == "b").values(outcome="length"), "its digest is not that"),
    (delete(ledger).where(ledger.c.request == "b"), "entry 3 should stand here"),
    (delete(ledger).where(ledger.c.kind == "release"), "its table says 5 entries"),
    (delete(ledger), "and it has no entries"),
    (update(spending).where(spending.c.period == DAY).values(spent=1), "the ledger comes to 0.00000003 spent"),
    (update(spending).values(held=1), "the table of sums says 0.00000003 and 0.000000001"),
    (delete(spending), "the table of sums says 0 and 0"),
    (insert(spending).values(tenant="ghost", period=DAY, held=0, spent=5), "ghost, 2026-11-27: the ledger comes to 0"),
    (update(leases).values(left=9), "left, closed"),
    (update(leases).values(digest="0" * 32), "its table says"),
], ids=str)
def test_whatever_is_changed_by_hand_is_found(database: Database, statement: Any, problem: str) -> None:
    books = Books(database)
    lease = books.grant("g", "acme", DAY, 40, 1, Budget(), AT).lease
    books.settle("g", [record("a", 10), record("b", 15), record("c", 5)], AT, dict.fromkeys("abc", lease))
    books.release(lease, AT)
    assert books.check().problems == []
    _without_guard(database, statement)
    found = books.check().problems
    assert any(problem in one for one in found), found


def test_every_field_of_a_record_comes_back_as_it_was_written(database: Database) -> None:
    books = Books(database)
    whole = Record(request="r", tenant="acme", day=DAY, at=AT, key="tm-12345678", model="m", tier="flex", region="eu",
                   batch=True, input=100, cached_input=50, output=2**40, prompt_tokens=7, cached_tokens=3,
                   generated_tokens=2**31, draft_tokens=9, accepted_draft_tokens=4, attempts=2, outcome="client_left",
                   worker_us=2**40, cost=2**50)
    books.settle("g", [whole, record("none", 1)], AT)
    assert books.check().problems == []  # digests cover every field
    with database.reading() as connection:
        rows = {row.request: row for row in connection.execute(select(ledger).where(ledger.c.kind == "settle"))}
    assert rows["r"].cost == 2**50 and rows["none"].cost is None and rows["r"].batch is True
    assert rows["r"].amount == whole.amount > 2**31
    assert books.spent("nobody", DAY) == {DAY: Spent(), MONTH: Spent()}
