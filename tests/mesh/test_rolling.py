"""A rolling restart under load: no failed request, no token lost, doubled or changed."""

import asyncio
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from deploy import broker
from deploy.live import Board
from deploy.local_mesh import LocalMesh, Options
from deploy.rolling import RollStopped, roll
from gateway.model_files import load_card
from shared import subjects
from tests.deploy.command import tokenmill, up
from tests.mesh.streams import Refused, Stream, chat, read, until_there
from tests.models import default_folder

pytestmark = pytest.mark.slow

TOKENS = 150
CLIENTS = 6


def _options(folder: Path, **more: object) -> Options:
    return Options(**({"model": default_folder(), "data": folder / "mesh", "port": broker.free_port(), "engine": "mock",
                       "drain_s": 0.5, "settings": {"worker": {"mock_step_s": 0.04}}} | more))  # type: ignore[arg-type]


async def _board(mesh: LocalMesh) -> Board:
    board = Board()
    bus = await mesh.connect()
    await bus.subscribe(subjects.ALL_STATUS, board.take)
    return board


def _body(mesh: LocalMesh, client: int) -> dict[str, object]:
    return chat(load_card(mesh.options.model).name, f"Count for client {client}.", max_tokens=TOKENS, seed=client,
                temperature=0.8, ignore_eos=True)


async def _keep_asking(url: str, body: dict[str, object], done: asyncio.Event, seen: list[Stream]) -> None:
    while not done.is_set():
        seen.append(await read(url, body))  # raises on any refusal and any error in the stream


async def _delivered(url: str) -> float:
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{url}/metrics")).text
    return float(next(line.split()[1] for line in text.splitlines()
                      if line.startswith("mill_gateway_completion_tokens_total ")))


@pytest.mark.parametrize(("workers", "routers"), [(2, 2), (1, 1)])
async def test_no_request_fails_and_no_token_is_lost_while_everything_behind_a_gateway_is_new(
        tmp_path: Path, workers: int, routers: int) -> None:
    said: list[str] = []
    # so short that streams of a second do not end in it
    async with LocalMesh(_options(tmp_path, workers=workers, routers=routers, drain_s=0.1)) as mesh:
        await mesh.until_ready()
        await until_there(mesh, workers, routers)
        board = await _board(mesh)
        mesh.services["gateway"] = []  # it has the clients' connections; see the next test
        bodies = [_body(mesh, client) for client in range(CLIENTS)]
        calm = [await read(mesh.url, body) for body in bodies]
        before = await _delivered(mesh.url)
        pids = {child.name: child.pid for child in mesh.children}
        done, seen = asyncio.Event(), [list[Stream]() for _ in bodies]
        async with asyncio.TaskGroup() as clients:
            for body, own in zip(bodies, seen, strict=True):
                clients.create_task(_keep_asking(mesh.url, body, done, own))
            await asyncio.sleep(0.5)
            await roll(mesh, board, said.append, 60.0)
            await asyncio.sleep(0.5)
            done.set()
        for undisturbed, own in zip(calm, seen, strict=True):
            assert own and {stream.text for stream in own} == {undisturbed.text}
            assert {(stream.finish_reason, stream.usage["completion_tokens"]) for stream in own} == {("length", TOKENS)}
        assert await _delivered(mesh.url) - before == TOKENS * sum(map(len, seen))
        moved = Counter(stream.usage["mill"]["attempts"] > 1 for own in seen for stream in own)
        assert moved[True], "nobody was in the middle of a stream when its worker left"
        new = {child.name: child.pid for child in mesh.children}
        assert new.keys() == pids.keys()  # who stood in is gone
        assert {name for name in pids if new[name] == pids[name]} == {"nats-server", "gateway-1"}
        assert not any(child.restarts for child in mesh.children)
    stood_in = [line for line in said if "stood in" in line]
    assert len(said) == 1 + workers + routers and len(stood_in) == (2 if workers == 1 else 0), said


async def test_streams_of_a_gateway_end_before_it_does_and_new_requests_find_the_other_one(tmp_path: Path) -> None:
    options = _options(tmp_path, gateways=2, drain_s=10.0)
    urls = [options.url, f"http://127.0.0.1:{options.port + 1}"]
    async with LocalMesh(options) as mesh:
        await mesh.until_ready()
        board = await _board(mesh)
        await asyncio.gather(*(board.ready(f"gateway-{i}", 0, 30.0) for i in (1, 2)))
        mesh.services |= {"drafter": [], "router": [], "worker": []}
        body = _body(mesh, 1)
        calm = await read(mesh.url, body)
        done, seen = asyncio.Event(), list[Stream]()

        async def ask(first: int) -> None:
            """As behind a load balancer: who is not taken in here is sent to the other one.

            So is who comes in the moment after a gateway was asked and before it leaves.
            """
            while not done.is_set():
                for at in (first, 1 - first):
                    if not await _ready(urls[at]):
                        continue
                    try:
                        seen.append(await read(urls[at], body))
                    except Refused as refused:
                        assert b"this gateway is leaving: send the request again" in refused.args[0]
                        continue
                    break

        async with asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                clients.create_task(ask(number % 2))
            await asyncio.sleep(0.5)
            await roll(mesh, board, lambda line: None, 60.0)
            await asyncio.sleep(0.5)
            done.set()
        assert len(seen) > CLIENTS and {stream.text for stream in seen} == {calm.text}


async def _ready(url: str) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            return (await client.get(f"{url}/ready")).status_code == 200
    except httpx.HTTPError:
        return False


async def test_whoever_does_not_come_back_stops_it_and_the_others_serve_on(tmp_path: Path) -> None:
    async with LocalMesh(_options(tmp_path, workers=2)) as mesh:
        await mesh.until_ready()
        await until_there(mesh, workers=2, routers=1)
        board = await _board(mesh)
        mesh.services |= {"drafter": [], "router": []}
        broken = mesh.child("worker-1")
        broken.command = [*broken.command, "--engine=none"]
        before = mesh.child("worker-2").pid
        with pytest.raises(RollStopped, match=r"worker-1 was not ready within 3 s, .*worker-1\.log says why"):
            await roll(mesh, board, lambda line: None, 3.0)
        assert mesh.child("worker-2").pid == before
        assert (await read(mesh.url, _body(mesh, 1))).finish_reason == "length"


def test_a_signal_asks_for_it(tmp_path: Path) -> None:
    with tokenmill(tmp_path, *up(broker.free_port(), "--quiet", "--workers", "2", "--drain-s", "1")) as command:
        command.until_printed("running; SIGINT or SIGTERM drains and stops")
        before = set(command.pids("worker"))
        command.process.send_signal(signal.SIGUSR1)
        command.until_printed("gateway-1 is new")
        assert not before & set(command.pids("worker", "--id"))
        order = [line.split()[0] for line in command.output.splitlines() if " is new: " in line]
        assert order == ["drafter-1", "router-1", "worker-1", "worker-2", "gateway-1"]
        command.interrupt()
        assert command.code() == 0
