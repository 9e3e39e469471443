"""`python -m gateway` against a real nats-server: it starts, answers, leaves when told, and says what is wrong."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.nats_server import NatsServer, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path).start()
    yield server
    server.kill()


async def gateway(nats: NatsServer, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--nats", nats.url, *flags, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("TOKENMILL_")},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_answers_and_leaves_when_told(nats: NatsServer, number: signal.Signals) -> None:
    port = free_port()
    process = await gateway(nats, "--port", str(port), "--log", "json")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        async with asyncio.timeout(30):
            while True:
                try:
                    health = await client.get("/health")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
        assert health.json() == {"status": "ok"}
        assert (await client.get("/ready")).status_code == 503
    process.send_signal(number)
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors
    assert b'"event": "gateway_serving"' in errors


async def test_a_taken_port_is_one_line_that_says_what_to_do(nats: NatsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await gateway(nats, "--port", str(taken.getsockname()[1]))
        _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "choose another with --port" in errors.decode().splitlines()[-1]
    assert "Traceback" not in errors.decode()


async def test_a_folder_that_is_no_model_is_one_line_that_says_what_to_do(nats: NatsServer, tmp_path: Path) -> None:
    process = await gateway(nats, "--port", str(free_port()), "--model", str(tmp_path))
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "tokenmill pull" in errors.decode() and "Traceback" not in errors.decode()
