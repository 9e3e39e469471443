"""A database of each kind, new for each test."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.state.database import Database, open_database
from tests.postgres_server import new_database, postgres_server

KINDS = ("sqlite", "postgresql")
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/mill.db"
    return new_database(request.getfixturevalue("postgres"), f"mill{next(_numbers)}")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = open_database(url)
    yield opened
    opened.close()
