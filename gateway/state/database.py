"""One database, by its URL: SQLite in a file, or PostgreSQL. Opened, brought up to date, and written to.

Rules: whoever opens a database brings its tables up to date, one at a time; one that is newer than this program is left
alone; writers of SQLite wait for each other instead of failing; what is committed is on the disk. Everything here may
wait, so services call it in threads.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

BUSY_S = 10.0  # for another writer to be done
CONNECT_S = 5
# of PostgreSQL with a statement: nobody here waits for one that long
_PATIENCE = "-c statement_timeout=30000 -c lock_timeout=10000 -c idle_in_transaction_session_timeout=60000"
_LOCK = 0x6D696C6C  # of migrations in PostgreSQL: any number that nobody else there uses


class DatabaseFailed(ValueError):
    """One sentence on what is wrong with a database. It repeats no password."""


class Database:
    """Connections to it. `reading` and `writing` are transactions; they raise DatabaseFailed for what goes wrong."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.url.render_as_string(hide_password=True)
        self.is_sqlite = engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """What was committed when the block began, in SQLite; when each statement began, in PostgreSQL."""
        with self._failing(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """All of it or nothing."""
        with self._failing(), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """End its connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            # the statement and its values, which the library's own words repeat, are nobody's
            said = str(getattr(error, "orig", None) or error).strip().splitlines()
            raise DatabaseFailed(f"the database {self.name}: {said[0] if said else type(error).__name__}") from error


def open_database(url: str) -> Database:
    """The database at `url`, its tables made or brought up to date. Raises DatabaseFailed."""
    try:
        address = _address(url)
    except ArgumentError:
        raise DatabaseFailed(f"{without_password(url)!r} names no database: write sqlite:///FILE or "
                             "postgresql://USER@HOST/NAME") from None
    if address.get_backend_name() == "sqlite":
        if not address.database or address.database == ":memory:":
            raise DatabaseFailed("a database in memory would be lost with the process: write sqlite:///FILE")
        _make_private(Path(address.database))
        engine = sqlalchemy.create_engine(address, connect_args={"timeout": BUSY_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        engine = sqlalchemy.create_engine(address, pool_pre_ping=True, pool_size=4, max_overflow=4,
                                          connect_args={"connect_timeout": CONNECT_S, "options": _PATIENCE})
    database = Database(engine)
    try:
        _upgrade(database)
    except BaseException:
        database.close()
        raise
    return database


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's view of our migrations, on this connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def without_password(url: str) -> str:
    """`url`, to be shown."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _upgrade(database: Database) -> None:
    with database.writing() as connection:
        if not database.is_sqlite:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config = alembic_config(connection)
        have = MigrationContext.configure(connection).get_current_revision()
        known = ScriptDirectory.from_config(config)
        if have is not None and have not in {script.revision for script in known.walk_revisions()}:
            raise DatabaseFailed(f"the database {database.name} was written by a newer version (its tables are "
                                 f"{have}): upgrade this one first")
        if have != known.get_current_head():
            command.upgrade(config, "head")


def _address(url: str) -> URL:
    address = make_url(url)
    backend = address.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise ArgumentError
    if address.drivername == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and address.database:
        return address.set(database=str(Path(address.database).expanduser()))
    return address


def _make_private(path: Path) -> None:
    """The file, for its owner alone, if there is none: it will hold a secret. Raises DatabaseFailed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise DatabaseFailed(f"the database {path}: {error.strerror}") from None


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says, not where the driver thinks
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # who will write waits at once: a reader that turns into a writer would fail where another wrote meanwhile
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
