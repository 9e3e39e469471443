"""Law 8 against random histories of requests: the ledger = what was delivered = what clients counted.

    python -m tests.laws.billing --histories 10000 [--from 0] [--database URL]

A history is one thing that a client wants, and all that happens to it: streamed or whole, one choice or several, at a
worker that fails in its middle, refuses, or breaks it off; a client that hangs up, reads slowly, or whose connection
breaks while it is written to; sent again under the same idempotency key, also while it runs; of a tenant whose budget
ends while others of its requests run. Token ids are counted where the client reads them.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from gateway.app import build_app
from gateway.ledger import Record
from gateway.service import Gateway
from gateway.state.books import Books, entries_of
from gateway.state.database import Database, open_database
from gateway.state.tables import ledger
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Accepted, Cancel, Finished, Generate, Reply, Tokens
from shared.settings import GatewaySettings
from shared.tokens import pack, unpack
from tests.gateway.billed import MICRO, PRICES
from tests.gateway.fake_mesh import END, MODEL, FakeMesh, refusal, tiny_model
from tests.gateway.tenants_files import write

TEXT = b"A miller sold the wheel, the wall and the cat, and then went home without her coat."
# dollars a day; None: no limit. A request may come to 0.0000004 to 0.0009
BUDGETS = (None, 0.0002, 0.0015, 0.01, 1.0)
TOGETHER = 40
TRIES = 4


class Gone(OSError):
    """The client's connection, while it is written to."""


