"""Law 8 on real processes: what clients were told is what the ledger has, also when a gateway is killed meanwhile."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from deploy import broker
from deploy.local_mesh import LocalMesh, Options
from gateway.billing import NOTE_S
from gateway.ledger import Record
from gateway.model_files import load_card
from gateway.state.books import Books, entries_of
from gateway.state.database import open_database
from gateway.state.directory import Directory
from gateway.state.tables import ledger
from tests.models import default_folder
from tests.postgres_server import new_database, postgres_server

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

PRICES = Path(__file__).parents[2] / "deploy" / "prices.toml"
TOKEN_S = 0.02


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('books')}/mill.db"
        return
    with postgres_server() as server:
        yield new_database(server, "mill")


@pytest.fixture(scope="module")
def key(url: str) -> dict[str, str]:
    with contextlib.closing(open_database(url)) as database:
        directory = Directory(database)
        directory.put_project("acme", datetime.now(UTC), spend_per_day=10**9)
        return {"authorization": f"Bearer {directory.create_key('acme', datetime.now(UTC)).key}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, url: str, key: dict[str, str]) -> AsyncIterator[LocalMesh]:
    options = Options(model=default_folder(), data=tmp_path_factory.mktemp("mesh"), port=broker.free_port(), workers=1,
                      drafters=0, gateways=2, engine="mock", drain_s=5.0, prices=PRICES, database=url,
                      settings={"worker": {"mock_step_s": TOKEN_S, "price_usd_per_hour": 3.6}})
    async with LocalMesh(options) as running:
        await running.until_ready()
        yield running


@dataclass
class Seen:
    """What a client was told: token ids, and how it ended."""

    number: str = ""
    tokens: int = 0
    ended: bool = False


async def read(mesh: LocalMesh, gateway: int, key: dict[str, str], most: int, leave_after: int = 10**9) -> Seen:
    """Stream a completion of `most` tokens until it ends, the connection breaks, or so many tokens have come."""
    seen = Seen()
    asked = {"model": load_card(mesh.options.model).name, "prompt": "Once upon a time", "max_tokens": most,
             "ignore_eos": True, "stream": True, "return_token_ids": True}
    with contextlib.suppress(httpx.TransportError):
        async with (httpx.AsyncClient(timeout=60.0, trust_env=False) as client, client.stream(
                "POST", f"http://127.0.0.1:{mesh.options.port + gateway}/v1/completions", json=asked,
                headers=key) as response):
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                seen.ended |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    seen.number = event["id"].removeprefix("cmpl-")
                    seen.tokens += sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
                if seen.tokens >= leave_after:
                    break
    return seen


def settled(url: str) -> dict[str, Record]:
    with contextlib.closing(open_database(url)) as database, database.reading() as connection:
        return {entry.record.request: entry.record for entry in entries_of(connection.execute(ledger.select()))
                if entry.record is not None}


async def told(mesh: LocalMesh, gateway: int, key: dict[str, str]) -> dict[str, Any]:
    """The sums of a gateway, once it is there."""
    async with asyncio.timeout(30), httpx.AsyncClient(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                response = await client.get(f"http://127.0.0.1:{mesh.options.port + gateway}/v1/usage?by=tenant",
                                            headers=key)
                if response.status_code == 200:
                    found: dict[str, Any] = response.json()["data"][0]
                    return found
            await asyncio.sleep(0.1)


async def test_a_killed_gateway_loses_nothing_that_had_ended_and_a_second_of_what_ran(
        mesh: LocalMesh, url: str, key: dict[str, str]) -> None:
    whole = await asyncio.gather(*(read(mesh, number % 2, key, 20 + number) for number in range(6)))
    left = await read(mesh, 0, key, 8_000, leave_after=10)
    cut = [asyncio.create_task(read(mesh, 0, key, 8_000)) for _ in range(4)]
    other = asyncio.create_task(read(mesh, 1, key, 200))
    await asyncio.sleep(3.0)
    pid = mesh.child("gateway-1").pid
    assert pid is not None
    assert url not in Path(f"/proc/{pid}/cmdline").read_text()  # it may hold a password
    os.kill(pid, signal.SIGKILL)
    broken = await asyncio.gather(*cut)
    assert all(one.tokens > 50 and not one.ended for one in broken)
    spared = await other
    await told(mesh, 0, key)  # it is back, and has settled what its life before left
    sums = await told(mesh, 1, key)
    found = settled(url)
    assert len(found) == sums["requests"] == len(whole) + 1 + len(broken) + 1
    for one in (*whole, spared):
        assert one.ended and found[one.number].generated_tokens == one.tokens
        assert found[one.number].cost is not None and found[one.number].worker_us > 0
    # what was on its way when this client hung up it may not have read
    assert found[left.number].outcome == "client_left" and (found[left.number].cost or 0) > 0
    assert left.tokens <= found[left.number].generated_tokens < 1000
    for one in broken:
        assert found[one.number].outcome == "gateway_died"
        # a note on it was written this long ago at most, and what it was in the middle of
        missing = one.tokens - found[one.number].generated_tokens
        assert 0 <= missing <= 3 * NOTE_S / TOKEN_S, missing
    with contextlib.closing(open_database(url)) as database:
        checked = Books(database).check()
    assert checked.problems == []
    assert checked.sums.generated_tokens == sum(record.generated_tokens for record in found.values())


async def test_a_mesh_that_was_stopped_holds_nothing_back(mesh: LocalMesh, url: str, key: dict[str, str]) -> None:
    one = await read(mesh, 0, key, 30)
    await mesh.stop()
    with contextlib.closing(open_database(url)) as database:
        checked = Books(database).check()
    assert (checked.problems, checked.sums.held, checked.sums.open_leases) == ([], 0, 0)
    assert settled(url)[one.number].generated_tokens == one.tokens == 30
    assert not list((mesh.options.data / "journal").glob("*/*.jsonl"))
