"""A gateway without a socket before one real router and real workers with the mock engine, under virtual time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx

import drafter.service
import router.service
import worker.service
from gateway.app import build_app
from gateway.prompt import ServedModel
from gateway.service import Gateway
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, WorkerSettings
from tests.gateway.fake_mesh import tiny_model
from tests.virtual_time import run_virtual
from worker.mock_decoder import MockDecoder

PROMPT = "The mill turns while the water runs. " * 4  # 148 tokens: nine full blocks


class World:
    """A gateway without a socket, before one real router and two real workers with the mock engine."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, buses: list[MemoryBus]) -> None:
        self.gateway = gateway
        self.client = client
        self.buses = buses  # of workers w1, w2, ...: one that crashes takes its worker along

    async def ask(self, prompt: str = PROMPT, **more: Any) -> httpx.Response:
        headers = more.pop("headers", {})
        response = await self.client.post("/v1/completions", headers=headers, json={
            "prompt": prompt, "max_tokens": 4, "temperature": 0, **more})
        assert response.status_code == 200, response.text
        await asyncio.sleep(0.2)  # of virtual time, in which everybody hears what became of it
        return response

    async def receipt(self, name: str) -> dict[str, Any]:
        response = await self.client.get(f"/v1/requests/{name}/receipt")
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """The test in virtual time."""
    def played() -> None:
        run_virtual(test(), timeout_s=60)

    played.__name__ = test.__name__
    return played


@contextlib.asynccontextmanager
async def world(zones: tuple[str, ...] = ("eu", "us"), blocks: int = 64,
                heartbeat_s: float = 0.05, recipes: tuple[str, ...] = ("same",) * 4,
                serving: tuple[str, ...] = ("tiny",) * 4, offers: tuple[ServedModel, ...] = (), drafters: int = 0,
                **settings: Any) -> AsyncIterator[World]:
    """One worker for each of `zones`, with the model that `serving` names; `offers`: the gateway's, else `tiny`."""
    broker, clock = MemoryBroker(), LoopClock()
    buses = [MemoryBus(broker) for _ in zones]
    told = GatewaySettings(**({"id": "g1", "model_name": "tiny", "stall_s": 4.0} | settings))
    gateway = Gateway(MemoryBus(broker), told, clock, offers or tiny_model())
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(router.service.serve(
            MemoryBus(broker), RouterSettings(id="r1", heartbeat_s=0.05), clock))]
        for number, (zone, bus) in enumerate(zip(zones, buses, strict=True)):
            decoder = MockDecoder(blocks=blocks, vocabulary_size=258)
            decoder.recipe = recipes[number]
            its = WorkerSettings(id=f"w{number + 1}", engine="mock", model_name=serving[number], zone=zone,
                                 heartbeat_s=heartbeat_s, mock_step_s=0.0005, mock_row_s=0.0,
                                 mock_token_s=0.0005, max_running=8, drain_s=0.0)
            running.append(tasks.create_task(worker.service.serve(bus, its, clock, None, decoder)))
        for number in range(drafters):
            its_drafter = DrafterSettings(id=f"d{number + 1}", zone="eu", heartbeat_s=0.05)
            running.append(tasks.create_task(drafter.service.serve(MemoryBus(broker), its_drafter, clock)))
        async with gateway.running():
            while gateway.not_ready():
                await asyncio.sleep(0.01)
            if drafters:
                await asyncio.sleep(0.2)
            transport = httpx.ASGITransport(build_app(gateway))
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                yield World(gateway, client, buses)
        for task in running:
            task.cancel()
