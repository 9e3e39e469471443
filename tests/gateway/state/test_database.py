"""A database is opened by its URL, brought up to date once, and said in a sentence when that is not possible."""

import threading
from datetime import date
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select

from gateway.ledger import Record
from gateway.state.books import Books
from gateway.state.database import Database, DatabaseFailed, alembic_config, open_database
from gateway.state.tables import ledger, metadata, organisations, settings
from gateway.state.usage import usage


def test_the_migrations_make_the_tables_that_the_program_expects(database: Database) -> None:
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_it_is_made_once_also_when_many_open_it_at_the_same_time(url: str) -> None:
    opened, failed = [], []

    def one() -> None:
        try:
            opened.append(open_database(url))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(opened) == 5
    with opened[0].reading() as connection:
        assert connection.scalar(select(settings.c.value).where(settings.c.name == "revision")) == "1"
    for database in opened:
        database.close()


def test_one_that_a_newer_version_has_written_is_left_alone(url: str, database: Database) -> None:
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseFailed, match=r"was written by a newer version \(its tables are 9999\)"):
        open_database(url)


def test_what_an_older_version_has_written_is_kept(url: str) -> None:
    sqlite = url.startswith("sqlite")
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
        connection.exec_driver_sql("INSERT INTO organisations (name, created) VALUES ('acme', 5)")
        no = 0 if sqlite else "false"
        connection.exec_driver_sql(
            'INSERT INTO leases (id, gateway, tenant, day, renewed, closed, seq, digest, "left") '
            f"VALUES ('a', 'g', 'acme', '2026-11-27', 5, {no}, 0, '', 0)")
    engine.dispose()
    database = open_database(url)
    books = Books(database)
    books.settle("g", [Record(request="r", tenant="acme", day="2026-11-27", at=5, output=10**6, generated_tokens=7)], 6,
                 {"r": "a"})
    assert books.check().problems == [] and books.check().sums.settled == 7
    assert [line.generated_tokens for line in usage(database, date(2026, 11, 27), date(2026, 11, 27))] == [7]
    with database.reading() as connection:
        assert connection.scalar(select(organisations.c.name)) == "acme"
    database.close()


def test_what_stands_in_the_ledger_cannot_be_changed_nor_taken_out(database: Database) -> None:
    books = Books(database)
    books.settle("g", [Record(request="r", tenant="acme", day="2026-11-27", at=5, generated_tokens=1)], 6)
    for statement in ("UPDATE ledger SET amount = 1", "DELETE FROM ledger"):
        with pytest.raises(DatabaseFailed, match="the ledger is only ever added to"), \
                database.writing() as connection:
            connection.exec_driver_sql(statement)
    assert books.check().sums.requests == 1 and books.check().problems == []


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as connection:
        connection.execute(sqlalchemy.insert(settings).values(name="half", value="done"))
        raise ZeroDivisionError
    with database.reading() as connection:
        assert connection.scalar(select(settings.c.value).where(settings.c.name == "half")) is None
        assert connection.scalar(select(sqlalchemy.func.count()).select_from(ledger)) == 0


@pytest.mark.parametrize(("url", "reason"), [
    ("mysql://me:secret@host/x", "'mysql://me:***@host/x' names no database: write sqlite:///FILE"),
    ("nonsense", "'nonsense' names no database"),
    ("sqlite://", "would be lost with the process"),
    ("sqlite:///:memory:", "would be lost with the process"),
    ("postgresql://me:secret@127.0.0.1:1/x", "the database postgresql+psycopg://me:***@127.0.0.1:1/x: "),
])
def test_a_url_that_leads_nowhere_is_said_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(DatabaseFailed) as caught:
        open_database(url)
    assert reason in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mill.db"
    path.write_text("this is not a database, it is a text that goes on for a while\n" * 50)
    with pytest.raises(DatabaseFailed, match="file is not a database"):
        open_database(f"sqlite:///{path}")