class Client:
    """One HTTP request, as a server without a direct way gives it to the application. `told`: tokens by choice."""

    def __init__(self, dice: random.Random, asked: dict[str, Any], headers: dict[str, str]) -> None:
        self.status = 0
        self.number = ""
        self.told = 0
        self._asked = asked
        self._headers = headers
        self._dice = dice
        self._text = b""
        # after so many tokens it hangs up, or its connection breaks
        self._leaves_at = dice.randint(0, 40) if dice.random() < 0.3 else None
        self._breaks_at = dice.randint(1, 40) if dice.random() < 0.15 else None
        self._slow = dice.random() < 0.2
        self._left = asyncio.Event()
        self._sent = False

    async def ask(self, app: Any) -> None:
        """Until the application is done with it."""
        body = json.dumps(self._asked).encode()
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        if self._leaves_at == 0:
            self._left.set()

        async def receive() -> dict[str, Any]:
            if not self._sent:
                self._sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await self._left.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"",
                 "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "client": ("client", 1),
                 "root_path": "", "raw_path": b"/v1/completions"}
        await app(scope, receive, self._send)

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if self._breaks_at is not None and self.told >= self._breaks_at:
            raise Gone
        if self._slow:
            await asyncio.sleep(self._dice.choice((0.0, 0.0, 0.001)))
        self._text += message.get("body", b"")
        self._count()
        if self._leaves_at is not None and self.told >= self._leaves_at:
            self._left.set()

    def _count(self) -> None:
        """What has come, token by token."""
        if self.status != 200:
            return
        if not self._asked["stream"]:
            self._read(json.loads(self._text))
            return
        *lines, self._text = self._text.split(b"\n\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._read(json.loads(line[6:]))

    def _read(self, document: dict[str, Any]) -> None:
        if "error" in document:
            return
        self.number = document["id"].removeprefix("cmpl-")
        self.told += sum(len(choice.get("token_ids") or ()) for choice in document["choices"])


class History:
    """One thing that a client wants, sent once or several times."""

    def __init__(self, number: int, keys: dict[str, str]) -> None:
        dice = self._dice = random.Random(number)
        self.tenant = dice.choice(list(keys))
        self.once = f"history-{number}" if dice.random() < 0.4 else ""
        self.clients: list[Client] = []
        self.prompt_tokens = dice.randint(1, 60)
        self._headers = {"authorization": f"Bearer {keys[self.tenant]}"}
        if self.once:
            self._headers["idempotency-key"] = self.once
        self._asked = {"model": MODEL, "prompt": "p" * self.prompt_tokens, "max_tokens": dice.randint(1, 100),
                       "stream": dice.random() < 0.7, "return_token_ids": True, "n": 1 if self.once else
                       dice.choice((1, 1, 1, 3)), "service_tier": dice.choice(("default", "flex"))}
        if dice.random() < 0.3:
            self._asked["stop"] = [dice.choice(("wheel", "her coat", " and", "never there"))]

    async def run(self, app: Any, gateway: Gateway) -> None:
        tries = self._dice.randint(1, TRIES) if self.once else 1
        for _ in range(tries):
            one = Client(self._dice, self._asked, self._headers)
            self.clients.append(one)
            if self.once and self._dice.random() < 0.2:
                # beside itself: one of both is told that the other runs
                other = Client(self._dice, self._asked, self._headers)
                self.clients.append(other)
                await asyncio.gather(one.ask(app), other.ask(app))
            else:
                await one.ask(app)
            if self._dice.random() < 0.8:
                await gateway.billing.flush()

    @property
    def told(self) -> int:
        """Tokens that are to be charged: under one key each token of the answer once."""
        counts = [client.told for client in self.clients]
        return max(counts) if self.once else sum(counts)


class Mesh(FakeMesh):
    """One that fails in many ways, each request in its own."""

    def __init__(self, broker: MemoryBroker, seed: int) -> None:
        super().__init__(broker)
        self._dice = random.Random(seed)
        self.says = TEXT
        self.script = self._script
        self.last_words = self._last_words

    def _last_words(self, cancel: Cancel) -> list[Reply]:
        """What a cancelled stream took, now and then lost."""
        if self._dice.random() < 0.1:
            return []
        return [Finished(cancel.request_id, cancel.attempt, "cancelled", "w1", worker_s=0.001)]

    def _script(self, request: Generate) -> list[Reply] | None:
        self.batch = self._dice.randint(1, 12)
        name, attempt, done = request.request_id, request.attempt, len(request.generated) // 4
        whole = [*TEXT, END][:request.max_tokens]
        until = self._dice.randint(done, len(whole) - 1) if done < len(whole) else done
        began: list[Reply] = [Accepted(name, attempt, "w1", min(16, len(unpack(request.tokens))))]
        if until > done:
            began.append(Tokens(name, attempt, done, pack(whole[done:until])))
        match self._dice.choices(("fine", "fails", "cancelled", "fatal", "refused"), (70, 14, 6, 5, 5))[0]:
            case "fails":
                return began + refusal(request, "worker_failed", retryable=True)
            case "cancelled":
                return [*began, Finished(name, attempt, "cancelled", "w1", completion_tokens=until)]
            case "fatal":
                return began + refusal(request, "invalid_request")
            case "refused" if attempt == 1:
                return refusal(request, "overloaded")
        return None


class World:
    """A gateway, a mesh and a database, and what came of all histories."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.seed = seed
        self.url = url or f"sqlite:///{folder}/mill.db"
        (folder / "prices.toml").write_text(PRICES)
        self.keys = write(folder / "tenants.toml", **{
            f"t{seed}-{number}": {} if budget is None else {"spend_per_day": budget, "spend_per_month": 10 * budget}
            for number, budget in enumerate(BUDGETS)})
        self._settings = GatewaySettings(
            id="g1", model_name=MODEL, tenants=str(folder / "tenants.toml"), database=self.url,
            prices=str(folder / "prices.toml"), journal=str(folder / "journal"), accept_s=0.4, stall_s=0.5,
            drain_s=2.0)
        self.histories: list[History] = []
        self.found: list[str] = []  # violations, when all is over

    async def play(self, first: int, count: int) -> None:
        """These histories, several at a time."""
        async with self._running() as (app, gateway):
            waiting = iter(range(first, first + count))

            async def some() -> None:
                for number in waiting:
                    history = History(number, self.keys)
                    self.histories.append(history)
                    await history.run(app, gateway)

            await asyncio.gather(*(some() for _ in range(TOGETHER)))

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[tuple[Any, Gateway]]:
        broker = MemoryBroker()
        mesh = Mesh(broker, self.seed)
        gateway = Gateway(MemoryBus(broker), self._settings, LoopClock(), tiny_model())
        async with gateway.running():
            await mesh.start()
            beating = asyncio.create_task(mesh.beat())
            while gateway.not_ready():
                await asyncio.sleep(0)
            yield build_app(gateway), gateway
            beating.cancel()

    def violations(self) -> list[str]:
        """A sentence for each thing that the ledger has otherwise than clients counted it."""
        with contextlib.closing(open_database(self.url)) as database:
            return [*_violations(database, self.histories, set(self.keys)), *Books(database).check().problems]


def _violations(database: Database, histories: list[History], tenants: set[str]) -> list[str]:
    with database.reading() as connection:
        records = [entry.record for entry in entries_of(connection.execute(
            ledger.select().where(ledger.c.tenant.in_(tenants)))) if entry.record is not None]
    known = {record.request: record for record in records}
    found, charged, told = [], defaultdict[str, int](int), defaultdict[str, int](int)
    for record in records:
        charged[record.tenant] += record.generated_tokens
    for history in histories:
        told[history.tenant] += history.told
        if not history.once:
            for client in history.clients:
                if client.number and known[client.number].generated_tokens != client.told:
                    found.append(f"{client.number}: {known[client.number].generated_tokens} in the ledger, "
                                 f"{client.told} told")
        elif (mine := _once(history, known)) and sum(record.generated_tokens for record in mine) != history.told:
            found.append(f"{history.once}: {[record.generated_tokens for record in mine]} in the ledger, "
                         f"{[client.told for client in history.clients]} told")
        elif mine and sum(record.prompt_tokens for record in mine) not in (0, history.prompt_tokens):
            found.append(f"{history.once}: its prompt of {history.prompt_tokens} is charged "
                         f"{[record.prompt_tokens for record in mine]}")
    for tenant in tenants:
        if charged[tenant] != told[tenant]:
            found.append(f"{tenant}: {charged[tenant]} tokens in the ledger, {told[tenant]} told")
        budget = BUDGETS[int(tenant.rpartition("-")[2])]
        spent = sum(record.amount for record in records if record.tenant == tenant)
        if budget is not None and spent > budget * 1_000_000 * MICRO:
            found.append(f"{tenant}: {spent} nano-dollars were spent of {budget} dollars")
    if Books(database).check().sums.held:
        found.append("something is still held, though all has ended")
    return found


def _once(history: History, known: dict[str, Record]) -> list[Record]:
    """All records under the key of a history, if one of its answers was told."""
    names = {known[client.number].once for client in history.clients if client.number}
    return [record for record in known.values() if record.once and record.once in names]


def outcomes(world: World) -> dict[str, int]:
    """How the clients of a world fared: statuses, and whether they had all of it."""
    counts: defaultdict[str, int] = defaultdict(int)
    for history in world.histories:
        for client in history.clients:
            counts[str(client.status)] += 1
    return dict(sorted(counts.items()))


def play(first: int, count: int, url: str = "") -> World:
    """A world of its own for these histories, when all is over."""
    with tempfile.TemporaryDirectory(prefix="mill-billing-") as folder:
        world = World(Path(folder), url, first)
        asyncio.run(world.play(first, count))
        world.found = world.violations()
    return world


def main() -> int:
    """Exit code 1 on a violation."""
    parser = argparse.ArgumentParser(description="Random histories of requests against the ledger.")
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--database", default="", help="URL; default: a SQLite of its own for each world")
    parser.add_argument("--world", type=int, default=200, help="histories of one gateway's life")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    played = violations = 0
    fared: defaultdict[str, int] = defaultdict(int)
    for first in range(options.first, options.first + options.histories, options.world):
        count = min(options.world, options.first + options.histories - first)
        world = play(first, count, options.database)
        played += count
        for status, number in outcomes(world).items():
            fared[status] += number
        for sentence in world.found:
            violations += 1
            print(f"world {first}: {sentence}", flush=True)
    print(f"{dict(fared)}\n{played} histories, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
