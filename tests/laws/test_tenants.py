"""Law 10, law 7 and shares from HTTP to the block pool: what one tenant's key asks tells and costs others nothing.

A gateway with a tenants file, a real router and real workers with the mock engine, under virtual time.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared import subjects
from shared.blocks import BLOCK_SIZE_TOKENS, split_hashes
from shared.messages import Generate, KvEvents, Stored, decode
from tests.gateway.tenants_files import bearer, write
from tests.gateway.world import PROMPT, World, world
from tests.virtual_time import run_virtual

Scenario = Callable[[World, dict[str, str]], Awaitable[None]]


def play(scenario: Scenario, folder: Path, tenants: dict[str, dict[str, object]], timeout_s: float = 300.0,
         **settings: Any) -> None:
    async def scene() -> None:
        keys = write(folder / "tenants.toml", **tenants)
        async with world(tenants=str(folder / "tenants.toml"), **settings) as mesh:
            await scenario(mesh, keys)

    run_virtual(scene(), timeout_s=timeout_s)


async def ask(mesh: World, key: str, prompt: str = PROMPT, **headers: str) -> httpx.Response:
    return await mesh.ask(prompt, headers=bearer(key) | headers)


def cached(response: httpx.Response) -> int:
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


class Names:
    """What blocks are called on the bus: in requests, by tenant, and in what workers say they hold."""

    def __init__(self) -> None:
        self.asked: dict[str, set[bytes]] = {}
        self.stored: set[bytes] = set()

    async def listen(self, mesh: World) -> None:
        await mesh.gateway.bus.subscribe(subjects.ALL_GENERATE, self._on_generate)
        await mesh.gateway.bus.subscribe(subjects.worker_kv("*"), self._on_kv)

    def _on_generate(self, delivery: Any) -> None:
        request = decode(delivery.data, Generate)
        self.asked.setdefault(request.tenant, set()).update(split_hashes(request.block_hashes))

    def _on_kv(self, delivery: Any) -> None:
        for event in decode(delivery.data, KvEvents).events:
            if isinstance(event, Stored):
                self.stored.update(split_hashes(event.hashes))


def test_two_tenants_with_equal_prompts_share_no_block(tmp_path: Path) -> None:
    async def scenario(mesh: World, keys: dict[str, str]) -> None:
        names = Names()
        await names.listen(mesh)
        assert cached(await ask(mesh, keys["acme"])) == 0
        assert cached(await ask(mesh, keys["acme"])) == 9 * BLOCK_SIZE_TOKENS
        assert cached(await ask(mesh, keys["other"])) == 0
        assert cached(await ask(mesh, keys["other"])) == 9 * BLOCK_SIZE_TOKENS
        acme, other = names.asked["acme"], names.asked["other"]
        assert len(acme) == len(other) == 9 and not acme & other
        assert acme | other <= names.stored

    play(scenario, tmp_path, {"acme": {}, "other": {}}, zones=("eu",))


def prefix_tokens(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_found_in_the_cache_that_the_same_tenant_has_not_asked_before(seed: int, tmp_path: Path) -> None:
    """Crowds of equal prompts from three tenants, a cache too small for them, and two workers."""
    async def scenario(mesh: World, keys: dict[str, str]) -> None:
        chance = random.Random(seed)
        prompts = [f"{chance.randrange(3)}: {PROMPT}"[:chance.choice((60, 100, 140))] for _ in range(12)]
        asked: dict[str, list[str]] = {name: [] for name in keys}
        names, found = Names(), 0
        await names.listen(mesh)

        async def one(name: str, prompt: str) -> None:
            nonlocal found
            number = len(asked[name])
            asked[name].append(prompt)
            response = await ask(mesh, keys[name], prompt)
            found += cached(response)
            # with those that came meanwhile
            own = asked[name][:number] + asked[name][number + 1:]
            assert cached(response) <= max((prefix_tokens(prompt, other) for other in own), default=0), (name, prompt)

        for _ in range(12):
            turns = [(chance.choice(list(keys)), chance.choice(prompts)) for _ in range(chance.randrange(1, 6))]
            await asyncio.gather(*(one(*turn) for turn in turns))
        assert found > 0
        for name, others in _each_and_the_others(names.asked):
            assert not names.asked[name] & others

    play(scenario, tmp_path, {"a": {}, "b": {}, "c": {}}, zones=("eu", "eu"), blocks=24)


def _each_and_the_others(sets: dict[str, set[bytes]]) -> Iterator[tuple[str, set[bytes]]]:
    for name in sets:
        yield name, set().union(*(found for other, found in sets.items() if other != name))


def test_tenants_share_a_full_mesh_by_the_weights_of_their_keys(tmp_path: Path) -> None:
    async def scenario(mesh: World, keys: dict[str, str]) -> None:
        ended: list[str] = []

        async def one(name: str, number: int) -> None:
            await mesh.client.post("/v1/completions", headers=bearer(keys[name]), json={
                "prompt": f"{name} {number} {PROMPT * 2}"[:300], "max_tokens": 4, "temperature": 0})
            ended.append(name)

        asking = [asyncio.ensure_future(one(name, number)) for number in range(160) for name in keys]
        while len(ended) < 40:  # before the mesh is full nobody waits
            await asyncio.sleep(0.01)
        begun = len(ended)
        while len(ended) < begun + 120:
            await asyncio.sleep(0.01)
        shares = {name: ended[begun:begun + 120].count(name) / 120 for name in keys}
        assert abs(shares["heavy"] - 0.75) <= 0.06, shares
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    play(scenario, tmp_path, {"heavy": {"weight": 3.0}, "light": {"weight": 1.0}}, zones=("eu",), blocks=512)


def test_a_tenants_zones_are_a_wall_for_its_key_and_for_nobody_elses(tmp_path: Path) -> None:
    async def scenario(mesh: World, keys: dict[str, str]) -> None:
        await asyncio.sleep(3.0)
        inside = {(await ask(mesh, keys["inside"], f"{number} {PROMPT}")).headers["x-mill-worker"]
                  for number in range(12)}
        crowd = await asyncio.gather(*(ask(mesh, keys["anywhere"], f"{number} {PROMPT}") for number in range(24)))
        assert inside == {"w1"}
        assert {answer.headers["x-mill-worker"] for answer in crowd} == {"w1", "w2"}
        asked = {"prompt": PROMPT, "max_tokens": 4}
        outside = bearer(keys["inside"]) | {"x-tokenmill-residency": "us"}
        refused = await mesh.client.post("/v1/completions", headers=outside, json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        mesh.buses[0].crash()
        await asyncio.sleep(70.0)
        refused = await mesh.client.post("/v1/completions", headers=bearer(keys["inside"]), json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_eligible_worker")
        assert (await ask(mesh, keys["anywhere"])).headers["x-mill-worker"] == "w2"

    play(scenario, tmp_path, {"inside": {"residency": "eu"}, "anywhere": {}}, zones=("eu", "us"))
