"""Law 1: a stream belongs to the numeric recipe it began under, and goes on under no other."""

import asyncio

import httpx

from tests.gateway.world import PROMPT, World, virtual, world

LONG = {"prompt": PROMPT, "max_tokens": 150, "temperature": 0, "ignore_eos": True}


async def cut_down(mesh: World) -> httpx.Response:
    """An answer whose worker dies in the middle of it."""
    asking = asyncio.create_task(mesh.client.post("/v1/completions", json=LONG))
    while True:
        await asyncio.sleep(0.001)
        for stream in mesh.gateway.streams._streams.values():
            if len(stream.state.delivered) >= 40:
                mesh.buses[int(stream.worker.removeprefix("w")) - 1].crash()
                return await asking


@virtual
async def test_a_stream_goes_on_where_the_recipe_is_the_same() -> None:
    async with world() as mesh:
        whole = await mesh.ask(**LONG)
        again = await cut_down(mesh)
        assert again.status_code == 200
        assert again.json()["usage"]["mill"]["attempts"] > 1
        assert again.json()["choices"][0]["text"] == whole.json()["choices"][0]["text"]


@virtual
async def test_a_stream_whose_recipe_is_gone_ends_with_that_reason() -> None:
    async with world(recipes=("int8", "fp16")) as mesh:
        failed = await cut_down(mesh)
        assert failed.status_code == 503
        assert "recipe" in failed.json()["error"]["message"]
        # one that has not begun goes where there is room
        fresh = await mesh.client.post("/v1/completions", json=LONG)
        assert fresh.status_code == 200 and fresh.json()["usage"]["completion_tokens"] == 150
