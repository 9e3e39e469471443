"""A gateway that charges: its prices, its database and its journal in a folder, and projects with a key each."""

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from gateway.ledger import Record
from gateway.service import Gateway
from gateway.state.books import Books, Checked, entries_of
from gateway.state.database import open_database
from gateway.state.directory import Directory
from gateway.state.tables import ledger
from shared.pricing import nanos
from tests.gateway.fake_mesh import FakeMesh, gateway_and_mesh

# a token of a prompt 1 micro-dollar, a cached one 0.5, one of an answer 4
PRICES = """\
[[prices]]
input = 1.00
cached_input = 0.50
output = 4.00
source = "test"
date = 2026-11-27

[[prices]]
tier = "flex"
input = 0.50
output = 2.00
source = "test"
date = 2026-11-27

[skus.cpu]
usd_per_hour = 3.60
source = "test"
date = 2026-11-27
"""
MICRO = nanos("0.000001")


class Billed:
    """What outlives a gateway: the folder, the database, the keys."""

    def __init__(self, folder: Path, url: str = "", prices: str = PRICES) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder}/mill.db"
        (folder / "prices.toml").write_text(prices)

    def settings(self, **more: Any) -> dict[str, Any]:
        return {"database": self.url, "prices": str(self.folder / "prices.toml"),
                "journal": str(self.folder / "journal")} | more

    def project(self, name: str, **limits: Any) -> dict[str, str]:
        """The headers of a new key of a project."""
        with contextlib.closing(open_database(self.url)) as database:
            directory = Directory(database)
            if limits:
                directory.put_project(name, datetime.now(UTC), **limits)
            key = directory.create_key(name, datetime.now(UTC)).key
        return {"authorization": f"Bearer {key}"}

    def records(self) -> list[Record]:
        """What was settled, in order."""
        with contextlib.closing(open_database(self.url)) as database, database.reading() as connection:
            return [entry.record for entry in entries_of(connection.execute(ledger.select().order_by(ledger.c.id)))
                    if entry.record is not None]

    def check(self) -> Checked:
        with contextlib.closing(open_database(self.url)) as database:
            return Books(database).check()


@contextlib.asynccontextmanager
async def billed_gateway(billed: Billed, **settings: Any
                         ) -> AsyncIterator[tuple[httpx.AsyncClient, FakeMesh, Gateway]]:
    """One that charges, behind its application, and a mesh that answers it."""
    async with gateway_and_mesh(**billed.settings(**settings)) as running:
        yield running
